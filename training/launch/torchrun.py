"""The processes of a training stage on this machine, by torch's elastic agent: what `torchrun --standalone` does.

Without torchrun's log and stack traces, and without its end at a signal: errors and the request to stop go through files.
"""

import atexit
import contextlib
import json
import logging
import os
import secrets
import signal
import sys
import tempfile
from pathlib import Path

from longtake.datasets.errors import Failure, Interrupted
from longtake.training.config import TrainConfig
from longtake.training.launch.processes import (
    RUN_AGAIN,
    STOPPED_UNSAVED,
    Error,
    Job,
    error_of,
    raise_error,
    restart_line,
    share_of_cpus,
    signals_passed_on,
    spin_briefly,
    stop_sources,
    work,
)


def run(job: Job, config: TrainConfig) -> None:
    """Start the processes, and again where one ends badly. Raises UserError, Failure, Interrupted."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    noisy = logging.getLogger("torch.distributed.elastic")
    noisy.addHandler(logging.NullHandler())
    noisy.propagate = False
    count = config.run.launcher.processes
    with tempfile.TemporaryDirectory() as folder:
        scratch = Path(folder)
        (scratch / "job.json").write_text(json.dumps(job._asdict()))
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=count,
            run_id=secrets.token_hex(8),
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            local_addr="127.0.0.1",
            max_restarts=config.run.launcher.max_failures,
            # SIGINT and SIGTERM are ours
            signals_to_handle="SIGHUP,SIGQUIT",
            logs_specs=DefaultLogsSpecs(log_dir=folder, redirects=dict.fromkeys(range(1, count), Std.ALL)),
        )
        spin_briefly()
        os.environ.setdefault("OMP_NUM_THREADS", str(share_of_cpus(count)))
        # each attempt has its own store: in a shared one the next would find the addresses of processes that died
        os.environ |= {"PYTHONSAFEPATH": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        failures = {}
        with signals_passed_on((scratch / "stop").touch, config):
            try:
                # this package's import has imported that module too, which runpy would warn of in each process
                quiet = ("-W", "ignore::RuntimeWarning:runpy")
                module = ("-m", "longtake.training.launch.torchrun")
                elastic_launch(settings, sys.executable)(*quiet, *module, folder, os.getpid())
            except ChildFailedError as e:
                failures = e.failures
        error = _last_error(scratch)
        if failures or (error and error.final):
            # the agent ends the others with SIGTERM
            killed = {r: -f.exitcode for r, f in failures.items() if f.exitcode < 0 and -f.exitcode != signal.SIGTERM}
            raise_error(error, {rank: _how(number) for rank, number in killed.items()})
        for rank, failure in failures.items():
            error_line = _last_words(scratch, rank)
            raise Failure(
                error_line or f"training: process {rank} ended with exit code {failure.exitcode}; {RUN_AGAIN}"
            )


def _how(number: int) -> str:
    """How a process ended that was killed by signal `number`."""
    want = ", perhaps for want of memory: lower `batch`, `workers` or `processes`" if number == signal.SIGKILL else ""
    return f"was killed by signal {number}{want}"


def _last_error(scratch: Path) -> Error | None:
    notes = sorted(scratch.glob("error-*.json"))
    return Error(*json.loads(notes[-1].read_bytes())) if notes else None


def _last_words(scratch: Path, rank: int) -> str:
    """The error that a process other than the first printed before it ended itself, for example because it hung."""
    logs = sorted(scratch.glob(f"*/attempt_*/{rank}/stderr.log"))
    lines = logs[-1].read_text(errors="replace").splitlines() if logs else []
    return next((line.removeprefix("error: ") for line in reversed(lines) if line.startswith("error: ")), "")


def process(scratch: Path, parent: int) -> int:
    """One of the processes; returns its exit code. It is 0 also where another attempt would not help."""
    rank, attempt = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    stop, before = scratch / "stop", _last_error(scratch)
    if before and before.final:
        return 0

    def note(error: Error) -> None:
        file = scratch / f"note-{attempt}-{rank}"
        file.write_text(json.dumps(error))
        # the first error of an attempt counts
        with contextlib.suppress(FileExistsError):
            (scratch / f"error-{attempt:04d}.json").hardlink_to(file)

    if attempt and stop.exists():
        note(STOPPED_UNSAVED)
        return 0
    if attempt and rank == 0:
        print(restart_line(before), end="", file=sys.stderr, flush=True)
    # without the process that started it, there is nobody to work for
    stop_sources.append(lambda: stop.exists() or os.getppid() != parent)
    try:
        work(Job(**json.loads((scratch / "job.json").read_bytes())))
    except BaseException as e:
        note(error_of(e))
        return 0 if isinstance(e, Interrupted) else 1
    return 0


if __name__ == "__main__":
    code = process(Path(sys.argv[1]), int(sys.argv[2]))
    # native threads, such as torch's, have aborted a finished process while it unloaded them
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
