"""The process group: joined and left by all ranks, with a store that they share."""

import ctypes
import importlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

from longtake.datasets import environment
from longtake.datasets.errors import Failure, UserError

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # of mallopt(3)
QUIET = 10.0  # seconds that a rank waits for the others before it says so


@contextmanager
def process_group(stall_seconds: float = 1800.0) -> Iterator[tuple[int, int]]:
    """Join the ranks; yields (rank, world size). The variables of torchrun or Ray Train describe the group.

    A process alone needs no port. An existing group is used as it is. `stall_seconds` is how long a collective waits.

    Raises:
        UserError: MASTER_PORT is taken.
    """
    rank, world = environment.ranks()
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        _keep_freed_memory()
    else:
        torch.cuda.set_device(device())
    # here, before a tracker's thread imports MLflow, which `without` hides
    with _compiler_noise_hidden(), without("mlflow"):
        importlib.import_module("deepspeed")
    if torch.distributed.is_initialized():
        with _linear_kept():
            yield torch.distributed.get_rank(), torch.distributed.get_world_size()
        return
    backend = "nccl" if gpu else "gloo"
    # one process alone needs no port, whatever else its scheduler has set
    launched = world > 1
    # longer than the loop's watchdog, which says who is missing
    patience = timedelta(seconds=1.5 * stall_seconds + 30)
    variables = {"RANK": "0", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"), "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in variables}
    if launched:
        shared = _joined_store(rank, world, patience)
        torch.distributed.init_process_group(backend, store=shared, rank=rank, world_size=world, timeout=patience)
    else:
        os.environ |= variables
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        with _linear_kept():
            yield torch.distributed.get_rank(), torch.distributed.get_world_size()
        _leave()
    finally:
        _destroy_group()
        for name, value in before.items():
            if value is None and not launched:
                del os.environ[name]


def _keep_freed_memory() -> None:
    """Let a training on a CPU use freed memory again: by default glibc gives that of large tensors back to the system.

    To fault its pages in anew takes 1 % of a step, and a tenth with ZeRO, which makes large buffers. Blocks of 32 MiB and
    more still go back: holes of theirs would be expensive.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)


@contextmanager
def _linear_kept() -> Iterator[None]:
    """Put PyTorch's linear function back: ZeRO 3 replaces it for good, by one that TorchScript cannot save."""
    linear = torch.nn.functional.linear
    try:
        yield
    finally:
        torch.nn.functional.linear = linear


def _joined_store(rank: int, world: int, patience: timedelta) -> torch.distributed.Store:
    """The ranks' store, once all have joined. Waits in a thread, so that signals arrive, and prints what it waits for.

    Raises:
        UserError: MASTER_PORT is taken.
        Failure: the others have not joined.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    outcome: list[Any] = []

    def join() -> None:
        try:
            outcome.append(next(rendezvous("env://", rank, world, timeout=patience))[0])
        except BaseException as e:
            outcome.append(e)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(QUIET)
    if not outcome:
        print(f"training: rank {rank} waits for the others of {world} at {place}", file=sys.stderr, flush=True)
    while not outcome:
        thread.join(0.5)
    if isinstance(outcome[0], torch.distributed.DistNetworkError):
        port = os.environ.get("MASTER_PORT")
        raise UserError(
            f"MASTER_PORT={port}: cannot be used ({str(outcome[0]).splitlines()[0]}); set MASTER_PORT to a free port"
        ) from outcome[0]
    if isinstance(outcome[0], torch.distributed.DistError):
        raise Failure(
            f"training: rank {rank} did not meet the others of {world} at {place} ({str(outcome[0]).splitlines()[0]})"
        ) from outcome[0]
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    # as init_process_group does with a store that it opens itself
    outcome[0].set_timeout(patience)
    return torch.distributed.PrefixStore("default_pg", outcome[0])


def _leave(seconds: float = 60.0) -> None:
    """Let rank 0, which keeps the ranks' store, leave last: others may still read in it."""
    shared, key, end = store(), "longtake/left", time.monotonic() + seconds
    if torch.distributed.get_rank() != 0:
        # the work is done, even if rank 0 is gone
        with suppress(RuntimeError):
            shared.add(key, 1)
        return
    others = torch.distributed.get_world_size() - 1
    while shared.add(key, 0) < others and time.monotonic() < end:
        time.sleep(0.01)


def _destroy_group() -> None:
    """End the group for DeepSpeed too, which remembers it: the next training in this process needs another."""
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None and comm.cdb is not None:
        comm.destroy_process_group()
    else:
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    """This rank's GPU, or the CPU."""
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def store() -> Any:
    """The key-value store that the ranks of the process group share; threads may use it while collectives run."""
    return torch.distributed.distributed_c10d._get_default_store()


def alone(name: str, action: Callable[[], None]) -> None:
    """Do something on the first rank, while the others wait for as long as it takes: a collective would give up.

    Every rank calls it, with a name that is used once.

    Raises:
        Failure: on the other ranks, where it has failed on the first, which raises its own error.
    """
    shared, key = store(), f"longtake/alone/{name}"
    if torch.distributed.get_rank() == 0:
        outcome = "rank 0 has failed"
        try:
            action()
            outcome = ""
        except Exception as e:
            outcome = str(e) or type(e).__name__
            raise
        finally:
            shared.set(key, outcome)
        return
    # polled, since waiting would be deaf to signals, and would keep the store from other threads
    while not shared.check([key]):
        time.sleep(0.05)
    if error := shared.get(key).decode():
        raise Failure(error)


@contextmanager
def _compiler_noise_hidden() -> Iterator[None]:
    """Hide stderr: DeepSpeed tries at import what it could compile, and the linker complains."""
    sys.stderr.flush()
    stderr, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(null)


@contextmanager
def without(package: str) -> Iterator[None]:
    """Hide a package from imports: DeepSpeed's autotuner would import MLflow, which takes seconds."""
    if package in sys.modules or "deepspeed" in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]
