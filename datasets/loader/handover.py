"""Batches from worker processes through memory that both sides have mapped: no array is copied or pickled on the way.

A worker makes the arrays of its batches in slabs, each a piece of shared memory for one array. What goes through the pipe is
the rest of a batch, and which slab has which array. A slab comes back when the last tensor of it is gone, and is used again.
Slabs are files without a name: nothing stays behind processes that are killed, and a small /dev/shm is no limit.
"""

import io
import math
import mmap
import os
import pickle
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import reduction
from multiprocessing.connection import Connection
from typing import Any

import numpy as np
import torch

_SMALL = 1 << 14  # bytes of a tensor that goes through the pipe


@dataclass
class _Slab:
    number: int
    memory: mmap.mmap
    address: int
    peers: "list[_Slab]"  # the free slabs of this size
    array: weakref.ref[np.ndarray] | None = None  # that was made in it last
    sent: bool = False


class Sender:
    """The worker's side."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._slabs: list[_Slab] = []
        self._free: dict[int, list[_Slab]] = {}  # by size
        self._by_address: dict[int, _Slab] = {}
        # threads that read from a store make arrays while others do and batches are sent: a slab is two messages
        self._lock = threading.Lock()

    def empty(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array of any values in a slab, or in this process's memory if it is small."""
        dtype, count = np.dtype(dtype), math.prod(shape)
        if (size := count * dtype.itemsize) < _SMALL:
            return np.empty(shape, dtype)
        with self._lock:
            slab = self._slab(size)
        array: np.ndarray = np.frombuffer(slab.memory, dtype, count)
        # an array that is not handed over frees its slab here
        slab.array = weakref.ref(array, lambda _: None if slab.sent else slab.peers.append(slab))
        return array.reshape(shape)

    def _slab(self, size: int) -> _Slab:
        # sizes an eighth apart, so that arrays of about the same size share slabs
        step = max(mmap.PAGESIZE, 1 << (size.bit_length() - 4))
        size = -(-size // step) * step
        free = self._free.setdefault(size, [])
        if free:
            # the last one: its pages are likeliest still in the processor's cache
            slab = free.pop()
            slab.sent = False
            return slab
        handle = os.memfd_create("batch")
        try:
            os.ftruncate(handle, size)
            memory = mmap.mmap(handle, 0)
            slab = _Slab(len(self._slabs), memory, np.frombuffer(memory, np.uint8).ctypes.data, free)
            self._pipe.send_bytes(b"slab")
            reduction.send_handle(self._pipe, handle, os.getppid())
        finally:
            os.close(handle)
        self._slabs.append(slab)
        self._by_address[slab.address] = slab
        return slab

    def send(self, batches: list[Any]) -> None:
        """Hand batches over."""
        sink = io.BytesIO()
        _Pickler(sink, self._place).dump(batches)
        with self._lock:
            self._pipe.send_bytes(sink.getbuffer())

    def reuse(self, numbers: Iterable[int]) -> None:
        """Take back slabs that the other side has no tensors of any more."""
        for number in numbers:
            self._slabs[number].peers.append(self._slabs[number])

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
        return (
            tensor.dtype,
            tuple(tensor.shape),
            slab.number,
            storage.nbytes(),
            tensor.stride(),
            tensor.storage_offset(),
        )


class _Pickler(pickle.Pickler):
    def __init__(self, sink: io.BytesIO, place: Any) -> None:
        super().__init__(sink, pickle.HIGHEST_PROTOCOL)
        self._place = place

    def persistent_id(self, value: Any) -> Any:
        return self._place(value) if isinstance(value, torch.Tensor) else None


class Receiver:
    """The other side."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._slabs: list[mmap.mmap] = []
        self._arrays: dict[int, weakref.ref[np.ndarray]] = {}  # those of each slab that tensors are made of
        self._unused: list[int] = []

    def receive(self) -> list[Any]:
        """The batches of one `send`. Raises EOFError, ConnectionError: the worker is gone."""
        while (message := self._pipe.recv_bytes()) == b"slab":
            handle = reduction.recv_handle(self._pipe)
            try:
                self._slabs.append(mmap.mmap(handle, 0))
            finally:
                os.close(handle)
        batches: list[Any] = _Unpickler(io.BytesIO(message), self._tensor).load()
        return batches

    def unused(self) -> list[int]:
        """Slabs that have no tensors any more, each once."""
        numbers, self._unused = self._unused, []
        return numbers

    def _tensor(self, place: tuple[Any, ...]) -> torch.Tensor:
        dtype, shape, *rest = place
        if len(rest) == 1:
            return (
                torch.frombuffer(bytearray(rest[0]), dtype=dtype).view(shape)
                if rest[0]
                else torch.empty(shape, dtype=dtype)
            )
        slab, size, stride, offset = rest
        array: np.ndarray = np.frombuffer(self._slabs[slab], np.uint8, size)
        self._arrays[slab] = weakref.ref(array, lambda _: self._unused.append(slab))
        return torch.from_numpy(array).view(dtype).as_strided(shape, stride, offset)


class _Unpickler(pickle.Unpickler):
    def __init__(self, source: io.BytesIO, tensor: Any) -> None:
        super().__init__(source)
        self._tensor = tensor

    def persistent_load(self, place: Any) -> Any:
        return self._tensor(place)
