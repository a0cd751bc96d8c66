"""Finding sources and planning groups. The plan is written once and never changed: a later one adds to it.

A source's identity is its size and a hash of samples of its bytes (or the store's own content tag), so a renamed or
copied video is known again. Split and place in the order of work follow from the identity alone, never from names or
listing order. All rows are Arrow columns, so that ten million of them fit.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.json
import pyarrow.parquet as pq
from tqdm import tqdm

from longtake.datasets import index, schema, storage
from longtake.datasets.errors import UserError

_SUFFIXES = """3g2 3gp asf avi av1 f4v flv gif h264 h265 hevc ivf m2ts m4v mjpeg mkv mov mp4 mpeg mpg mts mxf nut obu
ogm ogv rm rmvb ts vob webm wmv y4m"""
VIDEO_SUFFIXES = frozenset(_SUFFIXES.split())
MANIFEST_SUFFIXES = frozenset(("csv", "jsonl", "parquet"))
_SAMPLE_BYTES = 1 << 16
_ROWS_A_ROW_GROUP = 1 << 16

# What is known of a source before it is read. `etag`: the store's own content tag, where it has one.
FOUND = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("etag", pa.string()), ("extra", pa.string())])


def find(patterns: Sequence[str], threads: int = 16) -> pa.Table:
    """Expand files, folders, globs and manifests (fsspec URLs) to a table of FOUND. A file named twice has two rows.

    A folder gives every file below it whose suffix is a video's; a glob or a file is taken as it is. A manifest
    (.csv, .jsonl, .parquet) has a column `uri`, counted from its own folder where relative; perhaps `bytes` and
    `etag`, which spare a look at each file; all other columns (label, caption, licence ...) travel to the samples.

    Raises:
        UserError: a pattern matches nothing, or names nothing that exists; a manifest without `uri`.
    """
    parts = []
    for pattern in patterns:
        if _suffix(pattern) in MANIFEST_SUFFIXES and not _is_glob(pattern):
            parts.append(_read_manifest(pattern, threads))
            continue
        fs, path = storage.filesystem(pattern)
        entries, skipped = storage.retrying(pattern, partial(_expand, fs, path, pattern))
        if not entries:
            passed = ", ".join(f"{n} {s or 'without suffix'}" for s, n in skipped.most_common(3))
            only = f" (only {passed})" if passed else ""
            raise UserError(f"sources: {pattern}: no video there{only}; name a folder or glob that holds videos")
        local = storage.is_local(pattern)
        # other stores' tags say nothing of the content, or are not kept when a file moves
        tagged = "s3" in storage.protocols(fs)
        rows = [
            {
                "uri": entry["name"] if local else fs.unstrip_protocol(entry["name"]),
                "bytes": int(entry.get("size") or 0),
                "etag": str(entry["ETag"]).strip('"') if tagged and entry.get("ETag") else None,
                "extra": None,
            }
            for entry in entries
        ]
        parts.append(pa.Table.from_pylist(rows, schema=FOUND))
    found = pa.concat_tables(parts)
    if not len(found):
        raise UserError(f"sources: {', '.join(patterns)}: no source listed there")
    return found


def _read_manifest(url: str, threads: int) -> pa.Table:
    fs, path = storage.filesystem(url)
    readers = {"csv": pyarrow.csv.read_csv, "jsonl": pyarrow.json.read_json, "parquet": pq.read_table}
    try:
        with fs.open(path, "rb") as f:
            table = readers[_suffix(url)](f)
    except FileNotFoundError as e:
        raise UserError(f"sources: {url}: no such manifest") from e
    except (pa.ArrowException, OSError) as e:
        raise UserError(f"sources: {url}: not a readable manifest ({str(e).splitlines()[0]})") from e
    if "uri" not in table.column_names:
        raise UserError(f"sources: {url}: no column `uri`; there are {', '.join(table.column_names)}")
    uris = table["uri"].cast(pa.string())
    if uris.null_count:
        raise UserError(f"sources: {url}: {uris.null_count} rows have no uri")
    others = [name for name in table.column_names if name not in ("uri", "bytes", "etag")]
    uris = _resolved(uris, url)
    if "bytes" in table.column_names:
        sizes = table["bytes"].cast(pa.int64())
    else:
        sizes = pa.array(_sizes(uris.to_pylist(), threads), pa.int64())
    return pa.table(
        {
            "uri": uris,
            "bytes": sizes,
            "etag": table["etag"].cast(pa.string())
            if "etag" in table.column_names
            else pa.nulls(len(table), pa.string()),
            "extra": _as_json(table.select(others)) if others else pa.nulls(len(table), pa.string()),
        },
        schema=FOUND,
    )


def _resolved(uris: Any, manifest: str) -> Any:
    """Relative URIs count from the manifest's folder."""
    relative = pc.invert(pc.or_(pc.match_substring(uris, "://"), pc.starts_with(uris, "/")))
    if not pc.any(relative).as_py():
        return uris
    folder = storage.absolute(manifest).rpartition("/")[0] + "/"
    return pc.if_else(relative, pc.binary_join_element_wise(folder, uris, ""), uris)


