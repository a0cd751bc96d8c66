"""Read sources from their stores, whole or in part.

A source that its store does not have, will not give, or fails to give whole is `Unread`. A fault of this machine (a full
disk, expired credentials) is not the source's, and is raised as it is.
"""

import contextlib
import errno
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from time import monotonic
from typing import Any

from fsspec.callbacks import Callback

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown

_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# the errors of botocore and S3 for credentials that the user has to renew
_RENEWABLE = """ExpiredToken ExpiredTokenException InvalidAccessKeyId InvalidClientTokenId RequestTimeTooSkewed
SignatureDoesNotMatch TokenRefreshRequired NoCredentialsError PartialCredentialsError TokenRetrievalError"""
_OUR_CREDENTIALS = frozenset(_RENEWABLE.split())
# a server that gives less than this does not give the source: one byte a minute would be no silence
_SLOW_SECONDS, _SLOW_BYTES = 600.0, 600 << 10


class Unread(Exception):
    """Why a source was not read: one of schema.UNREAD or `too_large`, and a line for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, shown(storage.printable(" ".join(detail.split())))


def fetch(
    uri: str, target: Path, most_bytes: int, attempts: int = 5, memory: Mapping[str, bytes] | None = None
) -> Path:
    """A local copy of a source: the file itself where it is local, else `target`.

    Args:
        attempts: for errors that may pass.
        memory: contents of sources that only the driver can see.

    Raises:
        Unread: it is missing, is not given, or has more than `most_bytes`.
        Failure, OSError: this machine is at fault.
    """
    with _as_unread():
        fs, path = storage.filesystem(uri)
        if memory and uri in memory:
            target.write_bytes(memory[uri])
        elif storage.is_local(uri):
            target = _regular(path, most_bytes)
        else:
            storage.retrying(uri, lambda: _download(fs, path, target, most_bytes), attempts)
    return target


def _regular(path: str, most_bytes: int) -> Path:
    """A local file that can be opened. Raises Unread, OSError."""
    file = Path(path)
    status = file.stat()
    if stat.S_ISDIR(status.st_mode):
        # listed because it could not be read
        next(file.iterdir(), None)
        raise Unread("missing", "a folder, whose videos are sources of their own")
    if not stat.S_ISREG(status.st_mode):
        raise Unread("refused", "not a file but a pipe, socket or device")
    if status.st_size > most_bytes:
        raise Unread("too_large", f"{status.st_size} bytes; limits.max_bytes is {most_bytes}")
    with file.open("rb"):
        return file


def _download(fs: Any, path: str, target: Path, most_bytes: int) -> None:
    progress = _Bounded(most_bytes)
    fs.get_file(path, str(target), callback=progress)
    if not target.is_file():
        raise FileNotFoundError(errno.ENOENT, "not a file")
    # HTTP may compress on the way, and its client has compared the lengths
    expected = None if _is_http(fs) else progress.expected
    if expected not in (None, target.stat().st_size):
        raise OSError(f"cut short: {target.stat().st_size} of {expected} bytes came")


class _Bounded(Callback):
    """Stops a transfer of more than `most_bytes`, and one that is too slow."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self._most, self.expected = most_bytes, None
        self._then, self._had = monotonic(), 0

    def set_size(self, size: Any) -> None:
        self.expected = size
        self.absolute_update(self.value)

    def relative_update(self, inc: int = 1) -> None:
        self.absolute_update(self.value + inc)

    def absolute_update(self, value: int) -> None:
        self.value = value
        if (size := max(value, self.expected or 0)) > self._most:
            raise Unread("too_large", f"{size} bytes; limits.max_bytes is {self._most}")
        if (seconds := monotonic() - self._then) > _SLOW_SECONDS:
            if value - self._had < _SLOW_BYTES:
                raise _too_slow(value - self._had, seconds)
            self._then, self._had = monotonic(), value


def _too_slow(came: int, seconds: float) -> Unread:
    return Unread("unreachable", f"too slow: {came} bytes in {seconds:.0f} s")


