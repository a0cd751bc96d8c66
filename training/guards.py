"""What keeps a month of training from being lost: stop signals, stalls, losses that are not finite or leap, full memory."""

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
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.errors import Failure
from longtake.training import engines

Batch = Mapping[str, Any]


@contextmanager
def memory_told(step: int, batch: Batch) -> Iterator[None]:
    """Say which batch did not fit, and what to lower."""
    try:
        yield
    except torch.OutOfMemoryError as e:
        shapes = ", ".join(f"{k} {tuple(v.shape)}" for k, v in batch.items() if isinstance(v, Tensor) and v.ndim > 1)
        raise Failure(
            f"out of memory at step {step} with {shapes} on this process; lower batch, frames or size, or raise accumulate"
            " or zero_stage; the last checkpoint is whole"
        ) from e


def contagious(loss: Tensor) -> Tensor:
    """The loss, with gradients that are not finite if it is not: an infinite one can have finite gradients."""
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


@dataclass
class Nonfinite:
    """Counts the updates that were left out because something was not finite, and stops where they are too many.

    The batch's keys are in `folder/nonfinite-RANK.json`, written by the ranks whose loss was not finite, or by all where
    only a gradient was not.
    """

    folder: Path
    most: int
    count: int = 0

    def heed(self, step: int, name: str, here: bool, anywhere: bool, keys: Sequence[str]) -> None:
        """Note that a loss of engine `name` was not finite on this rank, or `anywhere`, or else only a gradient was not.

        Every rank must call it, for the same update.

        Raises:
            Failure: more than `most` so far.
        """
        self.count += 1
        rank = torch.distributed.get_rank()
        if here or not anywhere:
            found = {"step": step, "what": f"{'loss' if here else 'gradient'} of {name}", "keys": list(keys)}
            with (self.folder / f"nonfinite-{rank}.json").open("a") as file:
                file.write(json.dumps(found) + "\n")
        torch.distributed.barrier()
        files = ", ".join(sorted(p.name for p in self.folder.glob("nonfinite-*.json")))
        said = f"{'loss' if anywhere else 'gradient'} of {name} is not finite at step {step}"
        if self.count > self.most:
            raise Failure(
                f"{said}; the batch's keys are in {self.folder} ({files}); the last checkpoint is whole: lower lr and go on,"
                " or allow some with skip_nonfinite"
            )
        if rank == 0:
            print(
                f"warning: {said}; update left out ({self.count} of at most {self.most}), keys in {files}",
                file=sys.stderr,
            )


@dataclass
class Spikes:
    """Reports losses of this rank far above their running mean; `folder/spikes.jsonl` names the rank and the batch.

    Of losses that leap one after the other only the first is reported. They do not move the mean, unless they stay up for
    as long as it looks back: then it begins anew.
    """

    folder: Path
    deviations: float
    memory: int = 100  # passes that the running mean and variance look back, about
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    leaps: int = 0

    def heed(self, step: int, loss: float, keys: Sequence[str]) -> bool:
        """Whether the loss of this pass begins to leap."""
        if not math.isfinite(loss):
            return False
        if self.seen >= self.memory and loss > self.mean + self.deviations * math.sqrt(self.variance):
            self.leaps += 1
            if self.leaps > self.memory:
                self.mean = self.variance = 0.0
                self.seen = self.leaps = 0
            if self.leaps != 1:
                return False
            rank = torch.distributed.get_rank() if torch.distributed.is_initialized() else 0
            found: dict[str, Any] = {"step": step, "rank": rank}
            found |= {"loss": loss, "mean": self.mean, "deviation": math.sqrt(self.variance), "keys": list(keys)}
            # all ranks write there: a line must go at once
            with (self.folder / "spikes.jsonl").open("ab", buffering=0) as file:
                file.write((json.dumps(found) + "\n").encode())
            return True
        self.leaps = 0
        self.seen += 1
        share = 1 / min(self.seen, self.memory)
        off = loss - self.mean
        self.mean += share * off
        self.variance = (1 - share) * (self.variance + share * off * off)
        return False


def on_any_rank(*here: Any) -> list[bool]:
    """For each flag whether it is set on any rank. Every rank must call it."""
    flags = torch.stack([torch.as_tensor(flag, dtype=torch.float32, device=engines.device()) for flag in here])
    if torch.distributed.get_world_size() > 1:
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
    return flags.bool().tolist()


