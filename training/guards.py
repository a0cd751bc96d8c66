"""What keeps a month of training from being lost: stop signals, stalls, losses that spike or are not finite, full memory."""

import itertools
import json
import math
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import torch
from torch import Tensor

from longtake.datasets.errors import Failure
from longtake.training import engines

Batch = Mapping[str, Any]
# parts of the errors that torch raises where the other end of a collective is gone
_BROKEN = ("gloo", "Gloo", "NCCL", "Connection closed by peer")


@contextmanager
def explain_out_of_memory(step: int, batch: Batch) -> Iterator[None]:
    """Turn an out-of-memory error into a Failure that names the batch and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in batch.items() if isinstance(v, Tensor) and v.ndim > 1)
        raise Failure(
            f"out of memory at step {step} with {shapes} on this process; lower batch, frames or size, or raise accumulate"
            " or zero_stage; the last checkpoint is whole"
        ) from e


def with_nonfinite_gradients(loss: Tensor) -> Tensor:
    """The loss, with gradients that are not finite where it is not: an infinite loss can have finite gradients."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


@dataclass
class Nonfinite:
    """Counts the updates that are left out because something is not finite, and stops where they are too many.

    The ranks whose loss is not finite write the keys of their batch to `folder/nonfinite-RANK.json`; all ranks do where
    only a gradient is not.
    """

    folder: Path
    most: int
    count: int = 0

    def record(self, step: int, name: str, here: bool, anywhere: bool, keys: Sequence[str]) -> None:
        """Count an update that is left out, because of a loss or gradient of engine `name`.

        Every rank must call it, for the same update.

        Args:
            here: the loss of this rank is not finite.
            anywhere: the loss of some rank is not finite; else only a gradient is not.

        Raises:
            Failure: more than `most` updates were left out.
        """
        self.count += 1
        rank = torch.distributed.get_rank()
        if here or not anywhere:
            cause = f"{'loss' if here else 'gradient'} of {name}"
            with (self.folder / f"nonfinite-{rank}.json").open("a") as file:
                file.write(json.dumps({"step": step, "what": cause, "keys": list(keys)}) + "\n")

        # report once all ranks have written
        torch.distributed.barrier()
        files = ", ".join(sorted(p.name for p in self.folder.glob("nonfinite-*.json")))
        trouble = f"{'loss' if anywhere else 'gradient'} of {name} is not finite at step {step}"
        if self.count > self.most:
            raise Failure(
                f"{trouble}; the batch's keys are in {self.folder} ({files}); the last checkpoint is whole: go on"
                " from it with skip_nonfinite, or begin anew with a lower lr"
            )
        if rank == 0:
            print(
                f"warning: {trouble}; update left out ({self.count} of at most {self.most}), keys in {files}",
                file=sys.stderr,
            )


@dataclass
class Spikes:
    """Reports losses of this rank far above their running mean; `folder/spikes.jsonl` names the rank and the batch.

    Only the first loss of a spike is reported. A spike does not move the mean, unless it lasts as long as the mean looks
    back: then the mean begins anew.
    """

    folder: Path
    deviations: float
    memory: int = 100  # passes that the running mean and variance look back, about
    mean: float = 0.0
    variance: float = 0.0
    passes: int = 0  # in the mean
    length: int = 0  # passes of the spike so far

    def begins(self, step: int, loss: float, keys: Sequence[str]) -> bool:
        """Take in the loss of a pass; returns whether a spike begins with it."""
        if not math.isfinite(loss):
            return False

        # a usual loss moves the mean
        if self.passes < self.memory or loss <= self.mean + self.deviations * math.sqrt(self.variance):
            self.length = 0
            self.passes += 1
            share = 1 / min(self.passes, self.memory)
            off = loss - self.mean
            self.mean += share * off
            self.variance = (1 - share) * (self.variance + share * off * off)
            return False

        # a long spike is no spike
        self.length += 1
        if self.length > self.memory:
            self.mean = self.variance = 0.0
            self.passes = self.length = 0
        if self.length != 1:
            return False

        rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
        record: dict[str, Any] = {"step": step, "rank": rank}
        record |= {"loss": loss, "mean": self.mean, "deviation": math.sqrt(self.variance), "keys": list(keys)}
        # all ranks write there: a line must go at once
        with (self.folder / "spikes.jsonl").open("ab", buffering=0) as file:
            file.write((json.dumps(record) + "\n").encode())
        return True


def ask_ranks(flags: Sequence[Any], numbers: Sequence[Any] = ()) -> tuple[list[bool], list[float]]:
    """For each flag whether it is set on any rank; and this rank's `numbers`. Every rank must call it.

    Both may be tensors of one element on the device. The host waits for the device once, however many there are.
    """
    device = engines.device()

    def stacked(values: Sequence[Any]) -> Tensor:
        # a number of the host is written by a kernel: a copy of it would wait for all before it
        tensors = [v if isinstance(v, Tensor) else torch.full((), float(v), device=device) for v in values]
        return torch.stack([t.double() for t in tensors]) if tensors else torch.zeros(0, device=device)

    asked = stacked(flags)
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(asked, torch.distributed.ReduceOp.MAX)
    told = torch.cat([asked, stacked(numbers)]).tolist()
    return [bool(value) for value in told[: len(flags)]], told[len(flags) :]


