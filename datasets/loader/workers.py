"""A resumable stream of batches, made in this process or by worker processes."""

import contextlib
import hashlib
import itertools
import json
import multiprocessing
import os
import select
import signal
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from multiprocessing import forkserver, reduction, resource_tracker, util
from multiprocessing.connection import Connection
from typing import Any, Protocol

import numpy as np
import torch
from torch._utils import ExceptionWrapper

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import order
from longtake.datasets.loader.handover import Receiver, Sender, memory
from longtake.datasets.loader.room import Empty, tensor_bytes

_MOST_AHEAD, _BYTES_AHEAD = 32, 32 << 20  # batches that a worker makes ahead: two, and more only of small ones
_PACK_SECONDS = 0.002  # of making batches that are handed over together


class Plan(Protocol):
    """Makes batches of given numbers, in order. Travels to worker processes."""

    def make(self, numbers: Iterator[int], empty: Empty = np.empty) -> Generator[dict[str, Any]]:
        """`empty` makes the large arrays of batches."""
        ...


class Stream:
    """Batches by their numbers, from where the state says. The base of `Loader` and `Mixture`."""

    def __init__(
        self,
        plan: Plan,
        data: Sequence[Any],
        seed: int,
        batch: Any,
        end: int | None,
        workers: int,
        rank: int,
        world: int,
    ) -> None:
        """`data` (JSON), `seed` and `batch` are what a state must agree with; `end` is the number after the last batch."""
        self.plan, self.end, self.rank, self.world = plan, end, rank, world
        self.skipped = 0
        self._workers = workers
        self._state: dict[str, Any] = {
            "order": order.ORDER_VERSION,
            "data": hashlib.sha256(json.dumps(data).encode()).hexdigest(),
            "seed": seed,
            "batch": batch,
            "taken": 0,
        }

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start = self._state["taken"]
        if self._workers:
            batches = _by_workers(self.plan, start, self.end, self._workers)
        else:
            batches = self.plan.make(_numbers(start, self.end))
        pin = torch.cuda.is_available()
        with contextlib.closing(batches):
            for batch in batches:
                self._state["taken"] += 1
                self.skipped += batch.get("skipped", 0)
                yield {name: _pinned(value) for name, value in batch.items()} if pin else batch

    def at(self, numbers: Iterable[int]) -> Iterator[dict[str, Any]]:
        """Make the batches of these numbers, counted from the first epoch, in this process; the state does not change."""
        yield from self.plan.make(iter(numbers))

    def state_dict(self) -> dict[str, Any]:
        """The number of batches taken, and what must be the same to continue from there."""
        return dict(self._state)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue another loader's stream, with any world size and worker count. Raises UserError for another stream's state."""
        for name, difference in (
            ("order", "another version of the order"),
            ("data", "another dataset, view or window"),
            ("seed", "another seed"),
            ("batch", "another global batch"),
        ):
            if state.get(name) != self._state[name]:
                remedy = "go on with the batch and the number of processes of before, or " if name == "batch" else ""
                raise UserError(
                    f"loader state: belongs to {difference} ({state.get(name)} there, {self._state[name]} here);"
                    f" {remedy}start a new run"
                )
        self._state["taken"] = state["taken"]


def _pinned(value: Any) -> Any:
    if isinstance(value, list):
        return [_pinned(one) for one in value]
    return value.pin_memory() if isinstance(value, torch.Tensor) else value


def _numbers(start: int, end: int | None, step: int = 1) -> Iterator[int]:
    return itertools.count(start, step) if end is None else iter(range(start, end, step))


def _by_workers(plan: Plan, start: int, end: int | None, count: int) -> Generator[dict[str, Any]]:
    """The batches from number `start` on, of which each of `count` processes makes every `count`-th."""
    _start_server_without_signals()
    workers: list[_Worker] = []
    # before multiprocessing joins its processes, where this is not closed otherwise
    close = util.Finalize(None, _close, (workers,), exitpriority=100)
    try:
        for n in range(count):
            workers.append(_Worker(plan, (start + n, end, count)))
        for _, worker in zip(_numbers(start, end), itertools.cycle(workers), strict=False):
            yield worker.take()
    finally:
        close()


def _close(workers: Sequence["_Worker"]) -> None:
    for worker in workers:
        worker.pipe.close()
        # whatever it is at: it has nothing that would have to be put in order
        worker.process.kill()
    for worker in workers:
        worker.process.join()


class _Worker:
    """A process that makes batches, seen from the one that takes them."""

    def __init__(self, plan: Plan, numbers: tuple[int, int | None, int]) -> None:
        """`numbers` are the first of its batches, the one that they end before, and the step from one to the next."""
        context = multiprocessing.get_context("forkserver")
        self.pipe, theirs = context.Pipe()
        self._batches: deque[Any] = deque()
        self._taken = 0
        self.process = context.Process(target=_work, args=(plan, numbers, theirs, os.getpid()), daemon=True)
        handle = memory()
        try:
            self._receiver = Receiver(self.pipe, handle)
            self.process.start()
            reduction.send_handle(self.pipe, handle, self.process.pid)
        finally:
            os.close(handle)
            theirs.close()

    def take(self) -> dict[str, Any]:
        """The next batch. Raises Failure: it cannot be made, or the process is gone."""
        if not self._batches:
            try:
                self._batches.extend(self._receiver.receive())
            except (EOFError, ConnectionError) as e:
                raise Failure(
                    "loader: a decoding process was killed, perhaps for want of memory: lower `workers` or `batch`;"
                    " the last checkpoint is whole: run the same command again to go on from it"
                ) from e
        batch: Any = self._batches.popleft()
        self._taken += 1
        if isinstance(batch, Failure):
            raise batch
        if isinstance(batch, ExceptionWrapper):
            batch.reraise()
        if not self._batches:
            # a worker that is gone is noticed when nothing of it is left to take
            with contextlib.suppress(ConnectionError):
                self.pipe.send((self._taken, self._receiver.unused()))
        taken: dict[str, Any] = batch
        return taken


def _work(plan: Plan, numbers: tuple[int, int | None, int], pipe: Connection, process: int) -> None:
    """Make the batches of these numbers, some ahead of those that are taken.

    Batches that are quickly made go in packs: waking a process for each would take longer than making it.
    """
    _end_with(process, pipe)
    torch.set_num_threads(1)
    handle = reduction.recv_handle(pipe)
    sender = Sender(pipe, handle)
    os.close(handle)
    batches = plan.make(_numbers(*numbers), sender.empty)
    made = taken = 0
    pack: list[Any] = []
    began = time.perf_counter()
    # the other end is closed
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            pack.append(_next(batches))
            made += 1
            last = not isinstance(pack[-1], dict)
            ahead = 2 if last else max(2, min(_MOST_AHEAD, _BYTES_AHEAD // (1 + tensor_bytes(pack[-1]))))
            if not last and 2 * len(pack) < ahead and time.perf_counter() - began < _PACK_SECONDS:
                continue
            sender.send(pack)
            pack.clear()
            # after the last one until this process is ended: what is in the pipe would be lost with it
            while last or made - taken >= ahead or pipe.poll():
                taken, unused = pipe.recv()
                sender.reuse(unused)
            began = time.perf_counter()


def _next(batches: Iterator[dict[str, Any]]) -> dict[str, Any] | Failure | ExceptionWrapper | None:
    """The next batch, the error in its place, or None at the end."""
    try:
        return next(batches, None)
    except Failure as e:
        return e
    except Exception:
        return ExceptionWrapper(where="in a process of the loader")


def _end_with(process: int, pipe: Connection) -> None:
    """End this worker as soon as the process that it works for is gone, or has closed its end of the pipe.

    Whatever this one is at: its parent is a server, which lives as long as a worker does, since each holds its pipe open.
    """
    watched = select.poll()
    watched.register(pipe.fileno(), 0)  # its end
    # a sandbox may know no such descriptors: there the pipe tells, unless a child of that process has it open
    with contextlib.suppress(OSError):
        try:
            watched.register(os.pidfd_open(process), select.POLLIN)
        except ProcessLookupError:
            os._exit(1)

    def watch() -> None:
        watched.poll()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _start_server_without_signals() -> None:
    """Start the server that workers are forked from with SIGINT and SIGTERM blocked, which they inherit.

    A signal to stop often reaches all processes of a group. The workers must go on then, so that the step can end and be
    saved. They end when the process that they work for says so, or is gone.
    """
    # starting it later would lift the mask
    resource_tracker.ensure_running()
    before = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
