"""The memory of a batch: one array a column, of which each sample fills its own row, so that nothing is stacked afterwards."""

import threading
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch

Empty = Callable[[tuple[int, ...], Any], np.ndarray]  # (shape, dtype) to an array of any values


class Room:
    """Arrays by column for the samples of a batch, which may be loaded by several threads."""

    def __init__(self, samples: int, empty: Empty) -> None:
        self._samples, self._empty = samples, empty
        self._arrays: dict[str, np.ndarray] = {}
        self._odd: set[str] = set()  # columns in which a sample has another shape than the first one
        self._lock = threading.Lock()

    def of_sample(self, sample: int) -> Callable[[str, tuple[int, ...], Any], np.ndarray]:
        """A function of a column, a shape and a dtype that gives the sample's place there, to be filled whole."""

        def place(column: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            array = self._arrays.get(column)
            if array is None:
                with self._lock:
                    if (array := self._arrays.get(column)) is None:
                        array = self._arrays[column] = self._empty((self._samples, *shape), dtype)
            if array.shape[1:] != shape or array.dtype != dtype:
                self._odd.add(column)
                return np.empty(shape, dtype)
            return array[sample]

        return place

    def joined(self, column: str, values: list[np.ndarray], samples: list[int]) -> np.ndarray:
        """The arrays of some samples, which are their places or arrays of their own, as one.

        Raises:
            ValueError: their shapes differ.
        """
        whole = None if column in self._odd else self._arrays.get(column)
        if whole is not None:
            return whole if samples == list(range(self._samples)) else whole[samples]
        out = self._empty((len(values), *values[0].shape), values[0].dtype)
        return np.stack(values, out=out)


def tensor_bytes(batch: Mapping[str, Any]) -> int:
    """The bytes of a batch's tensors."""
    return sum(value.nbytes for value in batch.values() if isinstance(value, torch.Tensor))
