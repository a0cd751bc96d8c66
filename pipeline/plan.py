"""Plan groups: which sources are the same video, which split, which shard. A plan is written once; later ones add to it.

A source's identity is a hash of its size and samples of its bytes (or the store's content tag), so that a renamed or
copied video is recognized. Where the source cannot be read, or its size is unknown, its name is hashed. Split and place
in the order of work follow from the identity alone, never from names or listing order. Rows are sorted through buckets
on the local disk, so that memory does not grow with their number.
"""

import hashlib
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from tqdm import tqdm

from longtake.datasets import annotations, index, later, schema, storage
from longtake.datasets.errors import Failure
from longtake.pipeline.buckets import KNOWN, Buckets, ids_of, is_first, shares
from longtake.pipeline.changes import Changes
from longtake.pipeline.copies import separated
from longtake.pipeline.discover import find
from longtake.pipeline.fetch import Unread, part
from longtake.pipeline.listed import Listed
from longtake.pipeline.retry import Tries, answering, by_name, read_tries, waiting
from longtake.pipeline.seen import Seen, batches

_SAMPLE_BYTES = 1 << 16
_ROWS_A_ROW_GROUP = 1 << 16
_NEW_COLUMNS = ("source", "uri", "bytes", "extra", "sampled")
_UNSIZED_IN_A_GROUP = 128  # sources of unknown size that fill it


def identify(listing: pa.RecordBatch, threads: ThreadPoolExecutor) -> np.ndarray:
    """The identities of N sources, (N,) bytes of 20 hex digits.

    They are hashes of size and tag, or of size and the bytes of head, middle and tail. A source that is refused, or can
    only be read as a whole, gets the hash of its name: nothing is known to be equal to it. One that is unreachable now
    waits for a run in which its content is known.
    """
    tags = pc.binary_join_element_wise(listing["bytes"].cast(pa.string()), listing["etag"], " ")
    # bytes, and one hexadecimal text for all: a text each would take as long as the hashes
    digests = b"".join([hashlib.sha256(tag).digest()[:10] for tag in tags.drop_null().cast(pa.binary()).to_pylist()])
    ids, tagged = np.zeros(len(listing), "S20"), np.asarray(tags.is_valid())
    ids[tagged] = np.frombuffer(digests.hex().encode(), "S20")
    untagged = listing.filter(pa.array(~tagged))
    if len(untagged):
        ids[~tagged] = list(threads.map(_by_samples, untagged["uri"].to_pylist(), untagged["bytes"].to_pylist()))
    return ids


