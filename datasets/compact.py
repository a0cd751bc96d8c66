"""The index rows of a split by shard: from one compact file instead of thousands of small indexes, or from the indexes.

`compact/SPLIT.arrow` has the rows of all indexes, to be mapped into memory; `compact/SPLIT.facts.parquet` the columns that
every opening reads; `compact/SPLIT.shards.parquet` a row a shard and the commit record of both. A cache column has the same
three, named SPLIT.COLUMN. All are derived and may be deleted: the indexes stay the truth. A shard's rows are checked
against its index's own digest when they are first used.

What it gives up: opening does not notice that an index was replaced by another of the same name. `dataset verify` and the
checksum of a sample do.
"""

import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, fields
from functools import cached_property, partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longtake.datasets import index, later, schema, storage
from longtake.datasets.cache import Cache
from longtake.datasets.errors import Failure
from longtake.datasets.masking import shown
from longtake.datasets.shard import sha256_of

FACTS = ("frame_count", "height", "width", "label")
_FOLDER = "compact"
_NOTES = b"longtake.compact"
_ROWS_A_BATCH = 1 << 17
_TABLES, _LISTS = 4096, 64  # shards whose rows are kept in memory, as tables and as lists
_SHARDS = pa.schema(
    [
        ("name", pa.string()),
        ("rows", pa.int64()),
        ("tar_bytes", pa.int64()),
        ("tar_sha256", pa.string()),
        ("format", pa.int32()),
        ("rows_sha256", pa.string()),  # the index's own digest of its rows
    ]
)


@dataclass
class Rows:
    """The rows of S shards. Travels to other processes as the path of their compact file, where there is one."""

    dataset: str
    split: str
    shards: pa.Table  # of _SHARDS
    data: str | pa.Table  # the path of a local Arrow file, or the rows themselves
    offsets: np.ndarray  # (S,) where each shard's rows begin in it
    later: frozenset[str] = frozenset()  # names of shards with annotations that came later (see later.py)
    _tables: dict[int, pa.Table] = field(default_factory=dict)
    _lists: dict[int, "_Lists"] = field(default_factory=dict)
    _tars: dict[int, tuple[str, int, str]] = field(default_factory=dict)
    _annotations: dict[int, dict[str, dict[str, Any]]] = field(default_factory=dict)

    @cached_property
    def counts(self) -> np.ndarray:
        """(S,) rows of each shard."""
        return self.shards["rows"].to_numpy()

    @cached_property
    def starts(self) -> np.ndarray:
        """(S,) number of each shard's first row."""
        return np.cumsum(self.counts) - self.counts

    @cached_property
    def digest(self) -> str:
        """A digest of the shards' content; equal only if every byte of every tar, or every row of a table, is equal."""
        facts = [self.shards[name].to_pylist() for name in ("name", "tar_sha256", "tar_bytes", "rows")]
        # of a column without tars the rows are all that there is
        facts[1] = [tar or rows for tar, rows in zip(facts[1], self.shards["rows_sha256"].to_pylist(), strict=True)]
        return hashlib.sha256(json.dumps([self.split, *facts]).encode()).hexdigest()

    @cached_property
    def _table(self) -> pa.Table:
        return self.data if isinstance(self.data, pa.Table) else pa.ipc.open_file(pa.memory_map(self.data)).read_all()

    def only(self, names: Sequence[str]) -> "Rows":
        """The rows of the shards of these names, in this order. Raises KeyError where there is no such shard."""
        by_name = {name: number for number, name in enumerate(self.shards["name"].to_pylist())}
        numbers = np.array([by_name[name] for name in names], np.int64)
        return Rows(self.dataset, self.split, self.shards.take(numbers), self.data, self.offsets[numbers], self.later)

    def name(self, shard: int) -> str:
        return self.shards["name"][shard].as_py()

    def tar(self, shard: int) -> tuple[str, int, str]:
        """URL, size and sha256 of a shard's tar."""
        if (tar := self._tars.get(shard)) is None:
            name, size, sha256 = (self.shards[c][shard].as_py() for c in ("name", "tar_bytes", "tar_sha256"))
            tar = self._tars[shard] = storage.join(self.dataset, self.split, f"{name}.tar"), size, sha256
        return tar

    def row(self, shard: int, number: int) -> dict[str, Any]:
        """Row `number` of a shard, without its scores."""
        lists = self.lists(shard)
        return {name: lists[name][number] for name in lists.names}

    def lists(self, shard: int) -> "_Lists":
        """The columns of a shard by name, each turned into a list when it is first used."""
        if (lists := self._lists.get(shard)) is None:
            if len(self._lists) >= _LISTS:
                self._lists = {}
            lists = self._lists[shard] = _Lists(self.labelled(shard))
        return lists

    def annotations(self, shard: int) -> dict[str, dict[str, Any]]:
        """The annotations of a shard that came after it was cut, by source."""
        if self.name(shard) not in self.later:
            return {}
        if (by_source := self._annotations.get(shard)) is None:
            if len(self._annotations) >= _LISTS:
                self._annotations = {}
            by_source = self._annotations[shard] = later.of_clips(self.dataset, self.split, self.name(shard))
        return by_source

    def labelled(self, shard: int) -> pa.Table:
        """The rows of one shard, with the latest labels."""
        annotations = self.annotations(shard)
        return later.labelled(self.of(shard), annotations) if annotations else self.of(shard)

    def of(self, shard: int) -> pa.Table:
        """The rows of one shard, as its index has them. Raises Failure where the compact file has others."""
        if (rows := self._tables.get(shard)) is not None:
            return rows
        facts = self.shards.slice(shard, 1).drop_columns("rows").to_pylist()[0]
        url = storage.join(self.dataset, self.split, f"{facts['name']}.parquet")
        try:
            rows = self._table.slice(int(self.offsets[shard]), int(self.counts[shard]))
            # before any use: damage may have put an offset outside the file
            rows.validate(full=True)
            committed = index.is_committed(url, index.Shard(self.split, table=rows, **facts))
        except (pa.ArrowException, OSError, MemoryError, OverflowError):
            committed = False
        if not committed:
            where = storage.join(self.dataset, _FOLDER)
            raise Failure(f"{where}: damaged, other rows than {url} has; {_remedy(self.dataset)}")
        # emptied in one call: several threads use it
        if len(self._tables) >= _TABLES:
            self._tables.clear()
        self._tables[shard] = rows
        return rows

    def __getstate__(self) -> dict[str, Any]:
        return {f.name: {} if f.name.startswith("_") else getattr(self, f.name) for f in fields(self)}