@contextmanager
def stop_signal(seconds: float, also: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Yields whether this process is asked to stop, by SIGINT, SIGTERM or `also`; a second SIGINT kills at once.

    A process that has not finished `seconds` after the signal exits with code 1: a scheduler kills soon after, and half a
    checkpoint costs nothing.
    """
    signals: list[int] = []
    order = itertools.count()
    deadline = threading.Timer(seconds, _give_up, [seconds])
    deadline.daemon = True

    def note(number: int, _: Any) -> None:
        # the next signal may come in the middle of this: `append` and `next` cannot be interrupted, and take no lock
        signals.append(number)
        if next(order) == 0:
            deadline.start()
        # SIGTERM may come several times: from a launcher, from a parent, and to the whole group
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    # a thread of a Ray worker cannot take signals
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield lambda: bool(signals) or also()
    finally:
        deadline.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


def _give_up(seconds: float) -> None:
    _exit(f"could not save within stop_seconds ({seconds:g}); the last checkpoint is whole")


def _exit(error: str, pause: Callable[[], Any] = lambda: None) -> NoReturn:
    """End this process from a thread, with exit code 1, some time after its error is printed."""
    print(f"error: train: {error}", file=sys.stderr)
    sys.stderr.flush()
    pause()
    os._exit(1)


class _Beat(NamedTuple):
    """The last beat of a rank: how many it has made, and the step and part that began with it."""

    number: int
    step: int
    part: str

    def __str__(self) -> str:
        return f"at step {self.step} in {self.part}"


class Watchdog:
    """Ends a process that hangs, and says which ranks are missing; a context.

    All ranks make the same beats in one order, and each leaves its last one in the store that they share. A rank that
    waits in a collective for another that is dead, stuck or slow finds there who has not come as far as itself.

    Args:
        seconds: without a beat, after which the process ends.

    Raises:
        Failure: at the end of the context, where the connection to another process broke.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds, self._interval = seconds, min(1.0, seconds / 4)
        self._rank, self._world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        self._store = engines.store()
        self._last, self._time = _Beat(0, 0, "start"), time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            if isinstance(error, RuntimeError) and any(mark in str(error) for mark in _BROKEN):
                self._pause()  # in which the living ranks report where they stand
                behind = self._behind() or "no rank is known to be behind"
                raise Failure(
                    f"another process is gone, {self._last} ({_line(error)}); {behind}; the last checkpoint is whole:"
                    " run the same command again"
                ) from error
        finally:
            self._ended.set()
            self._thread.join()

    def beat(self, step: int, part: str) -> None:
        """Note that a part of a step begins."""
        self._last, self._time = _Beat(self._last.number + 1, step, part), time.monotonic()

    def _pause(self) -> None:
        self._ended.wait(2 * self._interval)

    def _watch(self) -> None:
        sent = None
        while not self._ended.wait(self._interval):
            stalled = time.monotonic() - self._time > self._seconds
            last, trouble = self._last, ""
            try:
                if last != sent and self._world > 1:
                    self._store.set(f"longtake/beat/{self._rank}", json.dumps([*last, socket.gethostname()]))
                    sent = last
            except RuntimeError as e:
                trouble = _unreachable(e)
            if stalled:
                where = f"no step for {self._seconds:g} s (stall_seconds): rank {self._rank} stands {last}"
                behind = trouble or self._behind()
                where += f"; {behind}" if behind else ""
                # give the other ranks time to report their position before this connection breaks
                _exit(f"{where}; the last checkpoint is whole: run the same command again", self._pause)

    def _behind(self) -> str:
        """Which ranks have made fewer beats than this one, and where they were last seen; empty where there are none."""
        ranks = []
        try:
            for rank in range(self._world):
                key = f"longtake/beat/{rank}"
                if rank == self._rank:
                    continue
                if not self._store.check([key]):
                    ranks.append(f"rank {rank} never began")
                    continue
                *last, host = json.loads(self._store.get(key))
                beat = _Beat(*last)
                if beat.number < self._last.number:
                    ranks.append(f"rank {rank} on {host} is missing, last seen {beat}")
        except RuntimeError as e:
            return _unreachable(e)
        return "; ".join(ranks[:8]) + (f"; and {len(ranks) - 8} more" if len(ranks) > 8 else "")


def _unreachable(e: Exception) -> str:
    return f"rank 0, which keeps the ranks' store, cannot be reached ({_line(e)})"


def _line(e: BaseException) -> str:
    return str(e).splitlines()[0]
