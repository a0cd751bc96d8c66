"""Finding sources: files, folders, globs and manifests at any fsspec URL, as a stream of Arrow batches.

A manifest streams in constant memory, whatever its length. A folder is listed as a whole by fsspec, at about 1 kB a
file: beyond some millions of files name them in a manifest.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.pipeline.manifest import FOUND, KINDS, is_manifest, is_other_list, read, suffix

_SUFFIXES = """3g2 3gp asf avi av1 f4v flv gif h264 h265 hevc ivf m2ts m4v mjpeg mkv mov mp4 mpeg mpg mts mxf nut obu
ogm ogv rm rmvb ts vob webm wmv y4m"""
VIDEO_SUFFIXES = frozenset(_SUFFIXES.split())
_BATCH_ROWS = 1 << 16


def find(patterns: Sequence[str], threads: int = 16) -> Iterator[pa.RecordBatch]:
    """Expand files, folders, globs and manifests (fsspec URLs) to batches of FOUND. A file named twice has two rows.

    A folder gives every file below it whose suffix is a video's; a glob or a file is taken as it is. A manifest (see
    manifest.py; a glob of them is all of them) has a column `uri`, counted from its own folder where relative; perhaps
    `bytes` and `etag`, which spare a look at each file; all other columns (label, caption ...) travel to the samples.

    Raises:
        UserError: a pattern matches nothing, or names nothing that exists; a manifest that is not readable or not of
            the kinds that are read.
    """
    count = 0
    for pattern in patterns:
        listed = _listed if is_manifest(pattern) else _listing
        for batch in listed(pattern, threads):
            count += len(batch)
            yield batch
    if not count:
        raise UserError(f"sources: {', '.join(patterns)}: no source listed there")


def listing_digest(patterns: Sequence[str]) -> str:
    """Changes when a source appears, goes, or changes its size, tag or manifest columns. Reads no contents."""
    digest = hashlib.sha256()
    for batch in find(patterns):
        digest.update(json.dumps(batch.to_pydict()).encode())
    return digest.hexdigest()


def _listing(pattern: str, threads: int) -> Iterator[pa.RecordBatch]:
    fs, path = storage.filesystem(pattern)
    entries, skipped = storage.retrying(pattern, partial(_expand, fs, path, pattern))
    if not entries:
        passed = ", ".join(f"{n} {s or 'without suffix'}" for s, n in skipped.most_common(3))
        only = f" (only {passed})" if passed else ""
        raise UserError(f"sources: {pattern}: no video there{only}; name a folder or glob that holds videos")
    local = storage.is_local(pattern)
    # other stores' tags say nothing of the content, or are not kept when a file moves
    tagged = "s3" in storage.protocols(fs)
    for start in range(0, len(entries), _BATCH_ROWS):
        rows = [
            {
                "uri": entry["name"] if local else fs.unstrip_protocol(entry["name"]),
                "bytes": int(entry.get("size") or 0),
                "etag": str(entry["ETag"]).strip('"') if tagged and entry.get("ETag") else None,
                "extra": None,
            }
            for entry in entries[start : start + _BATCH_ROWS]
        ]
        yield pa.RecordBatch.from_pylist(rows, schema=FOUND)


def _expand(fs: Any, path: str, pattern: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    if _is_glob(path):
        # a link has a type of its own
        return [e for e in fs.glob(path, detail=True).values() if e["type"] != "directory"], Counter()
    try:
        info = fs.info(path)
    except FileNotFoundError as e:
        raise UserError(f"sources: {pattern}: no such file or folder") from e
    if info["type"] == "file" and not (pattern.startswith("http") and pattern.endswith("/")):
        if is_other_list(path):
            raise UserError(f"sources: {pattern}: neither a video nor a manifest that is read; manifests are {KINDS}")
        return [info], Counter()
    entries = [e for e in fs.find(path, detail=True).values() if not _hidden(e["name"], path)]
    video = [e for e in entries if suffix(e["name"]) in VIDEO_SUFFIXES]
    return video, Counter(suffix(e["name"]) for e in entries) - Counter(suffix(e["name"]) for e in video)


def _listed(pattern: str, threads: int) -> Iterator[pa.RecordBatch]:
    """The rows of manifests; sizes that they do not say are looked up."""
    place = FOUND.get_field_index("bytes")
    for manifest in _manifests(pattern):
        for batch in read(manifest):
            if unknown := batch["bytes"].null_count:
                missing = pc.is_null(batch["bytes"])
                asked = _sizes(batch["uri"].filter(missing) if unknown < len(batch) else batch["uri"], threads)
                sizes = pc.replace_with_mask(batch["bytes"], missing, asked)
                yield batch.set_column(place, FOUND.field(place), sizes)
            else:
                yield batch


def _manifests(pattern: str) -> list[str]:
    fs, path = storage.filesystem(pattern)
    if not _is_glob(path):
        return [pattern]
    names = sorted(storage.retrying(pattern, partial(fs.glob, path)))
    if not names:
        raise UserError(f"sources: {pattern}: no manifest there")
    return [name if storage.is_local(pattern) else fs.unstrip_protocol(name) for name in names]


def _sizes(uris: Any, threads: int) -> Any:
    def size(uri: str) -> int:
        fs, path = storage.filesystem(uri)
        try:
            return int(storage.retrying(uri, lambda: fs.size(path)) or 0)
        except (FileNotFoundError, PermissionError):
            # its group will reject it as missing
            return 0

    with ThreadPoolExecutor(threads) as pool:
        return pa.array(pool.map(size, uris.to_pylist()), pa.int64())


def _hidden(name: str, root: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix(root).split("/"))


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")