def _sizes(uris: Sequence[str], threads: int) -> list[int]:
    def size(uri: str) -> int:
        fs, path = storage.filesystem(uri)
        try:
            return int(storage.retrying(uri, lambda: fs.size(path)) or 0)
        except (FileNotFoundError, PermissionError):
            # its group will reject it as missing
            return 0

    with ThreadPoolExecutor(threads) as pool:
        return list(tqdm(pool.map(size, uris), "sizes", len(uris), unit="source"))


def _as_json(table: pa.Table) -> pa.Array:
    return pa.array([json.dumps(row, sort_keys=True, default=str) for row in table.to_pylist()], pa.string())


def _expand(fs: Any, path: str, pattern: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    if _is_glob(path):
        files = [e for e in fs.glob(path, detail=True).values() if e["type"] == "file"]
        return files, Counter()
    try:
        info = fs.info(path)
    except FileNotFoundError as e:
        raise UserError(f"sources: {pattern}: no such file or folder") from e
    if info["type"] == "file" and not (pattern.startswith("http") and pattern.endswith("/")):
        return [info], Counter()
    entries = [e for e in fs.find(path, detail=True).values() if not _hidden(e["name"], path)]
    video = [e for e in entries if _suffix(e["name"]) in VIDEO_SUFFIXES]
    return video, Counter(_suffix(e["name"]) for e in entries) - Counter(_suffix(e["name"]) for e in video)


def _suffix(name: str) -> str:
    stem, dot, suffix = name.rsplit("/", 1)[-1].rpartition(".")
    return suffix.lower() if dot and stem else ""


def _hidden(name: str, root: str) -> bool:
    return any(part.startswith(".") for part in name.removeprefix(root).split("/"))


def _is_glob(path: str) -> bool:
    return any(c in path for c in "*?[")


def listing_digest(patterns: Sequence[str]) -> str:
    """Changes when a source appears, goes, or changes its size, tag or manifest columns. Reads no contents."""
    digest = hashlib.sha256()
    for batch in find(patterns).to_batches(1 << 16):
        digest.update(json.dumps(batch.to_pydict()).encode())
    return digest.hexdigest()


def identify(found: pa.Table, threads: int = 16) -> np.ndarray:
    """(N,) bytes of 20 hex digits: of a source's size and tag, or of its size and the bytes of its head, middle and tail.

    A file that cannot be read goes by its name; its group will reject it.
    """
    ids = np.empty(len(found), "S20")
    at = 0
    with (
        ThreadPoolExecutor(threads) as pool,
        tqdm(desc="identify", total=len(found), unit="source", disable=not len(found)) as bar,
    ):
        for batch in found.select(["uri", "bytes", "etag"]).to_batches(1 << 16):
            each = map if batch["etag"].null_count == 0 else pool.map
            ids[at : at + len(batch)] = list(each(_identity, *batch.to_pydict().values()))
            at += len(batch)
            bar.update(len(batch))
    return ids


def _identity(uri: str, size: int, etag: str | None) -> str:
    if etag:
        return hashlib.sha256(f"{size} {etag}".encode()).hexdigest()[:20]
    fs, path = storage.filesystem(uri)
    digest = hashlib.sha256(str(size).encode())
    try:
        for start in sorted({max(0, at) for at in (0, size // 2, size - _SAMPLE_BYTES)}):
            end = min(start + _SAMPLE_BYTES, size)
            if end > start:
                digest.update(storage.retrying(uri, partial(fs.cat_file, path, start=start, end=end)))
    except (FileNotFoundError, PermissionError):
        digest.update(uri.encode())
    return digest.hexdigest()[:20]


def assign(
    new: pa.Table,
    ids: np.ndarray,
    known: pa.Table,
    first_group: Mapping[str, int],
    val_fraction: float,
    group_bytes: int,
    group_sources: int,
) -> Iterator[pa.RecordBatch]:
    """Plan rows for new sources, by split, then in order of identity, cut into groups of bounded size.

    A source with the identity of another is its duplicate: it gets a row but is not decoded. At least one source of
    two or more goes to each split, so that a small dataset can be trained on and tested.

    Args:
        new: columns uri, bytes, extra.
        ids: (N,) their identities (see `identify`).
        known: columns source, uri, split of earlier plans.
        first_group: the first free group of each split.
    """
    if not len(new):
        return
    new = new.combine_chunks()
    order = _content_order(ids, new["uri"])
    ids = ids[order]
    first = np.maximum.accumulate(np.where(np.append(True, ids[1:] != ids[:-1]), np.arange(len(ids)), 0))
    val = _share(ids) < val_fraction
    # for each row the position of the row that it repeats, -1 for none
    repeats = np.where(first == np.arange(len(ids)), -1, order[first])
    del first
    originals = dict[int, str]()
    if len(known):
        ours = dict(zip(known["source"].to_pylist()[::-1], range(len(known) - 1, -1, -1), strict=True))
        for row, source in enumerate(ids.tolist()):
            if (at := ours.get(source.decode())) is not None:
                val[row], repeats[row] = known["split"][at].as_py() == "val", order[row]
                originals[row] = known["uri"][at].as_py()
    elif 0 < val_fraction < 1 and ids[0] != ids[-1] and val.all() == val.any():
        val[ids == ids[0]] ^= True
    sizes = np.where(repeats >= 0, 0, np.asarray(new["bytes"])[order])
    for split in schema.SPLITS:
        rows = np.flatnonzero(val == (split == "val"))
        groups = first_group[split] + _cut(sizes[rows], group_bytes, group_sources)
        # in slices, so that there is no second copy of all names
        for start in range(0, len(rows), _ROWS_A_ROW_GROUP):
            some = rows[start : start + _ROWS_A_ROW_GROUP]
            taken = new.take(pa.array(order[some]))
            repeated = new["uri"].take(pa.array(repeats[some], mask=repeats[some] < 0)).to_pylist()
            columns = {
                "source": pa.array(ids[some].astype("U20")),
                "uri": taken["uri"],
                "bytes": taken["bytes"],
                "split": pa.repeat(split, len(some)),
                "group": pa.array(groups[start : start + _ROWS_A_ROW_GROUP], pa.int32()),
                "duplicate_of": pa.array(
                    [originals.get(r, uri) for r, uri in zip(some.tolist(), repeated, strict=True)], pa.string()
                ),
                "extra": taken["extra"],
            }
            yield from pa.table(columns, schema=schema.PLAN).combine_chunks().to_batches()


def _content_order(ids: np.ndarray, uris: pa.ChunkedArray) -> np.ndarray:
    """Positions in order of (identity, URI), a URI that is named again left out."""
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    starts = np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1]))
    lengths = np.diff(np.append(starts, len(ids)))
    keep = np.ones(len(ids), bool)
    for start, length in zip(starts[lengths > 1].tolist(), lengths[lengths > 1].tolist(), strict=True):
        some = order[start : start + length]
        names = np.array(uris.take(pa.array(some)).to_pylist())
        within = np.argsort(names, kind="stable")
        order[start : start + length] = some[within]
        keep[start + 1 : start + length] = names[within][1:] != names[within][:-1]
    return order if keep.all() else order[keep]


def _share(ids: np.ndarray) -> np.ndarray:
    """(N,) in [0, 1) from the last digits of each identity: independent of its place in the order."""
    digits = ids.view("u1").reshape(len(ids), 20)[:, -8:].tobytes()
    return np.frombuffer(bytes.fromhex(digits.decode()), ">u4") / 2.0**32


def _cut(sizes: np.ndarray, most_bytes: int, most_rows: int) -> np.ndarray:
    """Group numbers from 0 of consecutive rows; a group exceeds `most_bytes` only if it is a single row."""
    ends = np.cumsum(sizes)
    groups = np.zeros(len(sizes), np.int32)
    start = number = 0
    while start < len(sizes):
        before = ends[start - 1] if start else 0
        end = min(max(int(np.searchsorted(ends, before + most_bytes, "right")), start + 1), start + most_rows)
        groups[start:end] = number
        start, number = end, number + 1
    return groups


def plan(
    dataset: str, patterns: Sequence[str], val_fraction: float, group_bytes: int, group_sources: int, threads: int = 16
) -> list[dict[str, Any]]:
    """Bring the plan of a dataset up to date with the sources as they are now; returns its groups.

    Writes `plan/NNNNN.parquet` if there is anything new; of several drivers planning at once, one wins and all use
    its plan.

    Returns:
        `{"split", "group", "plan": file, "sources": how many}` for each group, in order.
    """
    folder = storage.join(dataset, "plan")
    found = find(patterns, threads)
    while True:
        # named by what is there before reading: a plan that another driver writes meanwhile takes this name
        names = index.table_names(folder)
        columns = ["source", "uri", "bytes", "split", "group"]
        old = pa.concat_tables(
            [
                schema.PLAN.empty_table().select(columns),
                *(index.from_parquet(storage.join(folder, n), columns) for n in names),
            ]
        )
        new = found
        if len(old):
            new = found.filter(pc.invert(pc.is_in(_with_size(found), _with_size(old).combine_chunks())))
        last = {s: pc.max(old["group"].filter(pc.equal(old["split"], s))).as_py() for s in schema.SPLITS}
        first = {s: 0 if group is None else group + 1 for s, group in last.items()}
        ids = identify(new, threads)
        added = assign(new.drop_columns("etag"), ids, old, first, val_fraction, group_bytes, group_sources)
        if not len(new):
            return groups(dataset)
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, schema.PLAN, compression="zstd") as writer:
            # small row groups, in order: a task that reads its own group skips all others
            for batch in added:
                writer.write_batch(batch)
        if storage.write_if_absent(storage.join(folder, f"{len(names):05d}.parquet"), sink.getvalue().to_pybytes()):
            return groups(dataset)


def _with_size(table: pa.Table) -> Any:
    return pc.binary_join_element_wise(table["bytes"].cast(pa.string()), table["uri"], " ")


def groups(dataset: str) -> list[dict[str, Any]]:
    """The groups of all plans of a dataset (see `plan`)."""
    found = []
    folder = storage.join(dataset, "plan")
    for name in index.table_names(folder):
        table = index.from_parquet(storage.join(folder, name), columns=["split", "group"])
        counted = table.group_by(["split", "group"], use_threads=False).aggregate([([], "count_all")])
        found += [
            {"split": row["split"], "group": row["group"], "plan": name, "sources": row["count_all"]}
            for row in counted.to_pylist()
        ]
    return sorted(found, key=lambda g: (g["split"], g["group"]))


def sources_of(dataset: str, group: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The plan rows of one group, in the order in which they become clips."""
    fs, path = storage.filesystem(storage.join(dataset, "plan", group["plan"]))
    wanted = [("split", "==", group["split"]), ("group", "==", group["group"])]
    return storage.retrying(path, lambda: pq.read_table(path, filesystem=fs, filters=wanted)).to_pylist()
