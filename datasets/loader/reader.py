"""Members of tars as bytes: from the local file or the cache's copy, mapped into memory, or by ranges from the store."""

import mmap
import threading
from collections import OrderedDict
from pathlib import Path

from isal import isal_zlib

from longtake.datasets import storage
from longtake.datasets.cache import Cache
from longtake.datasets.compact import Rows
from longtake.datasets.errors import Failure

_OPEN_TARS = 64


class Reader:
    """Reads members by their place in a tar. Plain data until first used, so it travels to worker processes."""

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache
        self._maps: OrderedDict[str, memoryview | None] = OrderedDict()
        self._lock = threading.Lock()

    def member(self, rows: Rows, shard: int, offset: int, size: int, crc32: int) -> memoryview:
        """A member's bytes. Raises Failure where they are missing, or have another CRC-32."""
        data = self.range(rows, shard, offset, size)
        # a damaged clip often decodes, to other pixels
        if isal_zlib.crc32(data) != crc32:
            url = rows.tar(shard)[0]
            raise Failure(f"{url}: bytes {offset} to {offset + size} are damaged; run `longtake dataset verify`")
        return data

    def range(self, rows: Rows, shard: int, offset: int, size: int) -> memoryview:
        """Bytes that the caller has to check. Raises Failure where they are missing."""
        url, tar_bytes, sha256 = rows.tar(shard)
        try:
            mapped = self._mapped(url, tar_bytes, sha256)
            data = mapped[offset : offset + size] if mapped else memoryview(storage.read_range(url, offset, size))
        except FileNotFoundError as e:
            raise Failure(f"{url}: is missing; run `longtake dataset verify`") from e
        except (OSError, ValueError) as e:
            raise Failure(f"{url}: {e}; run `longtake dataset verify`") from e
        if len(data) != size:
            raise Failure(
                f"{url}: is too short for bytes {offset} to {offset + size} of the index; run `longtake dataset verify`"
            )
        return data

    def fetch(self, rows: Rows, shard: int) -> None:
        """Bring a remote tar into the cache before it is needed."""
        url, tar_bytes, sha256 = rows.tar(shard)
        if self.cache and not storage.is_local(url) and (file := self.cache.open(url, tar_bytes, sha256)):
            file.close()

    def _mapped(self, url: str, tar_bytes: int, sha256: str) -> memoryview | None:
        """The tar mapped into memory; None where it is read from the store, also while the cache has no room."""
        with self._lock:
            if url in self._maps:
                self._maps.move_to_end(url)
                return self._maps[url]
        mapped: memoryview | None = None
        if storage.is_local(url):
            with Path(storage.filesystem(url)[1]).open("rb") as f:
                mapped = memoryview(mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ))
        elif self.cache and (copy := self.cache.open(url, tar_bytes, sha256)):
            with copy:
                mapped = memoryview(mmap.mmap(copy.fileno(), 0, access=mmap.ACCESS_READ))
        with self._lock:
            self._maps[url] = mapped
            if len(self._maps) > _OPEN_TARS:
                self._maps.popitem(last=False)
        return mapped

    def __getstate__(self) -> dict[str, object]:
        return {"cache": self.cache}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]