def _by_samples(uri: str, size: int | None) -> str:
    if size is None:
        return by_name(uri)
    digest = hashlib.sha256(str(size).encode())
    try:
        for start in sorted({max(0, offset) for offset in (0, size // 2, size - _SAMPLE_BYTES)}):
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
        buckets: pairs of tables, each pair with all sources of a range of identities, ranges ascending: new sources
            (columns source, uri, bytes, extra) and those of earlier plans (source, uri, split).
        first_group: the first free group of each split.
        group_bytes, group_sources: bounds of a group.
        swapped: the identity that goes to the other split.
    """
    groupings = {split: Grouping(first_group[split]) for split in schema.SPLITS}
    for listed, known in buckets:
        new, ids = _merged_by_uri(listed)
        numbers = np.arange(len(ids))
        first = np.maximum.accumulate(np.where(is_first(ids), numbers, 0))
        val = (shares(ids) < val_fraction) ^ (ids == (swapped or "").encode())
        repeats = first != numbers
        originals = np.full(len(ids), None, object)
        originals[repeats] = new["uri"].take(pa.array(first[repeats])).to_pylist()
        earlier = {row["source"]: row for row in reversed(known.to_pylist())}
        for n, source in enumerate(ids.tolist() if earlier else ()):
            if row := earlier.get(source.decode()):
                val[n], repeats[n], originals[n] = row["split"] == "val", True, row["uri"]
        sizes = np.asarray(pc.fill_null(new["bytes"], group_bytes // _UNSIZED_IN_A_GROUP))
        sizes = np.where(repeats, 0, sizes)
        for split in schema.SPLITS:
            rows = np.flatnonzero(val == (split == "val"))
            columns = dict(zip(new.column_names, new.take(pa.array(rows)).columns, strict=True)) | {
                "split": pa.repeat(split, len(rows)),
                "group": pa.array(groupings[split].assign(sizes[rows], group_bytes, group_sources)),
                "duplicate_of": pa.array(originals[rows], pa.string()),
            }
            yield pa.table({name: columns[name] for name in schema.PLAN.names}, schema=schema.PLAN)


def _merged_by_uri(new: pa.Table) -> tuple[pa.Table, np.ndarray]:
    """Rows and their identities in order of (identity, URI); rows of the same URI are merged, with all annotations."""
    ids = ids_of(new["source"])
    order = np.argsort(ids, kind="stable")
    starts = np.flatnonzero(is_first(ids[order]))
    lengths = np.diff(np.append(starts, len(ids)))
    keep = np.ones(len(ids), bool)
    extras: dict[int, str | None] = {}  # of merged rows
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        alike = order[start : start + length]
        uris = np.array(new["uri"].take(pa.array(alike)).to_pylist())
        by_uri = np.argsort(uris, kind="stable")
        order[start : start + length] = alike = alike[by_uri]
        firsts = np.flatnonzero(is_first(uris[by_uri]))
        keep[start : start + length] = False
        keep[start + firsts] = True
        for rows in np.split(alike, firsts[1:]):
            if len(rows) > 1:
                extras[int(rows[0])] = annotations.merged(new["extra"].take(pa.array(rows)).to_pylist())
    order = order[keep]
    table = new.take(pa.array(order))
    if extras:
        mask = np.isin(order, list(extras))
        extra = pa.array([extras[n] for n in order[mask].tolist()], pa.string())
        extra = pc.replace_with_mask(table["extra"].combine_chunks(), mask, extra)
        table = table.set_column(table.column_names.index("extra"), "extra", extra)
    return table, ids[order]


def share_of(uri: str, size: int) -> float:
    """Where a source of so many bytes and no tag stands between 0 and 1: it is held out where that is below `val_fraction`."""
    return float(shares(np.array([_by_samples(uri, size)], "S20"))[0])


@dataclass
class Grouping:
    """Assigns groups to rows that come a part at a time: the number of the open group, its bytes and rows so far."""

    number: int
    bytes: int = 0
    rows: int = 0

    def assign(self, sizes: np.ndarray, most_bytes: int, most_rows: int) -> np.ndarray:
        """The groups of the next N rows, (N,) int32; a group exceeds `most_bytes` only if it is a single row."""
        groups = np.empty(len(sizes), np.int32)
        ends = np.cumsum(sizes)
        start = 0
        while start < len(sizes):
            before = int(ends[start - 1] if start else 0) - self.bytes
            fitting = int(np.searchsorted(ends, before + most_bytes, "right"))
            end = min(max(fitting, start + (not self.rows)), start + most_rows - self.rows, len(sizes))
            if end <= start:
                self.number, self.bytes, self.rows = self.number + 1, 0, 0
                continue
            groups[start:end] = self.number
            self.bytes, self.rows = int(ends[end - 1]) - before, self.rows + end - start
            start = end
        return groups


def plan(
    dataset: str, patterns: Sequence[str], val_fraction: float, group_bytes: int, group_sources: int, threads: int = 16
) -> list[dict[str, Any]]:
    """Bring the plan of a dataset up to date with the sources as they are now; returns its groups.

    Writes `plan/NNNNN.parquet` if anything is new; of several drivers planning at once, one wins and all use its plan.
    Of two or more sources each split gets at least one, so that a small dataset can be trained on and tested.

    Returns:
        `{"split", "group", "plan": file, "sources": count}` for each group, in order.

    Raises:
        Failure: an earlier plan is missing.
    """
    while True:
        # numbered before reading: a plan that another driver writes meanwhile takes the number of this one
        old = _plans(dataset)
        with storage.spool_folder(dataset) as spool, storage.failing_clearly(str(spool)):
            new, tries, listed = Buckets(spool / "new"), read_tries(dataset), Listed(dataset, patterns)
            if not tries.awaited and listed.is_planned():
                return _checked_groups(dataset)
            seen, changes = Seen(old, tries), Changes(dataset, old, spool / "changes")
            awaited = {row["uri"]: row for row in tries.awaited if seen.times(row) == row["tries"]}
            listings = _with_copies(changes.watch(find(patterns, threads, listed.unsized)), awaited)
            for uri in _identify_new(listings, seen, new, threads, awaited):
                del awaited[uri]
            _write_changes(dataset, changes)
            # what is planned again takes the annotations of now
            _plan_again(dataset, answering(list(awaited.values())), new)
            new.close()
            # 38 bytes a planned source, before those are sorted
            del seen, changes
            if not new.count:
                listed.remember()
                return _checked_groups(dataset)
            known = Buckets(spool / "known")
            for batch in chain.from_iterable(batches(url, KNOWN) for url in old):
                # a source of which nothing was read has no duplicates
                known.add(_without_unread(pa.table(batch), tries))
            known.close()
            planned = _checked_groups(dataset)
            free = {s: max((g["group"] + 1 for g in planned if g["split"] == s), default=0) for s in schema.SPLITS}
            tables = assign(
                _sorted_buckets(new, known, threads),
                free,
                val_fraction,
                group_bytes,
                group_sources,
                new.first if not old and new.one_sided(val_fraction) else None,
            )
            target = spool / "plan.parquet"
            _write(target, tables)
            if storage.write_if_absent(storage.join(dataset, "plan", f"{len(old):05d}.parquet"), target):
                listed.remember()
                return groups(dataset)


def _plans(dataset: str) -> list[str]:
    """The URLs of all plans. Raises Failure where one is missing: its number would be given again."""
    folder = storage.join(dataset, "plan")
    names = index.table_names(folder)
    for number, name in enumerate(names):
        if name != f"{number:05d}.parquet":
            raise Failure(f"{folder}/{number:05d}.parquet: is missing; {index.PLAN_REMEDY}")
    return [storage.join(folder, name) for name in names]


def _checked_groups(dataset: str) -> list[dict[str, Any]]:
    """The groups of all plans. Raises Failure where a shard is of none: a new plan would give its number to other sources."""
    # before the plans: another driver may commit what it plans meanwhile
    shards = index.committed(dataset)
    planned = groups(dataset)
    known = {(group["split"], f"{group['group']:05d}") for group in planned}
    if lost := [f"{split}/{name}" for split, name in shards if (split, name) not in known]:
        url, example = storage.join(dataset, "plan"), lost[0]
        raise Failure(f"{url}: no plan has the groups of {len(lost)} shards, such as {example}; {index.PLAN_REMEDY}")
    return planned


def _write_changes(dataset: str, changes: Changes) -> None:
    planned = {(group["split"], group["group"]): group for group in groups(dataset)} if changes.differ else {}
    if count := changes.write(lambda split, group: sources_of(dataset, planned[split, group])):
        print(
            f"shard: {count} sources have other columns in their manifest than before: kept in "
            f"{storage.join(dataset, later.FOLDER)}, for loaders and views; the tars stay as they were cut",
            file=sys.stderr,
        )


def _sorted_buckets(new: Buckets, known: Buckets, threads: int) -> Iterator[tuple[pa.Table, pa.Table]]:
    with ThreadPoolExecutor(threads) as pool:
        for bucket in tqdm(sorted(new.names), "sort", unit="bucket", delay=2):
            earlier = known.read(bucket)
            yield separated(new.read(bucket), earlier, 2 * _SAMPLE_BYTES + 2, pool), earlier


def _identify_new(
    listings: Iterator[pa.RecordBatch], seen: Seen, new: Buckets, threads: int, awaited: Mapping[str, Any]
) -> set[str]:
    """Put new sources into buckets; returns the URIs of `awaited` among them, which are listed with another size."""
    resized = set[str]()
    with ThreadPoolExecutor(threads) as pool, tqdm(desc="identify", unit="source", unit_scale=True) as bar:
        for batch in listings:
            unseen = seen.unseen(batch)
            if len(unseen):
                sources = pa.array(identify(unseen, pool).astype("U20"))
                columns = {"source": sources, "sampled": pc.is_null(unseen["etag"])}
                columns |= {name: unseen[name] for name in ("uri", "bytes", "extra")}
                new.add(pa.table({name: columns[name] for name in _NEW_COLUMNS}))
                if awaited:
                    resized |= awaited.keys() & set(unseen["uri"].to_pylist())
            bar.update(len(batch))
    return resized


def _with_copies(listings: Iterable[pa.RecordBatch], awaited: Mapping[str, dict[str, Any]]) -> Iterator[pa.RecordBatch]:
    """Pass listings on, and give copies among `awaited` their annotations: nothing else compares those of what was not cut."""
    copies = {uri: list[str | None]() for uri, row in awaited.items() if row["duplicate_of"] is not None}
    for batch in listings:
        if copies:
            own = batch.filter(pc.is_in(batch["uri"], pa.array(copies, pa.string())))
            for uri, extra in zip(own["uri"].to_pylist(), own["extra"].to_pylist(), strict=True):
                copies[uri].append(extra)
        yield batch
    for uri, extras in copies.items():
        if extras and uri in awaited:
            awaited[uri]["extra"] = annotations.merged(extras)


def _plan_again(dataset: str, rows: Sequence[dict[str, Any]], new: Buckets) -> None:
    """Put sources that were not read into buckets; one whose content was already known keeps its identity."""
    again = []
    for row in _with_later(dataset, rows):
        unidentified = row["source"] in (by_name(row["uri"]), waiting(row["uri"]))
        source = _by_samples(row["uri"], row["bytes"]) if unidentified else row["source"]
        if source != waiting(row["uri"]):
            columns = {name: row[name] for name in ("uri", "bytes", "extra")}
            again.append(columns | {"source": source, "sampled": unidentified})
    if again:
        fields = [schema.PLAN.field(n) for n in ("source", "uri", "bytes", "extra")]
        new.add(pa.Table.from_pylist(again, pa.schema([*fields, ("sampled", pa.bool_())])))


def _with_later(dataset: str, rows: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Rows of planned sources with their latest annotations."""

    @cache
    def extras(split: str, group: int) -> dict[tuple[str, str], str | None]:
        found = later.read(dataset, split, f"{group:05d}")
        return {(row["source"], row["uri"]): row["extra"] for row in found}

    for row in rows:
        extra = extras(row["split"], row["group"]).get((row["source"], row["uri"]), row["extra"])
        yield row | {"extra": extra}


def _without_unread(known: pa.Table, tries: Tries) -> pa.Table:
    if not len(tries.unread):
        return known
    keys, unread_keys = (
        pc.binary_join_element_wise(rows["source"], rows["uri"], " ") for rows in (known, tries.unread)
    )
    unread = pc.or_(pc.is_in(keys, unread_keys), pc.is_in(known["source"], tries.lost))
    return known.filter(pc.invert(unread))


def _write(path: Path, tables: Iterable[pa.Table]) -> None:
    """Write rows of a split together, in order, in small row groups: a task that reads one group skips most of the file."""
    pending: dict[str, list[pa.Table]] = {split: [] for split in schema.SPLITS}
    with pq.ParquetWriter(path, schema.PLAN, compression="zstd") as writer:
        for table in tables:
            if len(table):
                part = pending[table["split"][0].as_py()]
                part.append(table)
                if sum(map(len, part)) >= _ROWS_A_ROW_GROUP:
                    writer.write_table(pa.concat_tables(part), _ROWS_A_ROW_GROUP)
                    part.clear()
        for part in pending.values():
            if part:
                writer.write_table(pa.concat_tables(part), _ROWS_A_ROW_GROUP)


def groups(dataset: str) -> list[dict[str, Any]]:
    """The groups of all plans of a dataset (see `plan`)."""
    planned = []
    folder = storage.join(dataset, "plan")
    for name in index.table_names(folder):
        counts = Counter[tuple[str, int]]()
        for batch in batches(storage.join(folder, name), ("split", "group")):
            rows = pa.table(batch).group_by(["split", "group"], use_threads=False).aggregate([([], "count_all")])
            counts.update({(row["split"], row["group"]): row["count_all"] for row in rows.to_pylist()})
        planned += [{"split": s, "group": g, "plan": name, "sources": count} for (s, g), count in counts.items()]
    return sorted(planned, key=lambda g: (g["split"], g["group"]))


def sources_of(dataset: str, group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plan rows of one group, in the order in which they become clips, with the latest annotations."""
    fs, path = storage.filesystem(storage.join(dataset, "plan", group["plan"]))

    def read() -> pa.Table:
        # opened here: pyarrow would report a failing store as a missing file
        with fs.open(path, "rb") as f:
            file = pq.ParquetFile(f)
            return file.read_row_groups([n for n in range(file.num_row_groups) if _may_hold(file, n, group["group"])])

    table = storage.retrying(path, read)
    rows = table.filter((pc.field("split") == group["split"]) & (pc.field("group") == group["group"])).to_pylist()
    return list(_with_later(dataset, rows))


def _may_hold(file: pq.ParquetFile, row_group: int, group: int) -> bool:
    column = next(n for n, column in enumerate(file.schema) if column.path == "group")
    bounds = file.metadata.row_group(row_group).column(column).statistics
    return bounds is None or not bounds.has_min_max or bounds.min <= group <= bounds.max
