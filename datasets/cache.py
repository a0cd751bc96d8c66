"""Whole remote files on a local disk, shared by all processes and threads of one host and bounded in bytes.

An entry is named by the sha256 of its content: the same bytes under two URLs are one entry, and none is ever stale.
Beside the entries are only the files of fetches under way, each locked by `flock`: a file that can be locked is debris of a
dead process. What it gives up: an entry is checked only when it is fetched; an entry evicted while open takes its room
until it is closed, beyond the cap; the folder must be on a disk of this host, not one shared over a network.
"""

import contextlib
import errno
import fcntl
import functools
import hashlib
import os
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from longtake.datasets import storage
from longtake.datasets.errors import Failure

_BLOCK = 8 << 20
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
_ROOM_LOCK = ".room.lock"
# files of other names are never touched: the folder may be shared
_ENTRY = re.compile(r"[0-9a-f]{64}")
_UNDER_WAY = re.compile(rf"{_ENTRY.pattern}\.lock|\.{_ENTRY.pattern}~.+@\d+~[0-9a-f]+\.tmp")
_REMEDY = "run `longtake dataset verify`"

_warned: set[Path] = set()
_warning = threading.Lock()


class Cache:
    """A folder whose entries and fetches under way take at most `max_bytes` together. Travels to worker processes."""

    def __init__(self, folder: str, max_bytes: int) -> None:
        self.folder = Path(folder).absolute()
        self.max_bytes = max_bytes

    def open(self, url: str, size: int, sha256: str) -> BinaryIO | None:
        """The local copy of a file, open for reading: fetched whole and checked if it is not there yet.

        None where there is no room for it, with a warning once a process on stderr: read it from the store then.

        Raises:
            Failure: the store's file stays unreadable or has another content; the folder cannot be used.
        """
        if not _ENTRY.fullmatch(sha256):
            raise Failure(f"{url}: its index says {sha256!r} where a sha256 belongs; {_REMEDY}")
        why = f"its cap is {self.max_bytes} bytes"
        try:
            if size <= self.max_bytes and (file := self._hit(size, sha256) or self._fetched(url, size, sha256)):
                return file
        except OSError as e:
            why = e.strerror or str(e)
            if e.errno not in _NO_ROOM:
                raise Failure(f"{self.folder}: {why}; choose a `cache` folder that can be written") from e
        with _warning:
            if self.folder not in _warned:
                lack = f"no room for a file of {size} bytes ({why})"
                print(f"warning: cache {self.folder}: {lack}; reading from the store instead", file=sys.stderr)
            _warned.add(self.folder)
        return None

    def _hit(self, size: int, sha256: str) -> BinaryIO | None:
        path = self.folder / sha256
        try:
            if path.stat().st_size != size:
                return None
            # fails where another user owns the file: only its recency is lost
            with contextlib.suppress(OSError):
                os.utime(path)
            return path.open("rb")
        except FileNotFoundError:
            return None

    def _fetched(self, url: str, size: int, sha256: str) -> BinaryIO | None:
        with self._locked(f"{sha256}.lock"):
            try:
                return self._hit(size, sha256) or self._fill(url, size, sha256)
            except OSError as e:
                # the disk has less room than the cap, or the folder was deleted meanwhile
                if e.errno not in (*_NO_ROOM, errno.ENOENT):
                    raise
            return self._fill(url, size, sha256, keep=0.5)

    def _fill(self, url: str, size: int, sha256: str, keep: float = 1.0) -> BinaryIO | None:
        temporary = self.folder / storage.temporary_name(sha256)
        try:
            with self._locked(_ROOM_LOCK):
                if not self._make_room(size, keep):
                    return None
                out = temporary.open("xb")
                fcntl.flock(out, fcntl.LOCK_EX)
                out.truncate(size)
            with out:
                os.posix_fallocate(out.fileno(), 0, max(size, 1))
                _fetch(url, out, size, sha256)
                os.fsync(out.fileno())
                with self._locked(_ROOM_LOCK):
                    file = temporary.open("rb")
                    temporary.replace(self.folder / sha256)
                return file
        finally:
            temporary.unlink(missing_ok=True)

    def _make_room(self, size: int, keep: float) -> bool:
        """Evict the least recently used entries until `size` fits, and at most the share `keep` of the used bytes is left.

        False, and nothing evicted, where the fetches under way leave no room.
        """
        entries, under_way = [], 0
        for path in self.folder.iterdir():
            with contextlib.suppress(FileNotFoundError):
                if _ENTRY.fullmatch(path.name):
                    entries.append((path.stat().st_mtime_ns, path.stat().st_size, path))
                elif _UNDER_WAY.fullmatch(path.name) and not _delete_debris(path):
                    under_way += path.stat().st_size
        if under_way + size > self.max_bytes:
            return False
        used = under_way + sum(entry_bytes for _, entry_bytes, _ in entries)
        most = min(self.max_bytes - size, int(used * keep))
        for _, entry_bytes, path in sorted(entries):
            if used > most:
                path.unlink(missing_ok=True)
                used -= entry_bytes
        return True

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        """Hold a lock file for the block, and delete it then. The lock ends with this process at the latest."""
        self.folder.mkdir(parents=True, exist_ok=True)
        while True:
            with (self.folder / name).open("ab") as handle:
                fcntl.flock(handle, fcntl.LOCK_EX)
                # its last holder has deleted it: the lock is another file now
                if not os.fstat(handle.fileno()).st_nlink:
                    continue
                try:
                    yield
                finally:
                    (self.folder / name).unlink(missing_ok=True)
                    # explicitly: a child forked meanwhile has the handle too
                    fcntl.flock(handle, fcntl.LOCK_UN)
                return


def _fetch(url: str, out: BinaryIO, size: int, sha256: str) -> None:
    fs, path = storage.filesystem(url)
    # twice: a read may be damaged on the way
    for _ in range(2):
        out.seek(0)
        digest, start, block = hashlib.sha256(), 0, b"-"
        while start < size and block:
            try:
                read = functools.partial(fs.cat_file, path, start=start, end=min(start + _BLOCK, size))
                block = storage.retrying("cannot be read", read)
            except (OSError, Failure) as e:
                why = "is missing" if isinstance(e, FileNotFoundError) else str(e) or type(e).__name__
                raise Failure(f"{url}: {why}; if this lasts, {_REMEDY}") from e
            digest.update(block)
            start += out.write(block)
        out.truncate(size)
        content = f"{start} bytes with sha256 {digest.hexdigest()}"
        if content == (expected := f"{size} bytes with sha256 {sha256}"):
            return
    raise Failure(f"{url}: has {content}, its index says {expected}; {_REMEDY}")


def _delete_debris(path: Path) -> bool:
    """Delete a lock or temporary file unless a living process holds it. Returns whether it is gone."""
    with path.open("rb") as handle, contextlib.suppress(BlockingIOError):
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(handle.fileno()).st_nlink:
            path.unlink()
        return True
    return False
