"""Files at any fsspec URL, written so that a name is either whole or absent."""

import contextlib
import errno
import io
import json
import os
import random
import re
import secrets
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

import fsspec
from fsspec.implementations.local import LocalFileSystem, make_path_posix

from longtake.datasets.errors import Failure, UserError

_FOREIGN_DEBRIS_SECONDS = 24 * 3600
_BLOCK = 1 << 16  # bytes that `Ranges` reads at least
_CONNECTIONS = 64  # of a process to a store at once
_LASTING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES)
_NO_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound")  # of botocore, not worth a retry
_ANSWERS = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError)
_PASSING = (408, 425, 429)  # HTTP statuses below 500 that are worth a retry
_PROTOCOL = re.compile(r"(?!file:|local:)([a-z][a-z0-9+.-]+)://", re.IGNORECASE)
_FILE_URL = re.compile(r"(?:file|local):(?://(?:localhost(?=/))?|(?=/))", re.IGNORECASE)
# characters that a line, a table or JSON cannot hold: control characters, line ends, bytes that are not UTF-8
_UNPRINTABLE = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec filesystem of a URL and the path inside it.

    A plain path is local whatever characters it holds, and so is a `file:` URL, percent-encoded (RFC 8089) or not, as
    fsspec writes it. `::` is part of a name, never a chain of filesystems.

    Raises:
        UserError: the protocol is unknown or its package is not installed.
        Failure: the store cannot be reached.
    """
    match = _PROTOCOL.match(url)
    if match is None:
        return LocalFileSystem(), _local_path(url)
    try:
        protocol = match[1].lower()
        url = protocol + url[match.end(1) :]
        store = fsspec.get_filesystem_class(protocol)
        options = store._get_kwargs_from_urls(url) | _options(protocol)
        return fsspec.filesystem(protocol, **options), store._strip_protocol(url)
    except (ValueError, TypeError, ImportError) as e:
        raise UserError(f"{url}: {e}") from e
    except OSError as e:
        # clients that connect at once
        raise Failure(f"{url}: does not answer ({e.strerror or e})") from e


def _options(protocol: str) -> dict[str, Any]:
    if protocol in ("s3", "s3a"):
        # botocore's ten would hold up the loader's threads
        given = [fsspec.config.conf.get(name, {}).get("config_kwargs", {}) for name in ("s3", protocol)]
        return {"config_kwargs": {"max_pool_connections": _CONNECTIONS} | given[0] | given[1]}
    if protocol not in ("http", "https"):
        return {}
    import aiohttp

    # without it aiohttp would end any answer after five minutes
    return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60)}}


def _local_path(url: str) -> str:
    match = _FILE_URL.match(url)
    path = url[match.end() :] if match else url
    if match and "%" in path:
        decoded = os.fsdecode(unquote_to_bytes(os.fsencode(path)))
        if os.path.lexists(make_path_posix(decoded)) or not os.path.lexists(make_path_posix(path)):
            path = decoded
    return make_path_posix(path).rstrip("/") or "/"


def named(path: str) -> str:
    """A local path as text that tables, JSON and consoles can hold and `filesystem` reads back.

    This is the path, or its percent-encoded file:// URL where it has control characters or bytes that are not UTF-8.
    """
    return "file://" + quote(os.fsencode(path)) if _UNPRINTABLE.search(path) else path


def printable(text: str) -> str:
    """Text on one line, with escapes for characters that a line, a table or JSON cannot hold."""
    return _UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), text)


def is_local(url: str) -> bool:
    return _PROTOCOL.match(url) is None


def is_memory(url: str) -> bool:
    """Whether only this process can see the URL."""
    return url.startswith("memory://")


def protocols(fs: Any) -> tuple[str, ...]:
    return (fs.protocol,) if isinstance(fs.protocol, str) else tuple(fs.protocol)


def absolute(url: str) -> str:
    """A URL that means the same in any working folder: local paths become absolute, others stay."""
    if is_local(url):
        return str(Path(filesystem(url)[1]).absolute())
    # an HTTP page that lists a folder ends in a slash
    return url if url.startswith("http") else url.rstrip("/")


def placed(url: str, then: str, now: str) -> str:
    """A recorded URL in a folder that was moved from `then` to `now`: the URL below `now` if it exists, else as recorded."""
    if then in ("", now) or not url.startswith(f"{then}/"):
        return url
    moved = now + url[len(then) :]
    return moved if exists(moved) else url


def join(url: str, *parts: str) -> str:
    return "/".join([url.rstrip("/"), *parts])


def exists(url: str) -> bool:
    fs, path = filesystem(url)
    return bool(retrying(url, lambda: fs.exists(path)))


def read(url: str) -> bytes:
    """The whole file. Raises FileNotFoundError where there is none."""
    fs, path = filesystem(url)
    return retrying(url, lambda: fs.cat_file(path))


def read_range(url: str, start: int, size: int) -> bytes:
    fs, path = filesystem(url)
    return retrying(url, lambda: fs.cat_file(path, start=start, end=start + size))


class Ranges(io.RawIOBase):
    """A file of which only what is asked for is read, with a little more for what follows. Raises FileNotFoundError."""

    def __init__(self, url: str) -> None:
        super().__init__()
        fs, path = filesystem(url)
        self._url, self._at = url, 0
        fs.invalidate_cache(path)
        self._size = int(retrying(url, lambda: fs.size(path)))
        self._start, self._block = 0, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def read(self, size: int = -1) -> bytes:
        end = self._size if size < 0 else min(self._at + size, self._size)
        if not self._start <= self._at <= end <= self._start + len(self._block):
            # the end of a file in one piece, whether it is asked for in one or not
            self._start = max(0, min(self._at, self._size - _BLOCK))
            self._block = read_range(self._url, self._start, max(end, self._start + _BLOCK) - self._start)
        data = self._block[self._at - self._start : max(self._at, end) - self._start]
        self._at += len(data)
        return data


def names(url: str) -> list[str]:
    """Names in a folder, sorted; empty where there is no folder."""
    fs, path = filesystem(url)
    fs.invalidate_cache(path)
    try:
        entries = retrying(url, lambda: fs.ls(path, detail=False))
        return sorted(entry.rstrip("/").rsplit("/", 1)[-1] for entry in entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


@contextlib.contextmanager
def failing_clearly(url: str) -> Iterator[None]:
    """Turn the errors of a full or read-only disk into one line that names the file and the remedy."""
    try:
        yield
    except OSError as e:
        # an fsspec error often has text but no errno
        cause = e.strerror or str(e) or type(e).__name__
        remedy = {
            errno.ENOSPC: "free some space, then run the same command again: it goes on where it stopped",
            errno.EDQUOT: "raise the quota, then run the same command again: it goes on where it stopped",
            errno.EACCES: "give write permission or choose another `workspace`",
            errno.EROFS: "choose a `workspace` that can be written",
            errno.ENOTDIR: "choose a `workspace` that is a folder",
            errno.EISDIR: "move this folder away",
        }.get(e.errno or 0)
        if remedy is None:
            raise
        raise Failure(f"{url}: {cause}; {remedy}") from e


@contextlib.contextmanager
def staged(url: str) -> Iterator[Path]:
    """A local path to fill; it becomes `url`, whole, when the block succeeds, and is deleted when it fails.

    Local: a temporary name beside the target, fsync, rename. Remote: a spool file, then one upload.
    """
    fs, path = filesystem(url)
    with failing_clearly(url):
        if is_local(url):
            target = Path(path)
            with _spool_beside(target) as spool:
                yield spool
                sync(spool)
                spool.replace(target)
                sync(target.parent)
        else:
            with spool_folder(url) as folder:
                spool = folder / path.rsplit("/", 1)[-1]
                yield spool
                retrying(url, lambda: (fs.makedirs(fs._parent(path), exist_ok=True), fs.put_file(str(spool), path)))


@contextlib.contextmanager
def _spool_beside(target: Path) -> Iterator[Path]:
    """A temporary path in the target's folder, which is made; deleted after the block."""
    target.parent.mkdir(parents=True, exist_ok=True)
    spool = target.parent / temporary_name(target.name)
    try:
        yield spool
    finally:
        spool.unlink(missing_ok=True)


