"""Batches from worker processes through memory that both sides have mapped: no large array is pickled on the way.

A worker makes the arrays of its batches in a file of memory that both sides map; each has a range of it, a slab. What goes
through the pipe is the rest of a batch, and which slab has which array. A slab comes back when the last tensor of it is gone,
and is used again. The file has no name: nothing stays behind processes that are killed, and a small /dev/shm is no limit.
"""

import io
import math
import mmap
import os
import pickle
import threading
import weakref
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

_SPAN = 1 << 38  # bytes of addresses of a worker; those never written to take no memory
_SMALL = 1 << 14  # bytes of a tensor that goes through the pipe
_FREE_BYTES = 64 << 20  # of slabs that are kept for the next arrays; what is free beyond goes back to the system


def memory() -> int:
    """The descriptor of a file of memory for one worker, to be closed by the caller once both sides have mapped it."""
    handle = os.memfd_create("batches")
    os.ftruncate(handle, _SPAN)
    return handle


@dataclass(eq=False)
class _Slab:
    number: int
    offset: int
    size: int
    array: weakref.ref[np.ndarray] | None = None  # that was made in it last
    sent: bool = False
    has_memory: bool = True  # False: its memory went back to the system, until it is written to again


class Sender:
    """The worker's side."""

    def __init__(self, pipe: Connection, handle: int) -> None:
        self._pipe = pipe
        self._memory = mmap.mmap(handle, _SPAN)
        self._address = np.frombuffer(self._memory, np.uint8, 1).ctypes.data
        self._slabs: list[_Slab] = []
        self._free: list[_Slab] = []
        self._by_address: dict[int, _Slab] = {}
        # threads that read from a store make arrays at once
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of any values in a slab, or in this process's memory if it is small."""
        dtype, count = np.dtype(dtype), math.prod(shape)
        if (size := count * dtype.itemsize) < _SMALL:
            return np.empty(shape, dtype)
        with self._lock:
            slab = self._slab(size)
        array: np.ndarray = np.frombuffer(self._memory, dtype, count, slab.offset)
        # an array that is not handed over frees its slab here, unless another thread has it by now: `_slab` forgets the array
        # before it says that the slab is not sent
        slab.array = weakref.ref(
            array, lambda ref: self._free.append(slab) if not slab.sent and slab.array is ref else None
        )
        return array.reshape(shape)

    def _slab(self, size: int) -> _Slab:
        # whole pages, an eighth apart, so that arrays of about the same size share slabs
        step = max(mmap.PAGESIZE, 1 << (size.bit_length() - 4))
        size = -(-size // step) * step
        # of equal ones the last: its pages are likeliest still in the processor's cache
        fitting = [slab for slab in reversed(self._free) if size <= slab.size <= 2 * size]
        if fitting:
            slab = min(fitting, key=lambda one: (not one.has_memory, one.size))
            self._free.remove(slab)
            # the old reference first: where its array goes only now, the slab is in use again
            slab.array = None
            slab.sent, slab.has_memory = False, True
            return slab
        self._give_back()
        offset = self._slabs[-1].offset + self._slabs[-1].size if self._slabs else 0
        if offset + size > _SPAN:
            raise MemoryError(f"batches of {size} bytes fill the {_SPAN} bytes of a worker; lower `batch`")
        slab = _Slab(len(self._slabs), offset, size)
        self._slabs.append(slab)
        self._by_address[self._address + offset] = slab
        return slab

    def _give_back(self) -> None:
        """Give the memory of the largest free slabs back to the system, so that few bytes lie idle."""
        idle = sorted((slab for slab in list(self._free) if slab.has_memory), key=lambda slab: slab.size)
        size = sum(slab.size for slab in idle)
        while size > _FREE_BYTES:
            slab = idle.pop()
            # a sandbox may not know how
            with suppress(OSError):
                self._memory.madvise(mmap.MADV_REMOVE, slab.offset, slab.size)
                slab.has_memory = False
            size -= slab.size

    def send(self, batches: list[Any]) -> None:
        """Hand batches over."""
        sink = io.BytesIO()
        _Pickler(sink, self._place).dump(batches)
        self._pipe.send_bytes(sink.getbuffer())

    def reuse(self, numbers: Iterable[int]) -> None:
        """Take back slabs that the other side has no tensors of any more."""
        self._free.extend(self._slabs[number] for number in numbers)

    def _place(self, tensor: torch.Tensor) -> tuple[Any, ...]:
        """Where the other side finds a tensor's values."""
        storage = tensor.untyped_storage()
        slab = self._by_address.get(storage.data_ptr())
        # made elsewhere, or a second view of the same memory
        if slab is None or slab.sent:
            if tensor.nbytes < _SMALL:
                plain = tensor.view(torch.uint16) if tensor.dtype == torch.bfloat16 else tensor
                return tensor.dtype, tuple(tensor.shape), plain.numpy().tobytes()
            memory = torch.from_numpy(self.empty((tensor.nbytes,), np.uint8))
            tensor = memory.view(tensor.dtype).view(tensor.shape).copy_(tensor)
            storage = tensor.untyped_storage()
            slab = self._by_address[storage.data_ptr()]
        slab.sent = True
        place = slab.number, slab.offset, storage.nbytes()
        return tensor.dtype, tuple(tensor.shape), place, tensor.stride(), tensor.storage_offset()


class _Pickler(pickle.Pickler):
    def __init__(self, sink: io.BytesIO, place: Any) -> None:
        super().__init__(sink, pickle.HIGHEST_PROTOCOL)
        self._place = place

    def reducer_override(self, value: Any) -> Any:
        # not `persistent_id`, which is called for every name and number too
        return (_placed, self._place(value)) if isinstance(value, torch.Tensor) else NotImplemented


def _placed(*_: Any) -> torch.Tensor:
    """Stands in a pickle for the receiver's own function."""
    raise AssertionError("only a receiver has the memory")


class Receiver:
    """The other side."""

    def __init__(self, pipe: Connection, handle: int) -> None:
        self._pipe = pipe
        self._memory = mmap.mmap(handle, _SPAN)
        self._arrays: dict[int, weakref.ref[np.ndarray]] = {}  # those of each slab that tensors are made of
        self._unused: list[int] = []

    def receive(self) -> list[Any]:
        """The batches of one `send`. Raises EOFError, ConnectionError: the worker is gone."""
        message = self._pipe.recv_bytes()
        batches: list[Any] = _Unpickler(io.BytesIO(message), self._tensor).load()
        return batches

    def unused(self) -> list[int]:
        """Slabs that have no tensors any more, each once."""
        # one by one: another thread may append meanwhile
        return [self._unused.pop() for _ in range(len(self._unused))]

    def _tensor(self, dtype: torch.dtype, shape: tuple[int, ...], place: Any, *layout: Any) -> torch.Tensor:
        if not layout:
            return (
                torch.frombuffer(bytearray(place), dtype=dtype).view(shape)
                if place
                else torch.empty(shape, dtype=dtype)
            )
        slab, offset, size = place
        array: np.ndarray = np.frombuffer(self._memory, np.uint8, size, offset)
        self._arrays[slab] = weakref.ref(array, lambda _: self._unused.append(slab))
        return torch.from_numpy(array).view(dtype).as_strided(shape, *layout)


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, tensor: Any) -> None:
        super().__init__(source)
        self._tensor = tensor

    def find_class(self, module: str, name: str) -> Any:
        return self._tensor if (module, name) == (__name__, _placed.__name__) else super().find_class(module, name)