@contextmanager
def stop_signal(seconds: float, also: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    """Whether this process was told to stop, by SIGINT, SIGTERM or `also`; a second SIGINT kills at once.

    Whoever is not done `seconds` after the signal is ended, with exit code 1: a scheduler kills soon after, and half a
    checkpoint costs nothing.
    """
    came = threading.Event()
    alarm: list[threading.Timer] = []

    def give_up() -> None:
        print(
            f"error: train: could not save within stop_seconds ({seconds:g}); the last checkpoint is whole",
            file=sys.stderr,
        )
        sys.stderr.flush()
        os._exit(1)

    def note(number: int, _: Any) -> None:
        if not came.is_set():
            alarm.append(threading.Timer(seconds, give_up))
            alarm[-1].daemon = True
            alarm[-1].start()
        came.set()
        # of SIGTERM several may come at once: from a launcher, from a parent, and to the whole group
        if number == signal.SIGINT:
            signal.signal(number, signal.SIG_DFL)

    # a thread of a Ray worker cannot take signals
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
    try:
        yield lambda: came.is_set() or also()
    finally:
        for timer in alarm:
            timer.cancel()
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def watchdog(seconds: float) -> Iterator[Callable[[int, str], None]]:
    """Yields `beat(step, what)`, to be called as work goes on; where none comes for `seconds`, says who is missing and ends.

    Each rank leaves the number of its last beat in the store that all share; all ranks make the same beats, in one order.
    So one that waits in a collective for another that is dead, stuck or slow finds there who has not come as far as itself.

    Raises:
        Failure: the connection to another process broke.
    """
    rank, world, shared = torch.distributed.get_rank(), torch.distributed.get_world_size(), engines.store()
    state: list[Any] = [0, 0, "start", time.monotonic()]
    done, pause = threading.Event(), min(1.0, seconds / 4)

    def beat(step: int, what: str) -> None:
        state[:] = [state[0] + 1, step, what, time.monotonic()]

    def look() -> None:
        sent = None
        while not done.wait(pause):
            *now, at = state
            stalled = time.monotonic() - at > seconds
            try:
                if now != sent and world > 1:
                    shared.set(f"longtake/beat/{rank}", json.dumps([*now, socket.gethostname()]))
                    sent = now
                behind = _behind(shared, rank, world, now[0]) if stalled else ""
            except RuntimeError as e:
                behind = _unreachable(e)
            if not stalled:
                continue
            stood = f"no step for {seconds:g} s (stall_seconds): rank {rank} stands at step {now[1]} in {now[2]}"
            why = f"{stood}; {behind}" if behind else stood
            print(f"error: train: {why}; the last checkpoint is whole: run the same command again", file=sys.stderr)
            sys.stderr.flush()
            # the others shall be able to say where they stand, before their connections to this one break
            done.wait(2 * pause)
            os._exit(1)

    thread = threading.Thread(target=look, name="watchdog", daemon=True)
    thread.start()
    try:
        yield beat
    except RuntimeError as e:
        # how torch reports a collective whose other end is gone
        if not any(mark in str(e) for mark in ("gloo", "Gloo", "NCCL", "Connection closed by peer")):
            raise
        # those that live say in this time how far they are
        done.wait(2 * pause)
        try:
            behind = _behind(shared, rank, world, state[0])
        except RuntimeError as lost:
            behind = _unreachable(lost)
        who = behind or "no rank is known to be behind"
        raise Failure(
            f"another process is gone, at step {state[1]} in {state[2]} ({_line(e)}); {who}; the last checkpoint is whole:"
            " run the same command again"
        ) from e
    finally:
        done.set()
        thread.join()


def _line(e: Exception) -> str:
    return str(e).splitlines()[0]


def _unreachable(e: Exception) -> str:
    return f"rank 0, which keeps the ranks' store, cannot be reached ({_line(e)})"


def _behind(shared: Any, rank: int, world: int, beats: int) -> str:
    """Which ranks have made fewer than `beats`, and where they were seen last; nothing where there are none."""
    found = []
    for other in range(world):
        key = f"longtake/beat/{other}"
        if other == rank:
            continue
        if not shared.check([key]):
            found.append(f"rank {other} never began")
            continue
        count, step, what, host = json.loads(shared.get(key))
        if count < beats:
            found.append(f"rank {other} on {host} is missing, last seen at step {step} in {what}")
    return "; ".join(found[:8]) + (f"; and {len(found) - 8} more" if len(found) > 8 else "")