def write(url: str, data: bytes) -> None:
    """Write a whole file atomically."""
    with staged(url) as path:
        path.write_bytes(data)


def write_if_absent(url: str, data: bytes | Path) -> bool:
    """Write a whole file, from bytes or a local copy, unless it exists; of several writers at once exactly one gets True."""
    fs, path = filesystem(url)
    with failing_clearly(url):
        if not is_local(url):
            put = fs.put_file if isinstance(data, Path) else fs.pipe_file
            arguments = (str(data), path) if isinstance(data, Path) else (path, data)
            with contextlib.suppress(FileExistsError):
                retrying(url, lambda: put(*arguments, mode="create"))
                return True
            return False
        target = Path(path)
        with _spool_beside(target) as spool:
            if isinstance(data, Path):
                shutil.copyfile(data, spool)
            else:
                spool.write_bytes(data)
            sync(spool)
            with contextlib.suppress(FileExistsError):
                os.link(spool, target)
                sync(target.parent)
                return True
    return False


@contextlib.contextmanager
def spool_folder(url: str) -> Iterator[Path]:
    """A scratch folder for the block: inside a local `url`, else in the machine's temporary folder."""
    parent = Path(filesystem(url)[1]) if is_local(url) else Path(tempfile.gettempdir())
    with failing_clearly(url):
        folder = parent / temporary_name("spool")
        folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(folder: str) -> int:
    """Delete the temporary files of dead writers, for a remote folder in this machine's temporary one; returns their number.

    A living writer's files stay, and those of other machines for a day.
    """
    count = 0
    root = Path(filesystem(folder)[1]) if is_local(folder) else Path(tempfile.gettempdir())
    for path in root.glob(".*~*@*~*.tmp") if root.is_dir() else ():
        host, _, pid = path.name.rsplit("~", 2)[1].partition("@")
        with contextlib.suppress(FileNotFoundError):
            old = time.time() - path.stat().st_mtime > _FOREIGN_DEBRIS_SECONDS
            if old if host != socket.gethostname() else not alive(pid):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                count += 1
    return count


