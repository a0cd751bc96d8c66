"""What the last plan of a dataset was made from: manifests, earlier plans, later annotations. If nothing of it has changed,
nothing is new, and ten million rows need not be looked up again.

Only manifests that name the size of every source are remembered: all other sizes come from stores, which have to be asked.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longtake.datasets import index, later, storage
from longtake.datasets.errors import Failure
from longtake.pipeline.discover import find, manifests
from longtake.pipeline.manifest import is_manifest, parts, suffix

RECORD = "listed.json"
_BLOCK_BYTES = 1 << 22
_FOOTER_BYTES = 1 << 16


class Listed:
    """The digest of a listing, taken before it is read; `remember` writes it unless a manifest has changed meanwhile."""

    def __init__(self, dataset: str, patterns: Sequence[str]) -> None:
        self._dataset, self._patterns = dataset, patterns
        self._manifests = digest_of_manifests(patterns) if all(map(is_manifest, patterns)) else ""
        self._has_sizes = True

    def is_planned(self) -> bool:
        """Whether all that was listed is in the plans, with these annotations."""
        return bool(self._manifests) and _read(self._dataset) == self._record()

    def unsized(self) -> None:
        """Note that a store was asked for the size of a source, which may change while no manifest does."""
        self._has_sizes = False

    def remember(self) -> None:
        """Note that the whole listing is planned."""
        if self._manifests and self._has_sizes and digest_of_manifests(self._patterns) == self._manifests:
            storage.write(storage.join(self._dataset, RECORD), storage.canonical_json(self._record()))

    def _record(self) -> dict[str, Any]:
        folders = {"plans": "plan", "annotations": later.FOLDER}
        files = {name: _footers(storage.join(self._dataset, folder)) for name, folder in folders.items()}
        return {"manifests": self._manifests, **files}


def _read(dataset: str) -> Any:
    """The record; None where there is none, or a damaged one."""
    try:
        return json.loads(storage.read(storage.join(dataset, RECORD)))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None


def listing_digest(patterns: Sequence[str]) -> str:
    """A digest that changes when a source appears, goes, or changes its size, tag or manifest columns. Reads no contents.

    Of manifests alone, all in Parquet that names all sizes, the bytes are read and no rows: parsing ten million takes half
    a minute.

    Raises as `discover.find`.
    """
    has_sizes = all(is_manifest(pattern) and _has_all_sizes(pattern) for pattern in patterns)
    if has_sizes and (of_bytes := digest_of_manifests(patterns)):
        return of_bytes
    digest = hashlib.sha256()
    for batch in find(patterns):
        digest.update(json.dumps(batch.to_pydict()).encode())
    return digest.hexdigest()


def _has_all_sizes(pattern: str) -> bool:
    """Whether manifests are Parquet whose footers say that each row has a size; False where one cannot be read."""
    try:
        for url in manifests(pattern):
            for file, open_file in parts(url):
                if suffix(file) != "parquet":
                    return False
                with open_file() as f:
                    metadata = pq.ParquetFile(f).metadata
                sizes = metadata.schema.to_arrow_schema()
                if "bytes" not in sizes.names or not pa.types.is_integer(sizes.field("bytes").type):
                    return False
                place = [metadata.schema.column(n).path for n in range(metadata.num_columns)].index("bytes")
                for group in range(metadata.num_row_groups):
                    known = metadata.row_group(group).column(place).statistics
                    if known is None or not known.has_null_count or known.null_count:
                        return False
                    # a negative one is not known either
                    if not known.has_min_max or known.min < 0:
                        return False
    except Exception as e:
        # reading its rows says what is wrong with it
        if isinstance(e, OSError | ValueError | Failure | pa.ArrowException) or storage.of_network(e):
            return False
        raise
    return True


def digest_of_manifests(patterns: Sequence[str]) -> str:
    """A digest of the names and all bytes of the files of manifests; empty where one is missing or cannot be read."""
    digest = hashlib.sha256()
    try:
        for url in (url for pattern in patterns for url in manifests(pattern)):
            for file, open_file in parts(url):
                digest.update(json.dumps([url, file, _digest(open_file)]).encode())
    except Exception as e:
        # reading its rows says what is wrong with it
        if isinstance(e, OSError | ValueError | Failure) or storage.of_network(e):
            return ""
        raise
    return digest.hexdigest()


def _digest(open_file: Callable[[], Any]) -> str:
    digest = hashlib.sha256()
    with open_file() as f:
        while block := f.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def _footers(folder: str) -> dict[str, list[Any]]:
    """Size and digest of the end of each Parquet file of a folder, by name: its footer, with the bounds of all its columns."""
    names = index.table_names(folder)
    # two requests each, of thousands of files perhaps
    with ThreadPoolExecutor(16) as pool:
        return dict(zip(names, pool.map(lambda name: _footer(storage.join(folder, name)), names), strict=True))


def _footer(url: str) -> list[Any]:
    fs, path = storage.filesystem(url)
    fs.invalidate_cache(path)
    size = int(storage.retrying(url, partial(fs.size, path)))
    start = max(0, size - _FOOTER_BYTES)
    return [size, hashlib.sha256(storage.read_range(url, start, size - start)).hexdigest()]
