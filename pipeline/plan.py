"""Planning groups: who is the same video, which split, which shard. A plan is written once; a later one adds to it.

A source's identity is its size and a hash of samples of its bytes (or the store's own content tag), so a renamed or
copied video is known again; where it cannot be read, or its size is not known, it is its name. Split and place in the
order of work follow from the identity alone, never from names or listing order. Rows are sorted through buckets on the
local disk, so that memory does not grow with their number.
"""

import contextlib
import hashlib
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from longtake.datasets import annotations, index, later, schema, storage
from longtake.pipeline.changes import Changes
from longtake.pipeline.copies import separated
from longtake.pipeline.discover import find
from longtake.pipeline.fetch import Unread, part
from longtake.pipeline.retry import Tries, answering, by_name, read_tries, waiting
from longtake.pipeline.seen import Seen, batches

_SAMPLE_BYTES = 1 << 16
_ROWS_A_ROW_GROUP = 1 << 16
_ROWS_AT_ONCE = 1 << 18
_KNOWN = ("source", "uri", "split")
_NEW = ("source", "uri", "bytes", "extra", "sampled")
_UNKNOWN_IN_A_GROUP = 128  # sources of unknown size that fill it


def identify(found: pa.RecordBatch, threads: ThreadPoolExecutor) -> np.ndarray:
    """(N,) bytes of 20 hex digits: of a source's size and tag, or of its size and the bytes of its head, middle and tail.

    A source that is refused, or can only be read as a whole, goes by its name: nothing is known to be equal to it. One
    that is unreachable now waits for a run in which its content is known.
    """
    tags = pc.binary_join_element_wise(found["bytes"].cast(pa.string()), found["etag"], " ").to_pylist()
    ids = np.array(["" if tag is None else hashlib.sha256(tag.encode()).hexdigest()[:20] for tag in tags], "S20")
    rest = found.filter(pa.array(ids == b""))
    if len(rest):
        ids[ids == b""] = list(threads.map(_sampled, rest["uri"].to_pylist(), rest["bytes"].to_pylist()))
    return ids


