"""Environment variables of shells, launchers, batch systems and container images: read as they are meant, or refused in a line.

Light to import: it runs before everything else.
"""

import os
import re
import socket
import sys
import tempfile
from pathlib import Path
from urllib.parse import urlsplit

from longtake.datasets.errors import UserError

# a socket's path may have 107 bytes; Ray adds FOLDER/ray/session_2026-01-31_23-59-59_123456_1234567/sockets/plasma_store
_SOCKET, _SESSION = 107, 70
_SECONDS = 10.0  # for a server to take a connection

# set but empty means the same as not set
_EMPTY_IS_UNSET = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"),
    *("OMP_NUM_THREADS", "TMPDIR", "RAY_ADDRESS", "RAY_TMPDIR", "MLFLOW_TRACKING_URI", "LONGTAKE_CACHE"),
)
# the local rank under the names of launchers other than torchrun
_LOCAL_RANKS = ("SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK", "MPI_LOCALRANKID", "PMI_LOCAL_RANK", "PALS_LOCAL_RANKID")


def tidy() -> None:
    """Drop variables that are set but empty, and put a null device where a standard stream is closed.

    Otherwise a file that is opened later gets the closed stream's number, and a library's prints go into it.
    """
    for name in _EMPTY_IS_UNSET:
        if os.environ.get(name) == "":
            del os.environ[name]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            null = os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(number, "r" if number == 0 else "w", closefd=False))


def ranks() -> tuple[int, int]:
    """(rank, world size) as a launcher has set them, (0, 1) without one; sets LOCAL_RANK where a launcher does not.

    Raises:
        UserError: the variables do not describe a process among others.
    """
    world, rank = _number("WORLD_SIZE", 1), _number("RANK", 0)
    if world < 1:
        raise UserError(f"WORLD_SIZE={world}: is no number of processes; set it as torchrun does, or unset it")
    if world > 1:
        for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
            if name not in os.environ:
                raise UserError(
                    f"{name} is not set, but WORLD_SIZE={world} says that this process has others beside it; set it as"
                    " torchrun does, or unset WORLD_SIZE"
                )
        if not 0 < _number("MASTER_PORT", 0) < 1 << 16:
            raise UserError(f"MASTER_PORT={os.environ['MASTER_PORT']}: is no port; set one from 1 to 65535")
    if not 0 <= rank < world:
        raise UserError(
            f"RANK={rank}: is not one of the {world} that WORLD_SIZE says there are; set both, or unset both"
        )
    if _number("LOCAL_RANK", 0) < 0:
        raise UserError(f"LOCAL_RANK={os.environ['LOCAL_RANK']}: is no rank; set it as torchrun does, or unset it")
    if "LOCAL_RANK" not in os.environ and "WORLD_SIZE" in os.environ:
        # Kubeflow and others start one process in each pod
        os.environ["LOCAL_RANK"] = str(next((_number(name, 0) for name in _LOCAL_RANKS if os.environ.get(name)), 0))
    return rank, world


def threads() -> int | None:
    """OMP_NUM_THREADS, or the first of its list of nested levels; None where it is not set.

    Raises:
        UserError: it is no number.
    """
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0].strip()
    if text and not (text.isdecimal() and int(text)):
        raise UserError(
            f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']}: is no number of threads; set one, or unset it"
        )
    return int(text) if text else None


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "").strip()
    if text and not re.fullmatch(r"-?\d+", text):
        raise UserError(f"{name}={text}: is no number; set it as torchrun does, or unset it")
    return int(text) if text else default


def ray_address() -> str:
    """RAY_ADDRESS, or "local" for a new Ray, whose folder of sockets is then made short enough.

    Raises:
        UserError: no server takes connections there. Ray itself would wait for a quarter of an hour.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    if address == "local":
        _shorten_ray_folder()
    elif problem := silent_ray(address):
        raise UserError(problem)
    return address


def silent_ray(address: str) -> str | None:
    """Why a Ray cluster at HOST:PORT or ray://HOST:PORT takes no connection; None where it does."""
    if address in ("auto", "local"):
        return None
    parts = urlsplit(address if "://" in address else f"//{address}")
    try:
        host, port = parts.hostname or "", parts.port
    except ValueError:
        host, port = "", None
    if not host or port is None or parts.scheme not in ("", "ray"):
        return f"RAY_ADDRESS={address}: is no address of a Ray cluster; give HOST:PORT, such as head:6379, or unset it"
    try:
        with socket.create_connection((host, port), timeout=_SECONDS):
            return None
    except OSError as e:
        return (
            f"RAY_ADDRESS={address}: no Ray cluster answers ({e.strerror or e}); start it (`ray start --head`), or unset"
            " RAY_ADDRESS for one on this machine"
        )


def long_folder() -> str | None:
    """The temporary folder, if its path is too long for Ray's sockets; None if it fits."""
    folder = os.environ.get("RAY_TMPDIR") or tempfile.gettempdir()
    return folder if len(os.fsencode(folder)) + _SESSION > _SOCKET else None


def _shorten_ray_folder() -> None:
    """Give Ray /tmp where TMPDIR is too long for its sockets. Raises UserError where /tmp cannot be used."""
    folder = long_folder()
    if folder is None:
        return
    short = Path("/tmp")  # noqa: S108
    if "RAY_TMPDIR" in os.environ or not os.access(short, os.W_OK | os.X_OK):
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise UserError(
            f"{name}={folder}: has {len(os.fsencode(folder))} bytes, Ray's sockets allow {_SOCKET - _SESSION};"
            " set RAY_TMPDIR to a shorter folder"
        )
    os.environ["RAY_TMPDIR"] = str(short)
    print(f"Ray: {folder} is too long for its sockets; they are in {short} (RAY_TMPDIR)", file=sys.stderr)
