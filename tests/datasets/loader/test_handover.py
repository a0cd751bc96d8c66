"""Batches handed over through shared memory: the same on the other side, for as long as they are held, in bounded memory."""

import gc
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from longtake.datasets.loader.handover import Receiver, Sender, memory
from longtake.datasets.loader.room import tensor_bytes

LARGE = (4, 5, 1000)  # bytes that go through memory


@pytest.fixture
def ends() -> Iterator[tuple[Sender, Receiver]]:
    ours, theirs = Pipe()
    handle = memory()
    with ours, theirs:
        sides = Sender(ours, handle), Receiver(theirs, handle)
        os.close(handle)
        yield sides


def handed(sender: Sender, receiver: Receiver, batch: dict[str, Any]) -> dict[str, Any]:
    sender.send([batch])
    (got,) = receiver.receive()
    sender.reuse(receiver.unused())
    return dict(got)


def filled(sender: Sender, value: int) -> torch.Tensor:
    array = sender.empty(LARGE, np.int16)
    array[:] = value
    return torch.from_numpy(array)


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def test_tensors_of_every_kind_arrive_as_they_were(ends: tuple[Sender, Receiver]) -> None:
    array = ends[0].empty(LARGE, np.uint16)
    array[:] = np.arange(array.size).reshape(LARGE)
    bits = torch.from_numpy(array)
    batch = {
        "key": ["a", "b"],
        "permuted": bits.view(torch.bfloat16).permute(0, 2, 1),
        "again": bits[1:, :, ::2],
        "made elsewhere": torch.randn(3, 20_000).T,
        "small": torch.randn(2, 3).to(torch.bfloat16).T,
        "mask": torch.tensor([True, False]),
        "empty": torch.empty(2, 0, dtype=torch.int64),
        "number": torch.tensor(3.5, dtype=torch.float64),
    }
    got = handed(*ends, batch)
    assert got.keys() == batch.keys() and got["key"] == ["a", "b"]
    for name, sent in list(batch.items())[1:]:
        assert isinstance(sent, torch.Tensor)
        assert got[name].dtype == sent.dtype and got[name].shape == sent.shape, name
        assert torch.equal(bytes_of(got[name]), bytes_of(sent)), name
    assert got["permuted"].stride() == batch["permuted"].stride()


def test_what_is_held_stays_while_others_come(ends: tuple[Sender, Receiver]) -> None:
    held, views = {}, {}
    for number in range(40):
        got = handed(*ends, {"latent": filled(ends[0], number)})["latent"]
        if number % 5 == 0:
            held[number] = got
        elif number % 5 == 1:
            # of a tensor that is gone
            views[number] = got[1:2, :, 7]
    assert all((held[number] == number).all() for number in held)
    assert all((views[number] == number).all() for number in views)


def test_memory_is_used_again_when_its_tensors_are_gone(ends: tuple[Sender, Receiver]) -> None:
    places = set()
    for number in range(40):
        got = handed(*ends, {"latent": filled(ends[0], number)})["latent"]
        assert (got == number).all()
        places.add(got.data_ptr())
    assert len(places) <= 3


def test_an_array_that_is_not_handed_over_takes_no_memory(ends: tuple[Sender, Receiver]) -> None:
    places = set()
    for _ in range(40):
        array = ends[0].empty(LARGE, np.int16)
        places.add(array.ctypes.data)
        del array
    assert len(places) == 1


def test_threads_make_arrays_while_batches_are_handed_over(ends: tuple[Sender, Receiver]) -> None:
    sender, receiver = ends
    arrived = list[torch.Tensor]()
    # a pipe holds little: somebody has to take what comes
    taking = threading.Thread(target=lambda: arrived.extend(receiver.receive()[0]["x"] for _ in range(40)), daemon=True)
    taking.start()
    with ThreadPoolExecutor(16) as pool:
        # all of other sizes, so that each array needs new memory
        arrays = list(pool.map(lambda n: sender.empty((20_000 + 5_000 * n,), np.uint8), range(200)))
        making = [pool.submit(sender.empty, (2_000_000 + 300_000 * n,), np.uint8) for n in range(100)]
        for number, array in enumerate(arrays[:40]):
            array[:] = number
            sender.send([{"x": torch.from_numpy(array)}])
        assert [future.result().nbytes for future in making] == [2_000_000 + 300_000 * n for n in range(100)]
    taking.join(60)
    assert [int(tensor[0]) for tensor in arrived] == list(range(40))


