"""Find sources: files, folders, globs and manifests at any fsspec URL, as a stream of Arrow batches.

A manifest streams in constant memory, whatever its length. A folder is listed as a whole, at about 1 kB a file: beyond
some millions of files, name them in a manifest.
"""

import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.pipeline.listing import expand, is_glob, matching
from longtake.pipeline.manifest import LISTING, is_manifest, read

_BATCH_ROWS = 1 << 16


def find(
    patterns: Sequence[str], threads: int = 16, unsized: Callable[[], None] = lambda: None
) -> Iterator[pa.RecordBatch]:
    """Expand files, folders, globs and manifests (fsspec URLs) to batches of LISTING. A file named twice has two rows.

    A folder gives every file below it with the suffix of a video; a file, or what matches a glob, is taken whatever its
    suffix. A manifest (see manifest.py), or each that matches a glob, has a column `uri`, relative to its folder; perhaps
    `bytes` and `etag`, which save a request for each file; all other columns (label, caption ...) travel to the samples.
    `bytes` is null where it is unknown.

    Args:
        unsized: called for a batch of which stores have to be asked for sizes.

    Raises:
        UserError: a pattern matches nothing, or names nothing that exists; a manifest is not readable or of a kind that is
            not read.
    """
    count = 0
    for pattern in patterns:
        for batch in _manifest_rows(pattern) if is_manifest(pattern) else _files(pattern):
            count += len(batch)
            if batch["bytes"].null_count:
                unsized()
            yield _with_sizes(batch, threads)
    if not count:
        raise UserError(f"sources: {', '.join(patterns)}: no source listed there")


def _files(pattern: str) -> Iterator[pa.RecordBatch]:
    entries = expand(pattern)
    for start in range(0, len(entries), _BATCH_ROWS):
        rows = [entry._asdict() for entry in entries[start : start + _BATCH_ROWS]]
        yield pa.RecordBatch.from_pylist(rows, schema=LISTING)


def _manifest_rows(pattern: str) -> Iterator[pa.RecordBatch]:
    for manifest in manifests(pattern):
        yield from read(manifest)


def manifests(pattern: str) -> list[str]:
    """The URIs of the manifests that a pattern names. Raises UserError: nothing matches a glob."""
    return matching(pattern) if is_glob(pattern) else [pattern]


def _with_sizes(batch: pa.RecordBatch, threads: int) -> pa.RecordBatch:
    """Ask for the unknown sizes of a batch; null where there is no answer: the source's account will give the reason."""
    if not batch["bytes"].null_count:
        return batch
    sizes, uris = batch["bytes"].to_pylist(), batch["uri"].to_pylist()
    unknown = [n for n, size in enumerate(sizes) if size is None]
    with ThreadPoolExecutor(threads) as pool:
        for n, size in zip(unknown, pool.map(_size, [uris[n] for n in unknown]), strict=True):
            sizes[n] = size
    place = LISTING.get_field_index("bytes")
    return batch.set_column(place, LISTING.field(place), pa.array(sizes, pa.int64()))


def _size(uri: str) -> int | None:
    try:
        fs, path = storage.filesystem(uri)
        if storage.is_local(uri):
            status = Path(path).stat()
            return status.st_size if stat.S_ISREG(status.st_mode) else None
        size: Any = storage.retrying(uri, partial(fs.size, path))
        return None if size is None else int(size)
    except UserError as e:
        if isinstance(e.__cause__, ImportError):
            raise
        return None
    except (OSError, ValueError, Failure):
        return None
