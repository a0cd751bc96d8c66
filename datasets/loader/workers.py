"""A resumable stream of batches, made in this process or by worker processes."""

import hashlib
import itertools
import json
import os
import select
import signal
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from typing import Any, Protocol

import torch

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import order


class Plan(Protocol):
    """Makes batches of given numbers, in order. Travels to worker processes."""

    def make(self, numbers: Iterator[int]) -> Iterator[dict[str, Any]]: ...


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
        share = _Share(self.plan, self._state["taken"], self.end)
        options: dict[str, Any] = {}
        if self._workers:
            options = {"num_workers": self._workers, "multiprocessing_context": "forkserver", "prefetch_factor": 2}
            _start_server_without_signals()
        loader = torch.utils.data.DataLoader(share, batch_size=None, pin_memory=torch.cuda.is_available(), **options)
        for batch in _while_workers_live(iter(loader)) if self._workers else loader:
            if isinstance(batch, Failure):
                raise batch
            self._state["taken"] += 1
            self.skipped += batch.get("skipped", 0)
            yield batch

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
                raise UserError(
                    f"loader state: belongs to {difference} ({state.get(name)} there, {self._state[name]} here); start a new run"
                )
        self._state["taken"] = state["taken"]


class _Share(torch.utils.data.IterableDataset):
    """Batches from number `start` on; each of n workers makes every n-th one, and DataLoader takes them in turn."""

    def __init__(self, plan: Plan, start: int, end: int | None) -> None:
        self.plan, self.start, self.end = plan, start, end
        self._process = os.getpid()

    def __iter__(self) -> Iterator[dict[str, Any] | Failure]:
        info = torch.utils.data.get_worker_info()
        if info:
            _end_with(self._process)
        first, stride = (self.start + info.id, info.num_workers) if info else (self.start, 1)
        numbers = itertools.count(first, stride) if self.end is None else range(first, self.end, stride)
        try:
            yield from self.plan.make(iter(numbers))
        except Failure as e:
            # yielded, not raised: torch would put a stack trace into its message
            yield e


def _end_with(process: int) -> None:
    """End this worker as soon as the process that it works for is gone.

    torch watches the worker's parent. That is the server, which lives as long as a worker does: each holds its pipe open.
    """
    try:
        watched = select.poll()
        watched.register(os.pidfd_open(process), select.POLLIN)
    except ProcessLookupError:
        os._exit(1)
    except OSError:
        # a sandbox that knows no such descriptors: there workers of a killed process stay
        return

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


def _while_workers_live(batches: Iterator[Any]) -> Iterator[Any]:
    """Pass batches on. Raises Failure where the system has killed a worker, which torch reports in errors of many kinds."""
    try:
        yield from batches
    except (RuntimeError, EOFError, ConnectionError, FileNotFoundError) as e:
        # the other kinds: a batch in the queue cannot be fetched from a worker that is gone
        passed_on = str(e).startswith("Caught ")
        if passed_on or (isinstance(e, RuntimeError) and not str(e).startswith("DataLoader worker")):
            raise
        raise Failure(
            "loader: a decoding process was killed, perhaps for want of memory: lower `workers` or `batch`;"
            " the last checkpoint is whole: run the same command again to go on from it"
        ) from e