def alive(pid: str) -> bool:
    """Whether a process of this machine is running. One that has ended is not, though nobody has waited for it yet."""
    # imported here: most commands sweep nothing
    import psutil

    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, ValueError, OverflowError):
        return False
    except PermissionError:
        pass
    # in a container whose first process waits for nobody, the dead stay as zombies
    with contextlib.suppress(psutil.Error):
        return bool(psutil.Process(int(pid)).status() != psutil.STATUS_ZOMBIE)
    return True


def retrying(label: str, action: Callable[[], Any], attempts: int = 5, first_wait: float = 0.5) -> Any:
    """Call `action` again after passing faults of the network, waiting about twice as long each time.

    A lasting fault (missing, there already, forbidden, a full disk) is raised at once, an HTTP server's as the error that a
    local file would raise. The fault of the last attempt is raised as Failure naming `label`.
    """
    for attempt in range(attempts):
        try:
            return action()
        except Exception as caught:
            e = _cause(caught)
            if refusal := _refusal(e):
                raise refusal from e
            if type(e).__name__ in _NO_CREDENTIALS:
                raise Failure(f"{label}: {e}; give this machine the store's credentials") from e
            lasting = isinstance(e, _ANSWERS) or getattr(e, "errno", None) in _LASTING
            if lasting or not (isinstance(e, OSError) or of_network(e)):
                raise
            if attempt == attempts - 1:
                raise Failure(f"{label}: {e} (gave up after {attempts} attempts)") from e
            # at random, so that a thousand processes refused at once do not return at once
            time.sleep(first_wait * 2**attempt * random.SystemRandom().uniform(0.5, 1.5))


def _cause(error: Exception) -> BaseException:
    """The error, or its cause over HTTP, where fsspec raises FileNotFoundError for every fault."""
    cause = error.__cause__
    return cause if cause and isinstance(error, FileNotFoundError) and of_network(cause) else error


def of_network(error: BaseException | None) -> bool:
    """Whether an error is of a connection or of a store's client, which has its own errors."""
    return isinstance(error, ConnectionError | TimeoutError) or _client(error) in ("aiohttp", "botocore", "aiobotocore")


def _client(error: BaseException | None) -> str:
    return type(error).__module__.split(".")[0]


def _refusal(error: BaseException) -> OSError | None:
    """The local error for an HTTP server's lasting refusal; None for other errors."""
    if _client(error) != "aiohttp":
        return None
    import aiohttp

    if isinstance(error, aiohttp.TooManyRedirects):
        return PermissionError(errno.EACCES, "redirects without end")
    if isinstance(error, aiohttp.NonHttpUrlClientError | aiohttp.InvalidURL):
        return PermissionError(errno.EACCES, f"not an HTTP address: {error}")
    if isinstance(error, aiohttp.ClientResponseError) and 400 <= error.status < 500 and error.status not in _PASSING:
        answer = f"HTTP {error.status} {error.message}".strip()
        gone = error.status in (404, 410)
        return FileNotFoundError(errno.ENOENT, answer) if gone else PermissionError(errno.EACCES, answer)
    return None


def temporary_name(name: str) -> str:
    """A name that `sweep` knows as one of this process."""
    return f".{name}~{socket.gethostname()}@{os.getpid()}~{secrets.token_hex(4)}.tmp"


def open_up(path: Path) -> None:
    """Give a file the permissions of any new file: safetensors makes its own readable by their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod(0o666 & ~mask)


def sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to the disk itself."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def canonical_json(value: Any) -> bytes:
    """JSON bytes that depend on the value alone, not on the order of its keys."""
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
