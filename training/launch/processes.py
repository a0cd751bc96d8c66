"""What the launchers of a training stage share: the job, the errors that cross from process to process, requests to stop."""

import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import environment
from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.datasets.masking import shown
from longtake.training.config import TrainConfig

RUN_AGAIN = "the last checkpoint is whole: run the same command again to go on from it"  # the end of an error's message

stop_sources: list[Callable[[], bool]] = []  # each says whether its launcher asks this process to stop
_TYPES: dict[str, type[Exception]] = {"UserError": UserError, "Failure": Failure, "Interrupted": Interrupted}


class Job(NamedTuple):
    """What each process of a stage needs, as plain data."""

    module: str  # the stage's, with `Config` and `work`
    config: dict[str, Any]
    inputs: dict[str, str]
    folder: str  # of checkpoints

    @classmethod
    def of(cls, module: str, config: TrainConfig, inputs: Mapping[str, str], folder: Path) -> "Job":
        return cls(module, config.model_dump(mode="json"), dict(inputs), str(folder.absolute()))


class Error(NamedTuple):
    """An error that crosses from one process to another."""

    kind: str  # a name of ours, or that of another exception
    message: str
    trace: str = ""
    final: bool = False  # another attempt would not help


SPINNING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # environment variables of how threads wait
STOPPED_UNSAVED = Error(
    "Failure", f"training: was to stop, but a process ended without saving; {RUN_AGAIN}", final=True
)


def stop_requested() -> bool:
    """Whether this process is asked to save and stop, other than by a signal to itself."""
    return any(source() for source in stop_sources)


def spin_briefly() -> None:
    """Let torch's threads sleep soon where they wait for each other, in this process and its children.

    By default GCC's OpenMP lets them spin for 300,000 rounds, which takes cores from other work. On two cores, steps a
    second of a tiny PV-VAE alone and beside two busy processes: 7.8 and 1.6; with 10,000 rounds 7.5 and
    2.4; asleep at once 5.8 and 3.6. A user's own setting stays. Of no effect once torch is imported.
    """
    for name in SPINNING:
        if not os.environ.get(name):
            os.environ.pop(name, None)
    if not any(name in os.environ for name in SPINNING):
        os.environ["GOMP_SPINCOUNT"] = "10000"


def work(job: Job) -> None:
    """Do one process's part of a job, in the process group that its environment describes."""
    import torch

    from longtake.training.engines import process_group

    module = importlib.import_module(job.module)
    config = module.Config.model_validate(job.config)
    torch.set_num_threads(environment.threads() or share_of_cpus(processes_here()))
    with process_group(config.run.stall_seconds):
        module.work(config, job.inputs, Path(job.folder))


def processes_here() -> int:
    """Ranks on this machine."""
    # the names that torchrun and the deepspeed launcher use
    return int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)


def share_of_cpus(processes: int) -> int:
    return max(1, (os.cpu_count() or 1) // processes)


def error_of(e: BaseException) -> Error:
    """An exception in the form that crosses between processes."""
    if isinstance(e, KeyboardInterrupt | SystemExit):
        e = Interrupted("training: stopped")
    kind = next((name for name, type_ in _TYPES.items() if isinstance(e, type_)), type(e).__name__)
    trace = "" if kind in _TYPES else "".join(traceback.format_exception(e))
    return Error(kind, str(e), trace, final=kind in ("UserError", "Interrupted"))


def raise_error(error: Error | None, dead: Mapping[int, str]) -> None:
    """Raise the error that ended a job: a final one first, then a process that died, then errors that this may have caused.

    `dead` says by rank how a process died.
    """
    if dead and not (error and error.final):
        rank, how = next(iter(dead.items()))
        raise Failure(f"training: process {rank} {how}; {RUN_AGAIN}")
    if error and error.kind in _TYPES:
        raise _TYPES[error.kind](error.message)
    if error:
        print(shown(error.trace), file=sys.stderr)
        raise Failure(f"training: {error.kind}: {error.message}; the lines above say where")


def restart_line(error: Error | None) -> str:
    """The line to print when a job's processes are started again, after this error."""
    cause = f"{error.kind}: {error.message}" if error else "a process died"
    return f"\ntraining: starting again from the last checkpoint ({' '.join(cause.split())})\n"


@contextlib.contextmanager
def signals_passed_on(stop: Callable[[], Any], config: TrainConfig) -> Iterator[None]:
    """Turn SIGINT and SIGTERM into a request to the other processes to save and stop.

    Raises:
        Failure: they have not stopped some time after `stop_seconds`.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def note(*_: Any) -> None:
        stop()
        # the processes' own limit comes first, and they know more
        signal.setitimer(signal.ITIMER_REAL, config.run.stop_seconds + 30)

    def late(*_: Any) -> None:
        raise Failure(f"training: has not stopped {config.run.stop_seconds:g} s after the signal; {RUN_AGAIN}")

    handlers: dict[int, Any] = {signal.SIGINT: note, signal.SIGTERM: note, signal.SIGALRM: late}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