class _Lists(dict[str, list[Any]]):
    """The columns of a table as lists: value by value they would take longer than the sample itself."""

    def __init__(self, table: pa.Table) -> None:
        super().__init__()
        self.names = [name for name in table.column_names if name not in schema.SCORES]
        self._table = table

    def __missing__(self, name: str) -> list[Any]:
        values = self[name] = self._table[name].to_pylist()
        return values


def write(dataset: str, split: str, column: str | None = None) -> int:
    """Write the compact files of a split, or of its cache column. Returns the number of shards that they cover."""
    plans = index.table_names(storage.join(dataset, "plan"))
    names = index.shard_names(dataset, split, column)
    shards, facts = [], []
    with storage.spool_folder(dataset) as spool, storage.staged(_url(dataset, split, column, "arrow")) as path:
        rows_schema = schema.COLUMN_INDEX if column else schema.INDEX
        # the index of a column may have more than the common part, as its first shard shows
        if names:
            rows_schema = index.read_shard(dataset, split, names[0]).table.schema.remove_metadata()
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, rows_schema) as writer:
            for group in _in_groups(_read(dataset, split, names)):
                shards += [_shard_row(s) for s in group]
                table = pa.concat_tables([s.table.replace_schema_metadata(None) for s in group])
                writer.write_table(table.combine_chunks())
                facts.append(table.select([name for name in FACTS if name in rows_schema.names]))
        notes = {"plans": plans, "bytes": path.stat().st_size, "sha256": sha256_of(path)}
        notes["whole"] = column is None and _planned(dataset, split, plans) == set(names)
        # which each opening needs, and which takes a fifth of a second of 200,000 shards
        notes["digest"] = _rows(dataset, split, pa.Table.from_pylist(shards, schema=_SHARDS), str(path)).digest
        table = pa.concat_tables(facts) if facts else schema.INDEX.empty_table().select(FACTS)
        local = spool / "facts.parquet"
        pq.write_table(table.replace_schema_metadata({_NOTES: json.dumps(notes).encode()}), local, compression="zstd")
        data = local.read_bytes()
    storage.write(_url(dataset, split, column, "facts.parquet"), data)
    record = _url(dataset, split, column, "shards.parquet")
    index.write_index(record, shards, _SHARDS, len(data), hashlib.sha256(data).hexdigest())
    return len(shards)


