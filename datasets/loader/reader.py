"""Bytes of members of tars: from a map of the local file, from the cache's copy, or by ranges from the store."""

import mmap
import threading
import zlib
from collections import OrderedDict
from pathlib import Path

from longtake.datasets import storage
from longtake.datasets.cache import Cache
from longtake.datasets.compact import Rows
from longtake.datasets.errors import Failure

_OPEN_TARS = 64


class Reader:
    """Reads members by their place in a tar. Plain data until first used, so it travels to worker processes."""

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache
        self._maps: OrderedDict[str, mmap.mmap | None] = OrderedDict()
        self._lock = threading.Lock()

    def member(self, rows: Rows, shard: int, offset: int, size: int, crc32: int) -> memoryview:
        """A member's bytes. Raises Failure where they are not there, or not those of this CRC-32."""
        data = self.range(rows, shard, offset, size)
        # a damaged clip often decodes, to other pixels
        if zlib.crc32(data) != crc32:
            url = rows.tar(shard)[0]
            raise Failure(f"{url}: bytes {offset} to {offset + size} are damaged; run `longtake dataset verify`")
        return data

    def range(self, rows: Rows, shard: int, offset: int, size: int) -> memoryview:
        """Bytes that the caller checks himself. Raises Failure where they are not there."""
        url, tar_bytes, sha256 = rows.tar(shard)
        try:
            mapped = self._mapped(url, tar_bytes, sha256)
            data = memoryview(mapped if mapped is not None else storage.read_range(url, offset, size))
        except FileNotFoundError as e:
            raise Failure(f"{url}: is missing; run `longtake dataset verify`") from e
        except (OSError, ValueError) as e:
            raise Failure(f"{url}: {e}; run `longtake dataset verify`") from e
        data = data[offset : offset + size] if mapped is not None else data
        if len(data) != size:
            raise Failure(
                f"{url}: is too short for bytes {offset} to {offset + size} of the index; run `longtake dataset verify`"
            )
        return data

    def fetch(self, rows: Rows, shard: int) -> None:
        """Have a remote tar in the cache, ready for when it is needed."""
        url, tar_bytes, sha256 = rows.tar(shard)
        if self.cache and not storage.is_local(url) and (file := self.cache.open(url, tar_bytes, sha256)):
            file.close()

    def _mapped(self, url: str, tar_bytes: int, sha256: str) -> mmap.mmap | None:
        with self._lock:
            if url in self._maps:
                self._maps.move_to_end(url)
                return self._maps[url]
        if storage.is_local(url):
            with Path(storage.filesystem(url)[1]).open("rb") as f:
                made: mmap.mmap | None = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ)
        elif self.cache and (kept := self.cache.open(url, tar_bytes, sha256)):
            with kept:
                made = mmap.mmap(kept.fileno(), 0, access=mmap.ACCESS_READ)
        else:
            made = None  # from the store, also for as long as the cache has no room
        with self._lock:
            self._maps[url] = made
            if len(self._maps) > _OPEN_TARS:
                self._maps.popitem(last=False)
        return made

    def __getstate__(self) -> dict[str, object]:
        return {"cache": self.cache}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__init__(**state)  # type: ignore[misc]
