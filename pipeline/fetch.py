"""Reading sources where they lie: whole, in parts, or not at all, and then why.

A source that its store does not have, will not give, or fails to give whole is `Unread`; what is wrong with this
machine (a full disk, credentials that have expired) is no fault of the source and is raised as it is.
"""

import contextlib
import errno
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fsspec.callbacks import Callback

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown

_OUR_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
# what botocore and S3 call credentials that are ours to renew
_RENEWABLE = """ExpiredToken ExpiredTokenException InvalidAccessKeyId InvalidClientTokenId RequestTimeTooSkewed
SignatureDoesNotMatch TokenRefreshRequired NoCredentialsError PartialCredentialsError TokenRetrievalError"""
_OUR_CREDENTIALS = frozenset(_RENEWABLE.split())


class Unread(Exception):
    """Why a source was not read: one of schema.UNREAD, or `too_large`, and a line for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, shown(storage.printable(" ".join(detail.split())))


def fetch(
    uri: str, target: Path, most_bytes: int, attempts: int = 5, memory: Mapping[str, bytes] | None = None
) -> Path:
    """A local copy of a source: the file itself where it is local, else `target`.

    Args:
        attempts: at what may pass.
        memory: contents of sources that only the driver can see.

    Raises:
        Unread: it is not there, or not to be had, or has more than `most_bytes`.
        Failure, OSError: of this machine.
    """
    with _telling():
        fs, path = storage.filesystem(uri)
        if memory and uri in memory:
            target.write_bytes(memory[uri])
        elif storage.is_local(uri):
            target = _regular(path, most_bytes)
        else:
            storage.retrying(uri, lambda: _take(fs, path, target, most_bytes), attempts)
    return target


def _regular(path: str, most_bytes: int) -> Path:
    file = Path(path)
    facts = file.stat()
    if stat.S_ISDIR(facts.st_mode):
        # listed since it could not be read
        next(file.iterdir(), None)
        raise Unread("missing", "a folder, whose videos are sources of their own")
    if not stat.S_ISREG(facts.st_mode):
        raise Unread("refused", "not a file but a pipe, socket or device")
    if facts.st_size > most_bytes:
        raise Unread("too_large", f"{facts.st_size} bytes; limits.max_bytes is {most_bytes}")
    with file.open("rb"):
        return file


def _take(fs: Any, path: str, target: Path, most_bytes: int) -> None:
    progress = _Bounded(most_bytes)
    fs.get_file(path, str(target), callback=progress)
    if not target.is_file():
        raise FileNotFoundError(errno.ENOENT, "not a file")
    # an answer over HTTP may be compressed on the way; its client has compared the lengths
    whole = None if {"http", "https"} & set(storage.protocols(fs)) else progress.said
    if whole not in (None, target.stat().st_size):
        raise OSError(f"cut short: {target.stat().st_size} of {whole} bytes came")


class _Bounded(Callback):
    """Ends a transfer that brings more than it should."""

    def __init__(self, most_bytes: int) -> None:
        super().__init__()
        self._most, self.said = most_bytes, None

    def set_size(self, size: Any) -> None:
        self.said = size
        self.absolute_update(self.value)

    def relative_update(self, inc: int = 1) -> None:
        self.absolute_update(self.value + inc)

    def absolute_update(self, value: int) -> None:
        self.value = value
        if max(value, self.said or 0) > self._most:
            raise Unread("too_large", f"{max(value, self.said or 0)} bytes; limits.max_bytes is {self._most}")


def part(uri: str, size: int, start: int, end: int) -> bytes:
    """Bytes `start` to `end` of a source that has `size` bytes. Raises Unread: not all of them can be had."""
    with _telling():
        fs, path = storage.filesystem(uri)
        if storage.is_local(uri):
            with _regular(path, size).open("rb") as f:
                f.seek(start)
                data = f.read(end - start)
        else:
            data = storage.retrying(uri, lambda: _range(fs, path, size, start, end))
        if len(data) != end - start:
            raise Unread("unreachable", f"{len(data)} bytes came for {start} to {end} of {size}")
    return data


def _range(fs: Any, path: str, size: int, start: int, end: int) -> bytes:
    if not {"http", "https"} & set(storage.protocols(fs)):
        return bytes(fs.cat_file(path, start=start, end=end))
    # `cat_file` would take the whole from a server that knows no ranges
    with fs.open(path, "rb", size=size, block_size=end - start, cache_type="none") as f:
        f.seek(start)
        return bytes(f.read(end - start))


def answers(uri: str) -> bool:
    """Whether a store, asked once, gives a source's first byte or refuses it for good."""
    try:
        with _telling():
            fs, path = storage.filesystem(uri)
            if storage.is_local(uri):
                Path(path).stat()
            else:
                storage.retrying(uri, lambda: _first(fs, path), attempts=1)
    except Unread as e:
        return e.reason != "unreachable"
    except (Failure, OSError):
        return False
    return True


def _first(fs: Any, path: str) -> bytes:
    if not {"http", "https"} & set(storage.protocols(fs)):
        return bytes(fs.cat_file(path, start=0, end=1))
    # given a size, it is not asked for, in a way that hides why there is no answer
    with fs.open(path, "rb", size=1, block_size=0) as f:
        return bytes(f.read(1))


@contextlib.contextmanager
def _telling() -> Iterator[None]:
    """Turn what goes wrong with a source into Unread."""
    try:
        yield
    except Failure as e:
        cause = e.__cause__ or e
        _raise_ours(cause)
        status = getattr(cause, "status", 0)
        says = f"HTTP {status} {getattr(cause, 'message', '')}" if status else str(cause) or type(cause).__name__
        raise Unread("unreachable", says) from e
    except UserError as e:
        if isinstance(e.__cause__, ImportError):
            raise Failure(str(e)) from e
        raise Unread("refused", str(e)) from e
    except (FileNotFoundError, NotADirectoryError) as e:
        raise Unread("missing", e.strerror or "its store has no such file") from e
    except PermissionError as e:
        _raise_ours(e.__cause__)
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
        # clients of stores have errors of their own
        codes = {str(getattr(e, name, "")) for name in ("status_code", "status", "code")}
        reason = "missing" if codes & {"404", "410"} else "refused" if codes & {"401", "403", "451"} else "unreachable"
        raise Unread(reason, f"{type(e).__name__}: {e}") from e


def _raise_ours(cause: BaseException | None) -> None:
    code = getattr(cause, "response", {}).get("Error", {}).get("Code", "") if cause else ""
    if {code, type(cause).__name__} & _OUR_CREDENTIALS:
        raise Failure(f"{cause}; renew the credentials, then run the same command again") from cause
