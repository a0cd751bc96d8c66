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
        # by column, with a sample's shape and the dtype as they were asked for, which is quicker to compare
        self._arrays: dict[str, tuple[np.ndarray, tuple[int, ...], Any]] = {}
        self._odd: set[str] = set()  # columns in which a sample has another shape than the first one
        self._lock = threading.Lock()

    def of_sample(self, sample: int) -> Callable[[str, tuple[int, ...], Any], np.ndarray]:
        """A function of a column, a shape and a dtype that gives the sample's place there, to be filled whole."""

        def place(column: str, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
            one = self._arrays.get(column)
            if one is None:
                with self._lock:
                    if (one := self._arrays.get(column)) is None:
                        one = self._arrays[column] = self._empty((self._samples, *shape), dtype), shape, dtype
            if one[1] != shape or one[2] != dtype:
                self._odd.add(column)
                return np.empty(shape, dtype)
            return one[0][sample]

        return place

    def joined(self, column: str, values: list[np.ndarray], samples: list[int]) -> np.ndarray:
        """The arrays of some samples, which are their places or arrays of their own, as one.

        Raises:
            ValueError: their shapes differ.
        """
        if column in self._arrays and column not in self._odd:
            whole = self._arrays[column][0]
            return whole if samples == list(range(self._samples)) else whole[samples]
        out = self._empty((len(values), *values[0].shape), values[0].dtype)
        return np.stack(values, out=out)


def tensor_bytes(batch: Mapping[str, Any]) -> int:
    """The bytes of a batch's tensors, and of those in its lists: the pixels of live latents are one a sample."""
    values = [value if isinstance(value, list) else [value] for value in batch.values()]
    return sum(one.nbytes for value in values for one in value if isinstance(one, torch.Tensor))