def open_split(
    dataset: str, split: str, column: str | None = None, cache: Cache | None = None
) -> tuple[Rows, pa.Table]:
    """The rows of all committed shards of a split, or of its cache column, and the columns `FACTS` of all rows.

    They are read from the compact files where these cover all shards; else from the indexes, which takes longer, with a
    warning on stderr where there is a compact file.

    Raises:
        Failure: an index that has to be read itself is damaged.
    """
    try:
        if compact := _read_compact(dataset, split, column):
            shards, facts, notes = compact
            complete = notes["whole"] and notes["plans"] == index.table_names(storage.join(dataset, "plan"))
            if complete or shards["name"].to_pylist() == index.shard_names(dataset, split, column):
                local = _local(dataset, split, column, notes, cache)
                opened = _rows(dataset, split, shards, local)
                if "digest" in notes:
                    vars(opened)["digest"] = notes["digest"]
                return _relabelled(opened, facts, column)
            raise Failure(f"{storage.join(dataset, _FOLDER)}: the {split} indexes are not those that were folded in")
    except Failure as e:
        print(shown(f"warning: {e}; {_remedy(dataset)}"), file=sys.stderr)
    read = list(_read(dataset, split, index.shard_names(dataset, split, column)))
    empty = (schema.COLUMN_INDEX if column else schema.INDEX).empty_table()
    rows = pa.concat_tables([s.table.replace_schema_metadata(None) for s in read] or [empty])
    shards = pa.Table.from_pylist([_shard_row(s) for s in read], schema=_SHARDS)
    facts = rows.select([name for name in FACTS if name in rows.column_names])
    opened = _rows(dataset, split, shards, rows)
    # checked as they were read
    opened._tables |= {n: s.table.replace_schema_metadata(None) for n, s in enumerate(read[:_TABLES])}
    return _relabelled(opened, facts, column)


def _relabelled(rows: Rows, facts: pa.Table, column: str | None) -> tuple[Rows, pa.Table]:
    """Rows and facts with the annotations that came later, which only base shards have."""
    names = [] if column else rows.shards["name"].to_pylist()
    if not names or not (changed := later.shards(rows.dataset, rows.split).intersection(names)):
        return rows, facts
    rows.later = frozenset(changed)
    # the rows of other shards stay as they are: ten million labels one by one would take ten seconds
    labels, parts, end = facts["label"], list[pa.Array](), 0
    is_encoded = pa.types.is_dictionary(labels.type)
    for number, name in enumerate(names):
        if name in changed:
            start = int(rows.starts[number])
            annotated = rows.labelled(number)["label"].combine_chunks()
            parts += [
                *labels.slice(end, start - end).chunks,
                annotated.dictionary_encode() if is_encoded else annotated,
            ]
            end = start + int(rows.counts[number])
    joined = pa.chunked_array([*parts, *labels.slice(end).chunks], labels.type)
    joined = joined.unify_dictionaries() if is_encoded else joined
    return rows, facts.set_column(facts.column_names.index("label"), "label", joined)


def table(dataset: str, split: str) -> pa.Table:
    """All rows of a split with a column `shard`, checked."""
    return rows_of(open_split(dataset, split)[0])


def rows_of(rows: Rows) -> pa.Table:
    """The same of rows that are open."""
    empty = schema.INDEX.append(pa.field("shard", pa.string())).empty_table()
    parts = [
        rows.labelled(n).append_column("shard", pa.repeat(rows.name(n), int(rows.counts[n])))
        for n in range(len(rows.shards))
    ]
    return pa.concat_tables([empty, *parts])


def forget(dataset: str, split: str, column: str) -> None:
    """Delete the compact files of a column whose shards are going to change."""
    # the record first: without it the others count as nothing
    for ending in ("shards.parquet", "facts.parquet", "arrow"):
        fs, path = storage.filesystem(_url(dataset, split, column, ending))
        with suppress(FileNotFoundError):
            storage.retrying(path, partial(fs.rm_file, path))


def problems(dataset: str, split: str) -> Iterator[str]:
    """A line for each damage in the compact files of a split."""
    columns = {n.split(".")[1] for n in storage.names(storage.join(dataset, _FOLDER)) if n.startswith(f"{split}.")}
    for column in [None, *sorted(columns - {"arrow", "facts", "shards"})]:
        try:
            if compact := _read_compact(dataset, split, column):
                shards, _, notes = compact
                with tempfile.TemporaryDirectory() as spool:
                    path = Path(spool) / "rows.arrow"
                    _fetch(_url(dataset, split, column, "arrow"), path, notes)
                    rows = _rows(dataset, split, shards, str(path))
                    for number, name in enumerate(shards["name"].to_pylist()):
                        rows.of(number)
                        if index.read_shard(dataset, split, name).table != rows.of(number):
                            raise Failure(f"{_url(dataset, split, column, 'arrow')}: {name} is not as its index")
        except Failure as e:
            yield f"{e}; {_remedy(dataset)}"


