"""One file a split in place of thousands of small indexes, so that a large dataset opens fast.

`compact/SPLIT.parquet` holds the rows of all base indexes with a column `shard`. Its commit record is
`compact/SPLIT.shards.parquet`, a row a shard in order. Both are derived and may be deleted: the indexes stay the truth.
A shard's rows are taken from here only while its index is listed with the size and time of change (or the store's
tag) that it had then; all others, new or replaced, are read from their own indexes. So stale is slow, never wrong.
"""

import hashlib
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longtake.datasets import index, schema, storage
from longtake.datasets.errors import Failure

_FOLDER = "compact"
_ROWS = schema.INDEX.append(pa.field("shard", pa.string()))
_SHARDS = pa.schema(
    [
        ("name", pa.string()),
        ("index_stamp", pa.string()),  # of the index file when it was folded in
        ("tar_bytes", pa.int64()),
        ("tar_sha256", pa.string()),
        ("rows", pa.int64()),
    ]
)


def write(dataset: str, split: str) -> int:
    """Fold the indexes of a split into its compact file. Returns how many shards it covers."""
    # listed before they are read: an index replaced meanwhile no longer has its stamp
    stamps = _stamps(dataset, split)
    with ThreadPoolExecutor(16) as pool:
        shards = list(pool.map(lambda name: index.read_shard(dataset, split, name), stamps))
    data = index.to_parquet(pa.concat_tables([_ROWS.empty_table(), *map(_named, shards)]))
    storage.write(storage.join(dataset, _FOLDER, f"{split}.parquet"), data)
    rows = (
        {
            "name": s.name,
            "index_stamp": stamps[s.name],
            "tar_bytes": s.tar_bytes,
            "tar_sha256": s.tar_sha256,
            "rows": len(s.table),
        }
        for s in shards
    )
    url = storage.join(dataset, _FOLDER, f"{split}.shards.parquet")
    index.write_index(url, rows, _SHARDS, len(data), hashlib.sha256(data).hexdigest())
    return len(shards)


def open_split(dataset: str, split: str) -> tuple[pa.Table, list[index.Shard]]:
    """What `index.read_all` and `index.read_shards` give, from the compact file where it covers them.

    A compact file that is stale or damaged costs a warning on stderr and the time to read the indexes themselves.

    Raises:
        Failure: an index that has to be read itself is damaged.
    """
    stamps = _stamps(dataset, split)
    table, covered = _ROWS.empty_table(), {}
    try:
        table, recorded = _read(dataset, split)
        covered = {n: row for n, row in recorded.items() if row["index_stamp"] and row["index_stamp"] == stamps.get(n)}
        if len(covered) < len(recorded):
            changed = len(recorded) - len(covered)
            _warn(
                f"{storage.join(dataset, _FOLDER)}: {changed} {split} indexes are not those that were folded in",
                dataset,
            )
    except Failure as e:
        _warn(str(e), dataset)
    with ThreadPoolExecutor(16) as pool:
        own = [name for name in stamps if name not in covered]
        read = {s.name: s for s in pool.map(lambda name: index.read_shard(dataset, split, name), own)}
    rows = table.drop_columns(["shard"])
    pieces, shards, start, end = [_ROWS.empty_table()], [], 0, 0
    for name in stamps:
        row = covered.get(name)
        if row is None:
            pieces += [table.slice(start, end - start), _named(read[name])]
            start = end
            shards.append(read[name])
            continue
        # shards that lie one after the other stay one piece
        if row["start"] != end:
            pieces.append(table.slice(start, end - start))
            start = row["start"]
        end = row["start"] + row["rows"]
        own_rows = rows.slice(row["start"], row["rows"])
        shards.append(index.Shard(split, name, row["tar_bytes"], row["tar_sha256"], own_rows))
    return pa.concat_tables([*pieces, table.slice(start, end - start)]), shards


def problems(dataset: str, split: str) -> Iterator[str]:
    """A line if the compact file of a split is damaged."""
    try:
        _read(dataset, split)
    except Failure as e:
        yield f"{e}; {_remedy(dataset)}"


def _read(dataset: str, split: str) -> tuple[pa.Table, dict[str, dict[str, Any]]]:
    """The rows of a compact file and `{shard: its row of _SHARDS, with "start"}`; nothing where there is none.

    Raises:
        Failure: it is damaged, or was being written.
    """
    if not storage.exists(storage.join(dataset, _FOLDER, f"{split}.shards.parquet")):
        return _ROWS.empty_table(), {}
    try:
        record = index.read_shard(dataset, _FOLDER, f"{split}.shards")
        url = storage.join(dataset, _FOLDER, f"{split}.parquet")
        data = storage.retrying(url, lambda: storage.read(url))
    except (Failure, FileNotFoundError) as e:
        raise Failure(f"{storage.join(dataset, _FOLDER)}: the compact {split} index is damaged or half there") from e
    if hashlib.sha256(data).hexdigest() != record.tar_sha256:
        raise Failure(f"{url}: damaged, or just being written")
    table = pq.read_table(pa.BufferReader(data))
    if table.schema != _ROWS or record.table.schema.remove_metadata() != _SHARDS:
        raise Failure(f"{url}: written by another version of longtake")
    recorded, start = {}, 0
    for row in record.table.to_pylist():
        recorded[row["name"]] = row | {"start": start}
        start += row["rows"]
    return table, recorded


def _named(shard: index.Shard) -> pa.Table:
    """A shard's rows with the column `shard`."""
    names = pa.repeat(pa.scalar(shard.name, pa.string()), len(shard.table))
    return shard.table.replace_schema_metadata(None).append_column("shard", names)


def _stamps(dataset: str, split: str) -> dict[str, str]:
    """`{shard: size and tag or time of change of its base index}`, sorted; from one listing. Empty stamp: not known."""
    fs, path = storage.filesystem(storage.join(dataset, split))
    names = set(index.shard_names(dataset, split))
    entries = {
        e["name"].rsplit("/", 1)[-1].removesuffix(".parquet"): e for e in (fs.ls(path, detail=True) if names else ())
    }
    return {name: _stamp(entries.get(name, {})) for name in sorted(names)}


def _stamp(entry: dict[str, Any]) -> str:
    changed = next((entry[tag] for tag in ("ETag", "etag", "mtime", "LastModified", "created") if entry.get(tag)), None)
    return f"{entry['size']} {changed}" if changed else ""


def _remedy(dataset: str) -> str:
    return f"run `longtake dataset compact {dataset}` again, or delete its folder {_FOLDER}"


def _warn(what: str, dataset: str) -> None:
    print(f"warning: {what}; {_remedy(dataset)}", file=sys.stderr)
