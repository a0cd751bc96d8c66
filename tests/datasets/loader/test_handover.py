"""Batches handed over through shared memory: the same on the other side, for as long as they are held, in bounded memory."""

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest
import torch

from longtake.datasets.loader.handover import Receiver, Sender

LARGE = (4, 5, 1000)  # bytes that go through memory


@pytest.fixture
def ends() -> Iterator[tuple[Sender, Receiver]]:
    ours, theirs = Pipe()
    with ours, theirs:
        yield Sender(ours), Receiver(theirs)


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
