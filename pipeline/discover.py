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
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from longtake.datasets import storage
from longtake.datasets.errors import UserError

_SUFFIXES = """3g2 3gp asf avi av1 f4v flv gif h264 h265 hevc ivf m2ts m4v mjpeg mkv mov mp4 mpeg mpg mts mxf nut obu
ogm ogv rm rmvb ts vob webm wmv y4m"""
VIDEO_SUFFIXES = frozenset(_SUFFIXES.split())
MANIFEST_SUFFIXES = frozenset(("csv", "jsonl", "parquet"))
_BATCH_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 22
_OURS = ("uri", "bytes", "etag")

# What is known of a source before it is read. `etag`: the store's own content tag, where it has one.
FOUND = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("etag", pa.string()), ("extra", pa.string())])


def find(patterns: Sequence[str], threads: int = 16) -> Iterator[pa.RecordBatch]:
    """Expand files, folders, globs and manifests (fsspec URLs) to batches of FOUND. A file named twice has two rows.

    A folder gives every file below it whose suffix is a video's; a glob or a file is taken as it is. A manifest
    (.csv, .jsonl, .parquet) has a column `uri`, counted from its own folder where relative; perhaps `bytes` and
    `etag`, which spare a look at each file; all other columns (label, caption, licence ...) travel to the samples.

    Raises:
        UserError: a pattern matches nothing, or names nothing that exists; a manifest without `uri`.
    """
    count = 0
    for pattern in patterns:
        listed = _manifest if _suffix(pattern) in MANIFEST_SUFFIXES and not _is_glob(pattern) else _listing
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
        return [info], Counter()
    entries = [e for e in fs.find(path, detail=True).values() if not _hidden(e["name"], path)]
    video = [e for e in entries if _suffix(e["name"]) in VIDEO_SUFFIXES]
    return video, Counter(_suffix(e["name"]) for e in entries) - Counter(_suffix(e["name"]) for e in video)


def _manifest(url: str, threads: int) -> Iterator[pa.RecordBatch]:
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as f:
            for batch, extra in _READERS[_suffix(url)](f):
                yield _as_found(batch, extra, url, threads)
    except FileNotFoundError as e:
        raise UserError(f"sources: {url}: no such manifest") from e
    except (pa.ArrowException, OSError, ValueError) as e:
        raise UserError(f"sources: {url}: not a readable manifest ({str(e).splitlines()[0]})") from e


def _read_parquet(f: Any) -> Iterator[tuple[pa.RecordBatch, Any]]:
    for batch in pq.ParquetFile(f).iter_batches(_BATCH_ROWS):
        yield batch, _objects(batch)


def _read_csv(f: Any) -> Iterator[tuple[pa.RecordBatch, Any]]:
    """All columns but `bytes` are text: types that were guessed from the first rows would fail later ones."""
    options = pyarrow.csv.ReadOptions(block_size=_BLOCK_BYTES)
    types = {name: pa.string() for name in pyarrow.csv.open_csv(f, options).schema.names if name != "bytes"}
    f.seek(0)
    for batch in pyarrow.csv.open_csv(f, options, convert_options=pyarrow.csv.ConvertOptions(column_types=types)):
        yield batch, _objects(batch)


def _read_jsonl(f: Any) -> Iterator[tuple[pa.RecordBatch, Any]]:
    """Line by line, for each may have keys of its own."""
    numbered = enumerate(f, 1)
    while lines := list(islice(numbered, _BATCH_ROWS)):
        known, extra = [], []
        for number, line in lines:
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is no JSON object")
                known.append({name: row.pop(name) for name in _OURS if name in row})
                extra.append(json.dumps(row, sort_keys=True) if row else None)
        names = [name for name in _OURS if any(name in row for row in known)]
        columns = {name: pa.array([row.get(name) for row in known], FOUND.field(name).type) for name in names}
        yield pa.RecordBatch.from_pydict(columns), pa.array(extra, pa.string())


_READERS = {"csv": _read_csv, "jsonl": _read_jsonl, "parquet": _read_parquet}


def _as_found(batch: pa.RecordBatch, extra: Any, url: str, threads: int) -> pa.RecordBatch:
    names = batch.schema.names
    if "uri" not in names:
        raise UserError(f"sources: {url}: no column `uri`; there are {', '.join(names)}")
    uris = _text(batch["uri"])
    if uris.null_count:
        raise UserError(f"sources: {url}: {uris.null_count} rows have no uri")
    uris = _resolved(uris, url)
    sized = "bytes" in names and not batch["bytes"].null_count
    columns = {
        "uri": uris,
        "bytes": batch["bytes"].cast(pa.int64()) if sized else _sizes(uris, threads),
        "etag": _text(batch["etag"]) if "etag" in names else pa.nulls(len(batch), pa.string()),
        "extra": extra,
    }
    return pa.RecordBatch.from_pydict(columns, schema=FOUND)


def _text(column: Any) -> Any:
    text = column.cast(pa.string())
    return pc.if_else(pc.equal(text, ""), None, text)


def _resolved(uris: Any, manifest: str) -> Any:
    """Relative URIs count from the manifest's folder."""
    relative = pc.invert(pc.or_(pc.match_substring(uris, "://"), pc.starts_with(uris, "/")))
    if not pc.any(relative).as_py():
        return uris
    folder = storage.absolute(manifest).rpartition("/")[0] + "/"
    return pc.if_else(relative, pc.binary_join_element_wise(folder, uris, ""), uris)


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


def _objects(batch: pa.RecordBatch) -> Any:
    """All columns but our own as a JSON object a row. Built from columns, since a million small dicts take many seconds."""
    names = sorted(name for name in batch.schema.names if name not in _OURS)
    if not names:
        return pa.nulls(len(batch), pa.string())
    parts = [part for name in names for part in (f", {json.dumps(name)}: ", _values(batch[name]))]
    return pc.binary_join_element_wise("{" + parts[0][2:], *parts[1:], "}", "")


def _values(column: Any) -> Any:
    """A column of JSON values."""
    if pa.types.is_integer(column.type):
        text = column.cast(pa.string())
    elif pa.types.is_string(column.type):
        text = pc.binary_join_element_wise('"', column, '"', "")
        special = pc.fill_null(pc.match_substring_regex(column, r'["\\\x00-\x1f]'), False)
        if pc.any(special).as_py():
            escaped = [json.dumps(value) for value in column.filter(special).to_pylist()]
            text = pc.replace_with_mask(text, special, pa.array(escaped, pa.string()))
    else:
        text = pa.array([json.dumps(value, default=str) for value in column.to_pylist()], pa.string())
    return pc.fill_null(text, "null")


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rsplit("/", 1)[-1].rpartition(".")
    return suffix.lower() if dot and stem else ""


def _hidden(name: str, root: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix(root).split("/"))


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")