def part(uri: str, size: int, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a source that has `size` bytes. Raises Unread: not all of them come."""
    with _as_unread():
        fs, path = storage.filesystem(uri)
        if storage.is_local(uri):
            with _regular(path, size).open("rb") as f:
                f.seek(start)
                data = f.read(end - start)
        else:
            http = {"size": size, "block_size": end - start, "cache_type": "none"}
            data = storage.retrying(uri, lambda: _range(fs, path, start, end, **http))
        if len(data) != end - start:
            raise Unread("unreachable", f"{len(data)} bytes came for {start} to {end} of {size}")
    return data


def _is_http(fs: Any) -> bool:
    return bool({"http", "https"} & set(storage.protocols(fs)))


def _range(fs: Any, path: str, start: int, end: int, **http: Any) -> bytes:
    if not _is_http(fs):
        return bytes(fs.cat_file(path, start=start, end=end))
    import aiohttp

    usual, begun = fs.client_kwargs["timeout"], monotonic()
    most_seconds = _SLOW_SECONDS * max(1, (end - start) / _SLOW_BYTES)
    bounded = aiohttp.ClientTimeout(most_seconds, sock_connect=usual.sock_connect, sock_read=usual.sock_read)
    try:
        # `cat_file` would download the whole file from a server without ranges
        with fs.open(path, "rb", timeout=bounded, **http) as f:
            f.seek(start)
            return bytes(f.read(end - start))
    except TimeoutError as e:
        if (seconds := monotonic() - begun) < most_seconds:
            raise
        raise _too_slow(end - start, seconds) from e


def answers(uri: str) -> bool:
    """Whether a store, asked once, gives a source's first byte or refuses it for good."""
    try:
        with _as_unread():
            fs, path = storage.filesystem(uri)
            if storage.is_local(uri):
                Path(path).stat()
            else:
                # with a size the client does not ask for it, which would hide why there is no answer
                storage.retrying(uri, lambda: _range(fs, path, 0, 1, size=1, block_size=0), attempts=1)
    except Unread as e:
        return e.reason != "unreachable"
    except (Failure, OSError):
        return False
    return True


@contextlib.contextmanager
def _as_unread() -> Iterator[None]:
    """Turn errors of a source into Unread."""
    try:
        yield
    except Failure as e:
        cause = e.__cause__ or e
        _raise_credentials(cause)
        status = getattr(cause, "status", 0)
        detail = f"HTTP {status} {getattr(cause, 'message', '')}" if status else str(cause) or type(cause).__name__
        raise Unread("unreachable", detail) from e
    except UserError as e:
        if isinstance(e.__cause__, ImportError):
            raise Failure(str(e)) from e
        raise Unread("refused", str(e)) from e
    except (FileNotFoundError, NotADirectoryError) as e:
        raise Unread("missing", e.strerror or "its store has no such file") from e
    except PermissionError as e:
        _raise_credentials(e.__cause__)
        raise Unread("refused", e.strerror or str(e)) from e
    except OSError as e:
        if e.errno in _OUR_DISK:
            raise
        lasting = e.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EISDIR)
        raise Unread("missing" if lasting else "unreachable", e.strerror or str(e)) from e
    except ValueError as e:
        raise Unread("refused", str(e)) from e
    except Unread:
        raise
    except Exception as e:
        # clients of stores raise their own errors
        codes = {str(getattr(e, name, "")) for name in ("status_code", "status", "code")}
        reason = "missing" if codes & {"404", "410"} else "refused" if codes & {"401", "403", "451"} else "unreachable"
        raise Unread(reason, f"{type(e).__name__}: {e}") from e


def _raise_credentials(cause: BaseException | None) -> None:
    """Raises Failure where an error is about credentials that have to be renewed."""
    code = getattr(cause, "response", {}).get("Error", {}).get("Code", "") if cause else ""
    if {code, type(cause).__name__} & _OUR_CREDENTIALS:
        raise Failure(f"{cause}; renew the credentials, then run the same command again") from cause
