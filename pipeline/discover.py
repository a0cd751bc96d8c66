"""Finding sources and planning groups. The plan is written once and never changed: a later one adds to it.

A source's identity is its size and a hash of samples of its bytes, so a renamed or copied video is known again.
Split and place in the order of work follow from the identity alone, never from names or listing order.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from longtake.datasets import index, schema, storage
from longtake.datasets.errors import UserError

VIDEO_SUFFIXES = frozenset(
    [
        "3g2",
        "3gp",
        "asf",
        "avi",
        "av1",
        "f4v",
        "flv",
        "gif",
        "h264",
        "h265",
        "hevc",
        "ivf",
        "m2ts",
        "m4v",
        "mjpeg",
        "mkv",
        "mov",
        "mp4",
        "mpeg",
        "mpg",
        "mts",
        "mxf",
        "nut",
        "obu",
        "ogm",
        "ogv",
        "rm",
        "rmvb",
        "ts",
        "vob",
        "webm",
        "wmv",
        "y4m",
    ]
)
_SAMPLE_BYTES = 1 << 16


@dataclass(frozen=True)
class Found:
    """A file that a source pattern names; `etag` is the store's own content tag, where it has one."""

    uri: str
    size: int
    etag: str | None


def find(patterns: Sequence[str]) -> list[Found]:
    """Expand files, folders and globs (fsspec URLs) to files, sorted by URI, each once.

    A folder gives every file below it whose suffix is a video's; a glob or a file is taken as it is.

    Raises:
        UserError: a pattern matches nothing, or names nothing that exists.
    """
    found: dict[str, Found] = {}
    for pattern in patterns:
        fs, path = storage.filesystem(pattern)
        entries, skipped = storage.retrying(pattern, partial(_expand, fs, path, pattern))
        if not entries:
            passed = ", ".join(f"{n} {s or 'without suffix'}" for s, n in skipped.most_common(3))
            raise UserError(
                f"sources: {pattern}: no video there"
                + (f" (only {passed})" if passed else "")
                + "; name a folder or glob that holds videos"
            )
        for entry in entries:
            uri = fs.unstrip_protocol(entry["name"]) if not storage.is_local(pattern) else entry["name"]
            tag = entry.get("ETag") or entry.get("etag")
            found[uri] = Found(uri, int(entry.get("size") or 0), str(tag).strip('"') if tag else None)
    return [found[uri] for uri in sorted(found)]


def _expand(fs: Any, path: str, pattern: str) -> tuple[list[dict[str, Any]], Counter[str]]:
    if any(c in path for c in "*?["):
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


def listing_digest(patterns: Sequence[str]) -> str:
    """Changes when a source appears, goes, or changes its size or tag. Reads no contents."""
    lines = "".join(f"{f.uri}\t{f.size}\t{f.etag or ''}\n" for f in find(patterns))
    return hashlib.sha256(lines.encode()).hexdigest()


def identity(source: Found) -> str:
    """20 hex digits from the size and bytes of the head, middle and tail; a file that cannot be read goes by its name."""
    fs, path = storage.filesystem(source.uri)
    spans = sorted({max(0, at) for at in (0, source.size // 2, source.size - _SAMPLE_BYTES)})
    digest = hashlib.sha256(str(source.size).encode())
    try:
        for start in spans:
            end = min(start + _SAMPLE_BYTES, source.size)
            if end > start:
                digest.update(storage.retrying(source.uri, partial(fs.cat_file, path, start=start, end=end)))
    except (FileNotFoundError, PermissionError):
        digest.update(source.uri.encode())
    return digest.hexdigest()[:20]


def split_of(source: str, val_fraction: float) -> str:
    """Train or val by the source's identity alone."""
    return (
        "val" if int(hashlib.sha256(f"split {source}".encode()).hexdigest()[:8], 16) < val_fraction * 2**32 else "train"
    )


def assign(
    found: Iterable[tuple[Found, str]],
    known: Mapping[str, tuple[str, str]],
    first_group: Mapping[str, int],
    val_fraction: float,
    group_bytes: int,
    group_sources: int,
) -> list[dict[str, Any]]:
    """Plan rows for new sources in order of identity, cut into groups of bounded size.

    A source with the identity of another is its duplicate: it gets a row but is not decoded. At least one source of
    two or more goes to each split, so that a small dataset can be trained on and tested.

    Args:
        found: sources with their identities.
        known: `{identity: (uri, split)}` of earlier plans.
        first_group: the first free group of each split.
    """
    originals = dict(known)
    rows: list[dict[str, Any]] = []
    for source, ident in sorted(found, key=lambda pair: (pair[1], pair[0].uri)):
        duplicate = ident in originals
        uri, split = originals.setdefault(ident, (source.uri, split_of(ident, val_fraction)))
        rows.append(
            {
                "source": ident,
                "uri": source.uri,
                "bytes": source.size,
                "split": split,
                "duplicate_of": uri if duplicate else None,
            }
        )
    if not known and 0 < val_fraction < 1:
        _fill_empty_split(rows)
    group, filled, count = dict(first_group), Counter[str](), Counter[str]()
    for row in rows:
        split, size = row["split"], 0 if row["duplicate_of"] else row["bytes"]
        if count[split] and (filled[split] + size > group_bytes or count[split] >= group_sources):
            group[split] += 1
            filled[split] = count[split] = 0
        filled[split] += size
        count[split] += 1
        row["group"] = group[split]
    return rows


def _fill_empty_split(rows: list[dict[str, Any]]) -> None:
    """Move the source with the smallest identity to a split that got none."""
    splits = {row["split"] for row in rows}
    identities = [row["source"] for row in rows]
    if len(splits) == 1 and len(set(identities)) > 1:
        missing = next(s for s in schema.SPLITS if s not in splits)
        for row in rows:
            if row["source"] == identities[0]:
                row["split"] = missing


def plan(
    dataset: str, patterns: Sequence[str], val_fraction: float, group_bytes: int, group_sources: int, threads: int = 16
) -> pa.Table:
    """The plan of a dataset, brought up to date with the sources as they are now.

    Writes `plan/NNNNN.parquet` if there is anything new; of several drivers planning at once, one wins and all use its plan.
    """
    folder = storage.join(dataset, "plan")
    while True:
        # named by what is there before reading: a plan that another driver writes meanwhile takes this name
        name = f"{len(index.table_names(folder)):05d}.parquet"
        old = index.read_tables(folder, schema.PLAN)
        rows = old.to_pylist()
        have = {(row["uri"], row["bytes"]) for row in rows}
        new = [f for f in find(patterns) if (f.uri, f.size) not in have]
        with ThreadPoolExecutor(threads) as pool:
            identities = list(tqdm(pool.map(identity, new), "identify", len(new), unit="source", disable=not new))
        known = {row["source"]: (row["uri"], row["split"]) for row in reversed(rows)}
        first = {s: 1 + max((row["group"] for row in rows if row["split"] == s), default=-1) for s in schema.SPLITS}
        added = assign(zip(new, identities, strict=True), known, first, val_fraction, group_bytes, group_sources)
        if not added:
            return old
        table = index.rows_table(added, schema.PLAN)
        if storage.write_if_absent(storage.join(folder, name), index.to_parquet(table)):
            return pa.concat_tables([old, table])