def _rows(dataset: str, split: str, shards: pa.Table, data: str | pa.Table) -> Rows:
    counts = shards["rows"].to_numpy()
    return Rows(dataset, split, shards, data, np.cumsum(counts) - counts)


def _read_compact(dataset: str, split: str, column: str | None) -> tuple[pa.Table, pa.Table, dict[str, Any]] | None:
    """The shards, facts and notes of the compact files; None where there are none. Raises Failure: damaged, or being written."""
    record = _url(dataset, split, column, "shards")
    if not storage.exists(f"{record}.parquet"):
        return None
    try:
        read = index.read_shard(dataset, _FOLDER, record.rpartition("/")[2])
        url = _url(dataset, split, column, "facts.parquet")
        data = storage.read(url)
    except (Failure, FileNotFoundError) as e:
        raise Failure(f"{storage.join(dataset, _FOLDER)}: the compact {split} index is damaged or half there") from e
    if hashlib.sha256(data).hexdigest() != read.tar_sha256:
        raise Failure(f"{url}: damaged, or just being written")
    labels = [name for name in pq.read_schema(pa.BufferReader(data)).names if name == "label"]
    facts = pq.ParquetFile(pa.BufferReader(data), read_dictionary=labels, pre_buffer=False).read()
    notes = json.loads((facts.schema.metadata or {}).get(_NOTES, b"{}"))
    if not notes or read.table.schema.remove_metadata() != _SHARDS:
        raise Failure(f"{url}: written by another version of longtake")
    return read.table, facts.replace_schema_metadata(None), notes


def _local(dataset: str, split: str, column: str | None, notes: dict[str, Any], cache: Cache | None) -> str:
    """The path of a local Arrow file, fetched where the dataset is remote."""
    url = _url(dataset, split, column, "arrow")
    if storage.is_local(url):
        path = storage.filesystem(url)[1]
        if not Path(path).exists() or Path(path).stat().st_size != notes["bytes"]:
            raise Failure(f"{url}: is missing or has another size")
        return path
    # shared by the processes of this host, which map it; named by its content, so never stale
    copy = (cache.folder if cache else Path(tempfile.gettempdir())) / f"longtake-{notes['sha256']}.arrow"
    if not copy.exists():
        with storage.staged(str(copy)) as spool:
            _fetch(url, spool, notes)
    return str(copy)


def _fetch(url: str, target: Path, notes: dict[str, Any]) -> None:
    fs, path = storage.filesystem(url)
    try:
        storage.retrying(url, lambda: fs.get_file(path, str(target)))
    except FileNotFoundError as e:
        raise Failure(f"{url}: is missing") from e
    if sha256_of(target) != notes["sha256"]:
        raise Failure(f"{url}: damaged, or just being written")


def _read(dataset: str, split: str, names: Sequence[str]) -> Iterator[index.Shard]:
    rest = iter(names)
    with ThreadPoolExecutor(16) as pool:
        while part := list(islice(rest, _TABLES)):
            yield from pool.map(lambda name: index.read_shard(dataset, split, name), part)


def _in_groups(shards: Iterator[index.Shard]) -> Iterator[list[index.Shard]]:
    """Shards in lists of at least `_ROWS_A_BATCH` rows."""
    group: list[index.Shard] = []
    rows = 0
    for shard in shards:
        group.append(shard)
        rows += len(shard.table)
        if rows >= _ROWS_A_BATCH:
            yield group
            group, rows = [], 0
    if group:
        yield group


def _shard_row(shard: index.Shard) -> dict[str, Any]:
    return {name: getattr(shard, name) for name in _SHARDS.names if name != "rows"} | {"rows": len(shard.table)}


def _planned(dataset: str, split: str, plans: Sequence[str]) -> set[str]:
    """Names of all shards that the plans of a dataset will make."""
    names = set[str]()
    for plan in plans:
        groups = index.from_parquet(storage.join(dataset, "plan", plan), ["split", "group"])
        mine = groups["group"].filter(pc.equal(groups["split"], split))
        names |= {f"{group:05d}" for group in pc.unique(mine).to_pylist()}
    return names


def _url(dataset: str, split: str, column: str | None, ending: str) -> str:
    return storage.join(dataset, _FOLDER, f"{split}.{column}.{ending}" if column else f"{split}.{ending}")


def _remedy(dataset: str) -> str:
    return f"run `longtake dataset compact {dataset}` again, or delete its folder {_FOLDER}"
