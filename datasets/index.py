"""A dataset's tables, read and written: dataset.json, indexes (the commit records), sources, plans."""

import hashlib
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longtake.datasets import schema, storage
from longtake.datasets.errors import Failure, UserError

_TAR, _NOTES = b"longtake.tar", b"longtake.notes"
# a plan made anew would give the numbers of its groups to other sources
PLAN_REMEDY = "bring the plan back from a copy, or delete the dataset and make it anew"


@dataclass(frozen=True)
class Shard:
    """One committed tar: its split and name ("00000"), its size and digest, its index."""

    split: str
    name: str
    tar_bytes: int
    tar_sha256: str
    table: pa.Table
    format: int = schema.FORMAT_VERSION
    rows_sha256: str = ""


def to_parquet(table: pa.Table) -> bytes:
    """Parquet bytes that depend on the table alone."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def from_parquet(url: str, columns: list[str] | None = None) -> pa.Table:
    """Read a table, or some of its columns. Raises Failure naming the file where it is not readable."""
    with _reading(url):
        # not read_table: its threads outlive it and have aborted processes that ended soon after
        return _columns(pq.ParquetFile(pa.BufferReader(storage.read(url))), columns)


def columns_of(url: str, columns: list[str]) -> pa.Table:
    """The same of columns beside others that are large: their bytes are not read, and so nothing checks them."""
    with _reading(url):
        return _columns(_in_ranges(url), columns).select(columns)


def null_counts(url: str) -> tuple[dict[str, int], int]:
    """The nulls of each column of a table of numbers, texts and lists that are never empty, and its rows, from its footer."""
    with _reading(url):
        metadata = _in_ranges(url).metadata
        counts = dict[str, int]()
        for group in map(metadata.row_group, range(metadata.num_row_groups)):
            for column in map(group.column, range(group.num_columns)):
                if column.statistics is None or not column.statistics.has_null_count:
                    raise ValueError("without statistics")
                name = column.path_in_schema.partition(".")[0]
                counts[name] = counts.get(name, 0) + column.statistics.null_count
        return counts, metadata.num_rows


def _in_ranges(url: str) -> pq.ParquetFile:
    # without threads of its own: they would call back into Python
    return pq.ParquetFile(pa.PythonFile(storage.Ranges(url), "r"), pre_buffer=False)


def _columns(file: pq.ParquetFile, columns: list[str] | None) -> pa.Table:
    if missing := set(columns or ()) - set(file.schema_arrow.names):
        raise ValueError(f"no column {', '.join(sorted(missing))}")
    return file.read(columns=columns)


@contextmanager
def _reading(url: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as e:
        raise Failure(f"{url}: is missing; run the stage that made it again") from e
    except (pa.ArrowException, OSError, ValueError, MemoryError) as e:
        is_plan = url.split("/")[-2:-1] == ["plan"]
        remedy = PLAN_REMEDY if is_plan else "delete it and run the stage that made it again"
        raise Failure(f"{url}: not a readable Parquet file ({' '.join(str(e).split())}); {remedy}") from e


def rows_table(rows: Iterable[Mapping[str, Any]], table_schema: pa.Schema) -> pa.Table:
    return pa.Table.from_pylist(list(rows), schema=table_schema)


def write_index(
    url: str,
    rows: Iterable[Mapping[str, Any]],
    table_schema: pa.Schema,
    tar_bytes: int,
    tar_sha256: str,
    notes: Mapping[str, Any] | None = None,
) -> None:
    """Commit a tar: from this moment it exists. `notes` are JSON values that `read_notes` returns."""
    _commit(url, rows_table(rows, table_schema), tar_bytes, tar_sha256, notes)


def _commit(url: str, table: pa.Table, tar_bytes: int, tar_sha256: str, notes: Mapping[str, Any] | None) -> None:
    record = {"format": schema.FORMAT_VERSION, "bytes": tar_bytes, "sha256": tar_sha256}
    record["rows_sha256"] = _rows_sha256(url, record, table)
    metadata = {_TAR: json.dumps(record, sort_keys=True).encode()}
    if notes is not None:
        text = json.dumps(notes, sort_keys=True)
        metadata[_NOTES] = json.dumps([text, hashlib.sha256(text.encode()).hexdigest()]).encode()
    storage.write(url, to_parquet(table.replace_schema_metadata(metadata)))


def read_notes(dataset: str, shard: Shard) -> dict[str, Any]:
    """The notes that `write_index` got for a shard. Raises Failure: there are none, or they are damaged."""
    return _notes(storage.join(dataset, shard.split, f"{shard.name}.parquet"), shard.table.schema)


def notes_of(dataset: str, split: str, name: str) -> dict[str, Any]:
    """The same of a shard whose rows are not read. Raises Failure as well where the file is missing or not readable."""
    url = storage.join(dataset, split, f"{name}.parquet")
    try:
        return _notes(url, _in_ranges(url).schema_arrow)
    except FileNotFoundError as e:
        raise Failure(f"{url}: missing; run the stage that made it again") from e
    except (pa.ArrowException, OSError) as e:
        # a stage leaves alone what is there
        raise Failure(f"{url}: not readable; delete it and run the stage that made it again") from e


def _notes(url: str, table_schema: pa.Schema) -> dict[str, Any]:
    try:
        text, digest = json.loads((table_schema.metadata or {})[_NOTES])
        if hashlib.sha256(text.encode()).hexdigest() != digest:
            raise ValueError("another checksum")
        return dict(json.loads(text))
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise Failure(f"{url}: its notes are missing or damaged; delete it and run the stage that made it again") from e


def read_shard(dataset: str, split: str, name: str) -> Shard:
    """The commit record of one tar, base ("00000") or column ("00000.frame_diff").

    Raises:
        Failure: it is missing, or is not what was committed under this name.
    """
    url = storage.join(dataset, split, f"{name}.parquet")
    table = from_parquet(url)
    remedy = "delete it and run the stage that made it again"
    try:
        record = json.loads((table.schema.metadata or {})[_TAR])
        shard = Shard(split, name, record["bytes"], record["sha256"], table, record["format"], record["rows_sha256"])
        committed = is_committed(url, shard)
    except (pa.ArrowException, ValueError, KeyError, TypeError, AttributeError) as e:
        raise Failure(f"{url}: not an index of this format; {remedy}") from e
    if not committed:
        raise Failure(f"{url}: damaged, its rows are not those that were committed; {remedy}")
    return shard


def is_committed(url: str, shard: Shard) -> bool:
    """Whether a shard has the rows that the index at `url` committed."""
    record = {"format": shard.format, "bytes": shard.tar_bytes, "sha256": shard.tar_sha256}
    return shard.rows_sha256 == _rows_sha256(url, record, shard.table)


def _rows_sha256(url: str, record: Mapping[str, Any], table: pa.Table) -> str:
    """A digest of an index: its split and name, the tar it commits, every row. Parquet itself checks none of these."""
    place = url.split("/")[-2:]
    digest = hashlib.sha256(
        json.dumps([place, record, [[f.name, _name(f.type)] for f in table.schema]], sort_keys=True).encode()
    )
    for column in table.columns:
        _feed(digest, column)
    return digest.hexdigest()


def _name(kind: pa.DataType) -> str:
    """The name of a type. Parquet gives the values of lists another name than Arrow does."""
    if pa.types.is_list(kind):
        return f"list<{_name(kind.value_type)}>"
    if pa.types.is_struct(kind):
        return f"struct<{', '.join(f'{field.name}: {_name(field.type)}' for field in kind)}>"
    return str(kind)


def _feed(digest: Any, column: pa.ChunkedArray) -> None:
    """Add the values of a column to a digest; of lists and structs those inside them."""
    digest.update(np.asarray(column.is_null()).tobytes())
    if pa.types.is_struct(column.type):
        for n in range(column.type.num_fields):
            _feed(digest, pc.struct_field(column, [n]))
    elif pa.types.is_list(column.type):
        digest.update(np.asarray(pc.list_value_length(column).fill_null(0)).tobytes())
        _feed(digest, pc.list_flatten(column))
    elif pa.types.is_string(column.type) or pa.types.is_binary(column.type):
        values = column.cast(pa.binary()).fill_null(b"")
        digest.update(np.asarray(pc.binary_length(values)).tobytes())
        for chunk in values.chunks if isinstance(values, pa.ChunkedArray) else [values]:
            digest.update(_bytes_of(chunk))
    else:
        nothing = False if pa.types.is_boolean(column.type) else 0
        digest.update(np.asarray(column.fill_null(nothing)).tobytes())


def _bytes_of(values: pa.BinaryArray) -> memoryview:
    """The values without nulls, one after the other, in place: an index has too many of them to be joined one by one."""
    _, offsets, data = values.buffers()
    if not len(values) or data is None:
        return memoryview(b"")
    places = np.frombuffer(offsets, np.int32, len(values) + 1, values.offset * 4)
    return memoryview(data)[places[0] : places[-1]]


def write_table(
    url: str, rows: Iterable[Mapping[str, Any]], table_schema: pa.Schema, notes: Mapping[str, Any] | None = None
) -> None:
    """Commit a shard of a column that is a table and no tar."""
    commit_table(url, rows_table(rows, table_schema), notes)


def commit_table(url: str, table: pa.Table, notes: Mapping[str, Any] | None = None) -> None:
    """The same for what is a table already."""
    _commit(url, table, 0, "", notes)


def is_table(column: str) -> bool:
    """Whether a column is a table and no tar."""
    return column.startswith(schema.TABLES)


def shard_names(dataset: str, split: str, column: str | None = None) -> list[str]:
    """Names of the committed tars of a split, sorted: base shards, or those of one cache column."""
    stems = [n.removesuffix(".parquet") for n in storage.names(storage.join(dataset, split)) if n.endswith(".parquet")]
    return [s for s in stems if s.partition(".")[2] == (column or "") and not s.startswith(".")]


def read_shards(dataset: str, split: str, column: str | None = None, threads: int = 16) -> list[Shard]:
    """All committed shards of a split, sorted by name."""
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda name: read_shard(dataset, split, name), shard_names(dataset, split, column)))


def read_all(dataset: str, split: str) -> pa.Table:
    """The indexes of a split as one table with an extra column `shard`."""
    shards = read_shards(dataset, split)
    tables = [s.table.append_column("shard", pa.array([s.name] * len(s.table), pa.string())) for s in shards]
    empty = schema.INDEX.append(pa.field("shard", pa.string())).empty_table()
    return pa.concat_tables([empty, *(t.replace_schema_metadata(None) for t in tables)])


def table_names(folder: str) -> list[str]:
    return [n for n in storage.names(folder) if n.endswith(".parquet") and not n.startswith(".")]


def read_tables(folder: str, table_schema: pa.Schema, names: Collection[str] | None = None) -> pa.Table:
    """All Parquet files of a folder, or those of some names, as one table."""
    urls = [storage.join(folder, n) for n in table_names(folder) if names is None or n in names]
    with ThreadPoolExecutor(16) as pool:
        tables = list(pool.map(from_parquet, urls))
    return pa.concat_tables([table_schema.empty_table(), *(t.replace_schema_metadata(None) for t in tables)])


def read_sources(dataset: str) -> pa.Table:
    """A row for each source, of its last try where it was planned again (see `last_tries`)."""
    return last_tries(read_tries(dataset))


def read_tries(dataset: str, committed: Collection[tuple[str, str]] | None = None) -> pa.Table:
    """A row for each time that a source was planned, or of those the ones of some shards alone, each a split and a name."""
    names = None if committed is None else {f"{split}-{name}.parquet" for split, name in committed}
    return read_tables(storage.join(dataset, "sources"), schema.SOURCES, names)


def last_tries(tries: pa.Table) -> pa.Table:
    """The rows without those of sources that were planned again, under the same URI, in another group: sources that could not
    be read, and copies of them.
    """
    unread = pc.fill_null(pc.is_in(tries["reason"], pa.array(schema.UNREAD)), False)
    if not pc.any(unread).as_py():
        return tries
    # a source that repeats another one is not a try
    related = pc.and_(pc.is_in(tries["uri"], tries["uri"].filter(unread)), pc.is_null(tries["duplicate_of"]))
    columns = [tries[name].filter(related).to_pylist() for name in ("uri", "bytes", "split", "group")]
    by_uri: dict[str, list[_Try]] = {}
    for row, failed, uri, size, split, group in zip(
        np.flatnonzero(related).tolist(), unread.filter(related).to_pylist(), *columns, strict=True
    ):
        by_uri.setdefault(uri, []).append(_Try(row, failed, size, (split, group)))
    superseded = {
        one.row for same in by_uri.values() for one in same if one.failed and any(map(one.is_repeated_by, same))
    }
    superseded |= _copies_of_unread(tries, unread)
    rows = [row for row in range(len(tries)) if row not in superseded]
    return tries.take(pa.array(rows, pa.int64())) if superseded else tries


def _copies_of_unread(tries: pa.Table, unread: pa.ChunkedArray) -> set[int]:
    """Rows of what could not be read, and of its duplicates, that have a later row or one that was read: the identity and the
    URI are the same.
    """
    alike = pc.is_in(tries["source"], tries["source"].filter(unread))
    columns = [tries[name].filter(alike).to_pylist() for name in ("source", "uri", "reason")]
    by_copy: dict[tuple[str, str], list[tuple[bool, int]]] = {}
    for row, source, uri, reason in zip(np.flatnonzero(alike).tolist(), *columns, strict=True):
        by_copy.setdefault((source, uri), []).append((reason not in (*schema.UNREAD, "duplicate"), row))
    return {row for same in by_copy.values() for read, row in same if not read and (read, row) != max(same)}


@dataclass(frozen=True)
class _Try:
    """One row of a source that was planned."""

    row: int
    failed: bool
    size: int | None
    group: tuple[str, int]

    def is_repeated_by(self, other: "_Try") -> bool:
        same = other.group != self.group and (self.size == other.size or None in (self.size, other.size))
        return same and (other.row > self.row or not other.failed)


def describe(dataset: str) -> dict[str, Any]:
    """The contents of dataset.json.

    Raises:
        UserError: there is no dataset at this URL, or it is of a newer format.
    """
    url = storage.join(dataset, "dataset.json")
    try:
        content = json.loads(storage.read(url))
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (FileNotFoundError, NotADirectoryError) as e:
        raise UserError(
            f"{dataset}: no dataset here (no dataset.json); name the folder that a `shard` stage wrote"
        ) from e
    except ValueError as e:
        raise Failure(f"{url}: damaged ({e}); delete it and run the `shard` stage again") from e
    if content.get("format", 0) > schema.FORMAT_VERSION:
        raise UserError(f"{url}: format {content['format']} is newer than this longtake reads; upgrade longtake")
    return content


def digest(shards: Iterable[Shard]) -> str:
    """A digest of the content of shards; equal only if every byte of every tar is equal."""
    record = [[s.split, s.name, s.tar_sha256, s.tar_bytes, len(s.table)] for s in shards]
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()


def committed(dataset: str) -> list[tuple[str, str]]:
    """Split and name of every committed base shard."""
    return [(split, name) for split in schema.SPLITS for name in shard_names(dataset, split)]


def summary(dataset: str, names: Collection[tuple[str, str]] | None = None) -> dict[str, Any]:
    """Counts that always add up: sources = good + rejected, clips cut = clips in shards.

    They are of all committed shards, or of `names`, each a split and a name: another driver may be writing more.
    """
    names = committed(dataset) if names is None else names
    with ThreadPoolExecutor(16) as pool:
        shards = list(pool.map(lambda name: read_shard(dataset, *name), names))
    tries = read_tries(dataset, names)
    sources = last_tries(tries)
    good = sources.filter(pc.equal(sources["status"], "good"))
    rejected = sources.filter(pc.equal(sources["status"], "rejected"))
    reasons = {v["values"]: v["counts"] for v in pc.value_counts(rejected["reason"]).to_pylist()}
    return {
        "sources": len(sources),
        "sources_good": len(good),
        "sources_rejected": len(rejected),
        "sources_tried_again": len(tries) - len(sources),
        "rejected_by_reason": dict(sorted(reasons.items())),
        "clips": sum(len(s.table) for s in shards),
        "clips_cut": pc.sum(sources["clips"]).as_py() or 0,
        "clips_dropped_short": pc.sum(sources["clips_dropped_short"]).as_py() or 0,
        "clip_seconds": sum((pc.sum(pc.divide(s.table["frame_count"], s.table["fps"])).as_py() or 0.0) for s in shards),
        "shards": len(shards),
        "tar_bytes": sum(s.tar_bytes for s in shards),
    }
