"""Manifests: lists of sources with what is known of them, streamed in constant memory as Arrow batches."""

import json
from collections.abc import Iterator
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from longtake.datasets import storage
from longtake.datasets.errors import UserError

SUFFIXES = frozenset(("csv", "jsonl", "parquet"))
_BATCH_ROWS = 1 << 16
_BLOCK_BYTES = 1 << 22
_OURS = ("uri", "bytes", "etag")

# What is known of a source before it is read. `etag`: the store's own content tag, where it has one.
FOUND = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("etag", pa.string()), ("extra", pa.string())])


def is_manifest(name: str) -> bool:
    return suffix(name) in SUFFIXES


def suffix(name: str) -> str:
    stem, dot, ending = name.rsplit("/", 1)[-1].rpartition(".")
    return ending.lower() if dot and stem else ""


def read(url: str) -> Iterator[pa.RecordBatch]:
    """The rows of a manifest as batches of FOUND, `bytes` null where it does not say.

    Raises:
        UserError: it is missing, not readable, or has no column `uri`.
    """
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as f:
            for batch, extra in _READERS[suffix(url)](f):
                yield _as_found(batch, extra, url)
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


def _as_found(batch: pa.RecordBatch, extra: Any, url: str) -> pa.RecordBatch:
    names = batch.schema.names
    if "uri" not in names:
        raise UserError(f"sources: {url}: no column `uri`; there are {', '.join(names)}")
    uris = _text(batch["uri"])
    if uris.null_count:
        raise UserError(f"sources: {url}: {uris.null_count} rows have no uri")
    uris = _resolved(uris, url)
    columns = {
        "uri": uris,
        "bytes": batch["bytes"].cast(pa.int64()) if "bytes" in names else pa.nulls(len(batch), pa.int64()),
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