def _sampled(uri: str, size: int | None) -> str:
    if size is None:
        return by_name(uri)
    digest = hashlib.sha256(str(size).encode())
    try:
        for start in sorted({max(0, at) for at in (0, size // 2, size - _SAMPLE_BYTES)}):
            end = min(start + _SAMPLE_BYTES, size)
            if end > start:
                digest.update(part(uri, size, start, end))
    except Unread as e:
        return waiting(uri) if e.reason == "unreachable" else by_name(uri)
    return digest.hexdigest()[:20]


def assign(
    buckets: Iterable[tuple[pa.Table, pa.Table]],
    first_group: Mapping[str, int],
    val_fraction: float,
    group_bytes: int,
    group_sources: int,
    swapped: str | None = None,
) -> Iterator[pa.Table]:
    """Plan rows for new sources: within a split in order of identity, cut into groups of bounded size.

    A source with the identity of another is its duplicate: it gets a row but is not decoded. One that is named twice
    has one row, with the annotations of both.

    Args:
        buckets: pairs of tables, each pair with all sources of a range of identities, ranges ascending: the new ones
            (columns source, uri, bytes, extra) and those of earlier plans (source, uri, split).
        first_group: the first free group of each split.
        swapped: the identity that goes to the other split than its own.
    """
    cuts = {split: _Groups(first_group[split]) for split in schema.SPLITS}
    for listed, known in buckets:
        new, ids = _one_a_name(listed)
        first = np.maximum.accumulate(np.where(np.append(True, ids[1:] != ids[:-1]), np.arange(len(ids)), 0))
        val = (_share(ids) < val_fraction) ^ (ids == (swapped or "").encode())
        repeats = first != np.arange(len(ids))
        originals = np.array(new["uri"].to_pylist(), object)[first]
        originals[~repeats] = None
        ours = {row["source"]: row for row in reversed(known.to_pylist())}
        for at, source in enumerate(ids.tolist() if ours else ()):
            if row := ours.get(source.decode()):
                val[at], repeats[at], originals[at] = row["split"] == "val", True, row["uri"]
        likely = pc.fill_null(new["bytes"], group_bytes // _UNKNOWN_IN_A_GROUP)
        sizes = np.where(repeats, 0, np.asarray(likely))
        for split in schema.SPLITS:
            rows = np.flatnonzero(val == (split == "val"))
            some = new.take(pa.array(rows))
            columns = {name: some[name] for name in ("source", "uri", "bytes", "extra")} | {
                "split": pa.repeat(split, len(rows)),
                "group": pa.array(cuts[split].take(sizes[rows], group_bytes, group_sources)),
                "duplicate_of": pa.array(originals[rows], pa.string()),
            }
            yield pa.table({name: columns[name] for name in schema.PLAN.names}, schema=schema.PLAN)


def _one_a_name(new: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """Rows and their identities in order of (identity, URI); a URI that is named again is one row with all annotations."""
    ids = np.array(new["source"].to_pylist(), "S20")
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    lengths = np.diff(np.append(starts, len(ids)))
    keep = np.ones(len(ids), bool)
    several: dict[int, str | None] = {}
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        some = order[start : start + length]
        names = np.array(new["uri"].take(pa.array(some)).to_pylist())
        within = np.argsort(names, kind="stable")
        order[start : start + length] = some = some[within]
        firsts = np.flatnonzero(np.append(True, names[within][1:] != names[within][:-1]))
        keep[start : start + length] = False
        keep[start + firsts] = True
        for rows in np.split(some, firsts[1:]):
            if len(rows) > 1:
                several[int(rows[0])] = annotations.merged(new["extra"].take(pa.array(rows)).to_pylist())
    order = order[keep]
    table = new.take(pa.array(order))
    if several:
        mask = np.isin(order, list(several))
        extra = pa.array([several[n] for n in order[mask].tolist()], pa.string())
        extra = pc.replace_with_mask(table["extra"].combine_chunks(), mask, extra)
        table = table.set_column(table.column_names.index("extra"), "extra", extra)
    return table, ids[order]


def _share(ids: np.ndarray) -> np.ndarray:
    """(N,) in [0, 1) from the last digits of each identity: independent of its place in the order."""
    digits = np.ascontiguousarray(ids).view("u1").reshape(len(ids), 20)[:, -8:].tobytes()
    return np.frombuffer(bytes.fromhex(digits.decode()), ">u4") / 2.0**32


@dataclass
class _Groups:
    """Numbers of groups for rows that come a part at a time."""

    number: int
    held_bytes: int = 0
    held_rows: int = 0

    def take(self, sizes: np.ndarray, most_bytes: int, most_rows: int) -> np.ndarray:
        """(N,) int32 for the next rows; a group exceeds `most_bytes` only if it is a single row."""
        groups = np.empty(len(sizes), np.int32)
        ends = np.cumsum(sizes)
        start = 0
        while start < len(sizes):
            before = int(ends[start - 1] if start else 0) - self.held_bytes
            fitting = int(np.searchsorted(ends, before + most_bytes, "right"))
            end = min(max(fitting, start + (not self.held_rows)), start + most_rows - self.held_rows, len(sizes))
            if end <= start:
                self.number, self.held_bytes, self.held_rows = self.number + 1, 0, 0
                continue
            groups[start:end] = self.number
            self.held_bytes, self.held_rows = int(ends[end - 1]) - before, self.held_rows + end - start
            start = end
        return groups


def plan(
    dataset: str, patterns: Sequence[str], val_fraction: float, group_bytes: int, group_sources: int, threads: int = 16
) -> list[dict[str, Any]]:
    """Bring the plan of a dataset up to date with the sources as they are now; returns its groups.

    Writes `plan/NNNNN.parquet` if there is anything new; of several drivers planning at once, one wins and all use
    its plan. At least one source of two or more goes to each split, so that a small dataset can be trained on and
    tested.

    Returns:
        `{"split", "group", "plan": file, "sources": how many}` for each group, in order.
    """
    folder = storage.join(dataset, "plan")
    while True:
        # named by what is there before reading: a plan that another driver writes meanwhile takes this name
        old = [storage.join(folder, name) for name in index.table_names(folder)]
        with storage.spool_folder(dataset) as spool, storage.failing_clearly(str(spool)):
            new, tries = _Buckets(spool / "new"), read_tries(dataset)
            seen, changes = Seen(old, tries), Changes(dataset, old, spool / "changes")
            awaited = {row["uri"]: row for row in tries.awaited if seen.times(row) == row["tries"]}
            for uri in _identified(changes.watch(find(patterns, threads)), seen, new, threads, awaited):
                del awaited[uri]
            _try_again(answering(list(awaited.values())), new)
            new.close()
            _keep(dataset, changes)
            if not new.count:
                return groups(dataset)
            known = _Buckets(spool / "known")
            for batch in chain.from_iterable(batches(url, _KNOWN) for url in old):
                # nothing repeats a source of which nothing was read
                known.add(_without(pa.table(batch), tries))
            known.close()
            added = assign(
                _told_apart(new, known, threads),
                _free(groups(dataset)),
                val_fraction,
                group_bytes,
                group_sources,
                new.first if not old and new.one_sided(val_fraction) else None,
            )
            target = spool / "plan.parquet"
            _write(target, added)
            if storage.write_if_absent(storage.join(folder, f"{len(old):05d}.parquet"), target):
                return groups(dataset)


def _keep(dataset: str, changes: Changes) -> None:
    known = {(group["split"], group["group"]): group for group in groups(dataset)} if changes.differ else {}
    if count := changes.keep(lambda split, group: sources_of(dataset, known[split, group])):
        print(
            f"shard: {count} sources have other columns in their manifest than before: kept in "
            f"{storage.join(dataset, later.FOLDER)}, for loaders and views; the tars stay as they were cut",
            file=sys.stderr,
        )


def _told_apart(new: "_Buckets", known: "_Buckets", threads: int) -> Iterator[tuple[pa.Table, pa.Table]]:
    with ThreadPoolExecutor(threads) as pool:
        for bucket in tqdm(sorted(new.names), "sort", unit="bucket", delay=2):
            ours = known.read(bucket)
            yield separated(new.read(bucket), ours, 2 * _SAMPLE_BYTES + 2, pool), ours


def _identified(
    found: Iterator[pa.RecordBatch], seen: Seen, into: "_Buckets", threads: int, awaited: Mapping[str, Any]
) -> set[str]:
    """Put what is new into buckets; returns which URIs of `awaited` are new, being listed with another size."""
    listed_anew = set[str]()
    with ThreadPoolExecutor(threads) as pool, tqdm(desc="identify", unit="source", unit_scale=True) as bar:
        for batch in found:
            new = seen.unseen(batch)
            if len(new):
                columns = {"source": pa.array(identify(new, pool).astype("U20")), "sampled": pc.is_null(new["etag"])}
                into.add(pa.table({name: columns[name] if name in columns else new[name] for name in _NEW}))
                if awaited:
                    listed_anew |= awaited.keys() & set(new["uri"].to_pylist())
            bar.update(len(batch))
    return listed_anew


def _try_again(rows: Sequence[Mapping[str, Any]], into: "_Buckets") -> None:
    """Plan sources that were unreachable once more; one whose content was known by then keeps its identity."""
    again = []
    for row in rows:
        nameless = row["source"] in (by_name(row["uri"]), waiting(row["uri"]))
        source = _sampled(row["uri"], row["bytes"]) if nameless else row["source"]
        if source == waiting(row["uri"]):
            continue
        again.append({name: row[name] for name in ("uri", "bytes", "extra")} | {"source": source, "sampled": nameless})
    if again:
        fields = [schema.PLAN.field(n) for n in ("source", "uri", "bytes", "extra")]
        into.add(pa.Table.from_pylist(again, pa.schema([*fields, ("sampled", pa.bool_())])))


def _without(known: pa.Table, tries: Tries) -> pa.Table:
    if not len(tries.unread):
        return known
    unread = pc.is_in(_joined(known), _joined(tries.unread))
    return known.filter(pc.invert(pc.or_(unread, pc.is_in(known["source"], tries.lost))))


def _joined(rows: pa.Table) -> pa.ChunkedArray:
    return pc.binary_join_element_wise(rows["source"], rows["uri"], " ")


class _Buckets:
    """Rows on the local disk, apart by the first two digits of their identity, to be sorted a bucket at a time."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self._folder, self._open, self._held = folder, contextlib.ExitStack(), list[pa.Table]()
        self._writers: dict[str, pa.ipc.RecordBatchStreamWriter] = {}
        self.names: set[str] = set()
        self.count = 0
        self.first, self._last, self._shares = "g", "", (1.0, 0.0)

    def add(self, table: pa.Table) -> None:
        self._held.append(table)
        self.count += len(table)
        if sum(map(len, self._held)) >= _ROWS_AT_ONCE:
            self._spill()

    def _spill(self) -> None:
        table = pa.concat_tables(self._held)
        ids = np.array(table["source"].to_pylist(), "S20")
        self._held.clear()
        order = np.argsort(ids, kind="stable")
        table, ids = table.take(pa.array(order)).combine_chunks(), ids[order]
        shares = _share(ids)
        self.first, self._last = min(self.first, ids[0].decode()), max(self._last, ids[-1].decode())
        self._shares = min(self._shares[0], float(shares.min())), max(self._shares[1], float(shares.max()))
        prefixes = ids.astype("S2")
        starts = np.flatnonzero(np.append(True, prefixes[1:] != prefixes[:-1]))
        for start, end in zip(starts.tolist(), [*starts[1:].tolist(), len(ids)], strict=True):
            name = prefixes[start].decode()
            if name not in self.names:
                self.names.add(name)
                file = self._open.enter_context((self._folder / name).open("wb"))
                self._writers[name] = self._open.enter_context(pa.ipc.new_stream(file, table.schema))
            self._writers[name].write_table(table.slice(start, end - start))

    def close(self) -> None:
        if self._held:
            self._spill()
        self._open.close()

    def read(self, name: str) -> pa.Table:
        if name not in self.names:
            return schema.PLAN.empty_table().select(_KNOWN)
        with (self._folder / name).open("rb") as f:
            return pa.ipc.open_stream(f).read_all()

    def one_sided(self, val_fraction: float) -> bool:
        """Whether all of several sources would fall into one split."""
        low, high = self._shares
        return 0 < val_fraction < 1 and self.first != self._last and (low < val_fraction) == (high < val_fraction)


def _free(planned: list[dict[str, Any]]) -> dict[str, int]:
    return {s: max((g["group"] + 1 for g in planned if g["split"] == s), default=0) for s in schema.SPLITS}


def _write(path: Path, tables: Iterable[pa.Table]) -> None:
    """Rows of a split together, in order, in small row groups: a task that reads its own group skips all others."""
    held: dict[str, list[pa.Table]] = {split: [] for split in schema.SPLITS}
    with pq.ParquetWriter(path, schema.PLAN, compression="zstd") as writer:
        for table in tables:
            if len(table):
                part = held[table["split"][0].as_py()]
                part.append(table)
                if sum(map(len, part)) >= _ROWS_A_ROW_GROUP:
                    writer.write_table(pa.concat_tables(part), _ROWS_A_ROW_GROUP)
                    part.clear()
        for part in held.values():
            if part:
                writer.write_table(pa.concat_tables(part), _ROWS_A_ROW_GROUP)


def groups(dataset: str) -> list[dict[str, Any]]:
    """The groups of all plans of a dataset (see `plan`)."""
    found = []
    folder = storage.join(dataset, "plan")
    for name in index.table_names(folder):
        counts = dict[tuple[str, int], int]()
        for batch in batches(storage.join(folder, name), ("split", "group")):
            counted = pa.table(batch).group_by(["split", "group"], use_threads=False).aggregate([([], "count_all")])
            for row in counted.to_pylist():
                key = row["split"], row["group"]
                counts[key] = counts.get(key, 0) + row["count_all"]
        found += [{"split": s, "group": g, "plan": name, "sources": count} for (s, g), count in counts.items()]
    return sorted(found, key=lambda g: (g["split"], g["group"]))


def sources_of(dataset: str, group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plan rows of one group, in the order in which they become clips, with the latest annotations."""
    fs, path = storage.filesystem(storage.join(dataset, "plan", group["plan"]))

    def read() -> pa.Table:
        # opened here: pyarrow would take a store that fails for one without this file
        with fs.open(path, "rb") as f:
            file = pq.ParquetFile(f)
            return file.read_row_groups([n for n in range(file.num_row_groups) if _may_hold(file, n, group["group"])])

    table = storage.retrying(path, read)
    mine = table.filter((pc.field("split") == group["split"]) & (pc.field("group") == group["group"])).to_pylist()
    known = {row["source"]: row["extra"] for row in later.read(dataset, group["split"], f"{group['group']:05d}")}
    return [row if row["duplicate_of"] else row | {"extra": known.get(row["source"], row["extra"])} for row in mine]


def _may_hold(file: pq.ParquetFile, row_group: int, group: int) -> bool:
    place = next(n for n, column in enumerate(file.schema) if column.path == "group")
    known = file.metadata.row_group(row_group).column(place).statistics
    return known is None or not known.has_min_max or known.min <= group <= known.max