def test_sizes_that_do_not_come_again_hold_no_memory(ends: tuple[Sender, Receiver]) -> None:
    sender, receiver = ends
    rng = np.random.default_rng(0)
    before = shared_bytes()
    for number in range(200):
        # up to 8 MB: 800 MB in all
        sent = torch.from_numpy(sender.empty((int(rng.integers(1 << 15, 1 << 23)),), np.uint8))
        sent[:] = number % 251
        got = handed(sender, receiver, {"x": sent})["x"]
        assert (got == number % 251).all()
    # what lies idle, and an array that was made before the next look; both sides have mapped it
    assert shared_bytes() - before < 2 * (72 << 20)


def test_no_descriptor_is_kept_for_an_array(ends: tuple[Sender, Receiver]) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    held = [handed(*ends, {"x": filled(ends[0], number)})["x"] for number in range(50)]
    assert len(list(Path("/proc/self/fd").iterdir())) == before
    assert all((tensor == number).all() for number, tensor in enumerate(held))


def test_an_array_that_goes_late_does_not_free_memory_that_is_in_use_again(ends: tuple[Sender, Receiver]) -> None:
    sender, receiver = ends
    old = filled(sender, 1)
    got = handed(sender, receiver, {"x": old})["x"]
    del got
    # the other side is done with it, while this one still has the array
    sender.reuse(receiver.unused())
    new = filled(sender, 2)
    assert new.data_ptr() == old.data_ptr()
    del old
    gc.collect()
    assert filled(sender, 3).data_ptr() != new.data_ptr()
    assert (new == 2).all()


def test_a_late_word_of_an_old_array_does_not_free_memory_that_another_thread_has(
    ends: tuple[Sender, Receiver],
) -> None:
    sender, receiver = ends
    old = filled(sender, 1)
    slab = sender._by_address[old.untyped_storage().data_ptr()]
    gone = slab.array
    assert gone and gone.__callback__
    del handed(sender, receiver, {"x": old})["x"]
    gc.collect()
    sender.reuse(receiver.unused())
    new = filled(sender, 2)
    assert new.data_ptr() == old.data_ptr()
    # as where the thread that has let go of the old array is not on until now
    gone.__callback__(gone)
    assert filled(sender, 3).data_ptr() != new.data_ptr()


def test_a_system_that_takes_no_memory_back_costs_memory_alone(
    ends: tuple[Sender, Receiver], monkeypatch: pytest.MonkeyPatch
) -> None:
    sender, receiver = ends
    array = filled(sender, 1)
    del handed(sender, receiver, {"x": array})["x"], array
    gc.collect()
    sender.reuse(receiver.unused())

    def refuse(*_: Any) -> None:
        raise OSError("not implemented")

    with monkeypatch.context() as patch:
        patch.setattr("longtake.datasets.loader.handover._FREE_BYTES", 0)
        patch.setattr(sender, "_memory", SimpleNamespace(madvise=refuse))
        sender._give_back()
    assert len(sender._free) == 1 and (filled(sender, 2) == 2).all()


def test_pixels_count_as_bytes_of_a_batch() -> None:
    pixels = [torch.zeros(2, 3, dtype=torch.uint8), torch.zeros(5, dtype=torch.float32)]
    assert tensor_bytes({"key": ["a", "b"], "pixels": pixels, "latent": torch.zeros(4, dtype=torch.float16)}) == 34


def shared_bytes() -> int:
    """What this process has mapped of shared memory."""
    return int(Path("/proc/self/status").read_text().partition("RssShmem:")[2].split()[0]) << 10
