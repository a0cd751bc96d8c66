"""Starting a training stage's processes: in this process, by torchrun, by Ray, or where a launcher has started us.

Each process calls the stage's `work(config, inputs, folder)` inside a process group; the result is in the checkpoint
folder. A crash, a Failure or a killed process is started again, at most `max_failures` times, from the last checkpoint; a
UserError is not. Only the first error of an attempt is reported, not the ones it causes.
"""

import atexit
import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from longtake.datasets import environment
from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.training.config import TrainConfig
from longtake.training.launch import preflight, ray, torchrun
from longtake.training.launch.processes import Error, Job, error_of, stop_requested, work

__all__ = ["FailedElsewhere", "launched", "run", "share", "stop_requested", "together"]

T = TypeVar("T")
_SHARED, _ERROR, _PRINTED = "longtake/shared", "longtake/error", "longtake/printed"
_DAY = 86400.0

_shares = itertools.count()  # every rank shares the same, in the same order

_end_group: Callable[[], None] | None = None  # ends the process group of ranks that a launcher has started


def launched() -> bool:
    """Whether a launcher, such as torchrun or deepspeed, has started this process beside others."""
    return environment.ranks()[1] > 1


def run(module: str, config: TrainConfig, inputs: Mapping[str, str], folder: Path) -> bool:
    """Do the stage's work in the processes of `config.run.launcher`; returns when all have ended well.

    Args:
        module: name of the stage's module, which has `Config` and `work`.
        folder: of checkpoints; on a disk that all processes share.

    Returns:
        Whether this is the process that continues with the result: of processes that a launcher has started, only rank 0
        does.

    Raises:
        UserError, Failure, Interrupted: as `work` raised it in some process.
    """
    job = Job.of(module, config, inputs, folder)
    if os.environ.get("RANK", "0") == "0":
        preflight.check(config)
    if launched():
        if config.run.launcher.by != "process":
            raise UserError(
                f"run.launcher: by {config.run.launcher.by}, but a launcher has started {os.environ['WORLD_SIZE']} of this"
                " process already; leave run.launcher out, or start the stage by `longtake` alone"
            )
        work(job)
        if _end_group:
            # all ranks at once, since some backends end a group by a collective
            _end_group()
        return os.environ["RANK"] == "0"
    {"process": _here, "torchrun": torchrun.run, "ray": ray.run}[config.run.launcher.by](job, config)
    return True


def _here(job: Job, _: TrainConfig) -> None:
    work(job)


class FailedElsewhere(Failure):
    """Another process of the job prints the error; this one ends with the same exit code."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.code = 2 if error.kind == "UserError" else 1


@contextlib.contextmanager
def together() -> Iterator[int]:
    """The rank of this process among those that a launcher has started; 0 where there is none. May be nested.

    Raises:
        FailedElsewhere, Interrupted: in place of this rank's own error, where another rank has met one first.
    """
    global _end_group
    if not launched():
        yield 0
        return
    from longtake.training import engines

    with contextlib.ExitStack() as group:
        # the loop's watchdog has the patience that the stage's config asks for
        rank, _ = group.enter_context(engines.process_group(_DAY))
        outer, _end_group = _end_group, _end_group or group.close
        store = engines.store()
        try:
            yield rank
        except BaseException as e:
            first = _earlier_error(store, rank, error_of(e))
            if first is None:
                raise
            _wait_until_printed(store)
            raise Interrupted if first.kind == "Interrupted" else FailedElsewhere(first) from e
        finally:
            _end_group = outer


def _earlier_error(store: Any, rank: int, error: Error) -> Error | None:
    """The error that another rank reported before this one; None where this rank's is the first, which it now reports."""
    try:
        number, *first = json.loads(store.compare_set(_ERROR, "", json.dumps([rank, *error])))
    except (RuntimeError, ValueError):
        # rank 0 keeps the store, and has gone with it
        return None if rank == 0 else Error("Failure", "rank 0 has ended")
    if number != rank:
        return Error(*first)
    atexit.register(_note_printed, store)
    return None


def _note_printed(store: Any) -> None:
    with contextlib.suppress(RuntimeError):
        store.set(_PRINTED, "yes")


def _wait_until_printed(store: Any) -> None:
    """Wait until the rank that failed first has printed its error: launchers kill all ranks once one exits."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(RuntimeError):
        store.wait([_PRINTED], timedelta(seconds=10))


def share(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, plain data, on every rank; it is called on rank 0 alone. Inside `together`.

    Raises:
        FailedElsewhere: on the other ranks, where `make` has raised.
    """
    if not launched():
        return make()
    from longtake.training import engines

    store, key = engines.store(), f"{_SHARED}/{next(_shares)}"
    if os.environ["RANK"] != "0":
        while not store.check([key]):
            # waiting in the store itself would be deaf to signals
            time.sleep(0.05)
        value = json.loads(store.get(key))
        if value is None:
            raise FailedElsewhere(Error("Failure", "rank 0 has failed"))
        return value[0]
    try:
        value = make()
    except BaseException as e:
        _earlier_error(store, 0, error_of(e))
        store.set(key, "null")
        raise
    store.set(key, json.dumps([value]))
    return value
