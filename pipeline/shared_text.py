"""Captions that several shards have: found by their sha over the whole dataset, and encoded once for all.

They are encoded in parts, by the first digits of their sha, into tars in the folder of the stage's output. Shards copy from
there, and the folder goes when the column is complete.
"""

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import captions as spoken
from longtake.datasets import index, storage
from longtake.datasets.text import Stored
from longtake.pipeline import column as columns
from longtake.pipeline.commit import store_tar
from longtake.pipeline.text import Report, Work, copy, encoded

SPLIT = "shared"  # of the jobs that encode a part, in place of a dataset's

_FOLDER, _TEXTS, _LISTED = "shared", "texts", "list"
_PART = 512  # texts in a part, about so many
_WORTH = 10  # shared captions are encoded by themselves where that saves this share of all encodings, 1 in so many
_SHA_BYTES = 32
_AHEAD = 64  # shards whose captions are read ahead of those that are looked at
_LIST = pa.schema([("sha", pa.string()), ("text", pa.string())])
_PLACES = pa.schema(
    [("sha", pa.string()), ("offset", pa.int64()), ("size", pa.int64()), ("crc32", pa.uint32()), ("tokens", pa.int32())]
)


class Count(NamedTuple):
    """The captions of a dataset."""

    captions: int
    distinct: int
    encodings: int  # distinct captions of each shard, added up
    shared: np.ndarray  # shas of those that several shards have, sorted

    @property
    def is_worth(self) -> bool:
        """Whether to encode the shared ones by themselves."""
        return (self.encodings - self.distinct) * _WORTH > self.encodings


def count(dataset: str, captions: str, keeps: Mapping[str, Mapping[str, np.ndarray]]) -> Count:
    """The captions of all shards, or of the clips that a view keeps; memory holds 32 bytes for each of a shard's."""
    total, parts = 0, []
    for found, texts in _by_shard(dataset, captions, keeps):
        total += found
        parts.append(np.array(sorted({spoken.sha_of(text) for text in texts}), f"S{_SHA_BYTES}"))
    everything = np.concatenate([np.empty(0, f"S{_SHA_BYTES}"), *parts])
    shas, times = np.unique(everything, return_counts=True)
    return Count(total, len(shas), len(everything), shas[times > 1])


def _by_shard(
    dataset: str, captions: str, keeps: Mapping[str, Mapping[str, np.ndarray]]
) -> Iterator[tuple[int, list[str]]]:
    """The number of captions in each shard, and the distinct ones."""

    def read(place: tuple[str, str, np.ndarray]) -> tuple[int, list[str]]:
        split, name, keep = place
        rows = index.read_shard(dataset, split, f"{name}.{captions}").table["captions"]
        texts = pc.struct_field(pc.list_flatten(rows.filter(pa.array(keep))), "text")
        return len(texts), pc.unique(texts).to_pylist()

    places = [(split, name, keep) for split, shards in keeps.items() for name, keep in shards.items()]
    with ThreadPoolExecutor(4) as pool:
        for first in range(0, len(places), _AHEAD):
            yield from pool.map(read, places[first : first + _AHEAD])


def plan(work: Work, shared: np.ndarray, jobs: Sequence[columns.Job], output: str) -> list[columns.Job]:
    """List the shared captions that these shards need and have not, part by part; returns a job for each part."""
    needed: dict[str, str] = {}
    known = set(shared.astype(str).tolist())
    keeps = {split: {job.name: _bits(job) for job in of} for split, of in groupby(jobs, lambda job: job.split)}
    for split, shards in keeps.items():
        for name, keep in shards.items():
            old = work.old_states(split, name)
            for _, texts in _by_shard(work.dataset, work.captions, {split: {name: keep}}):
                found = {sha: text for text in texts if (sha := spoken.sha_of(text)) in known and sha not in old}
                needed |= found
    digits = len(f"{max(0, len(shared) - 1) // _PART:x}") if len(shared) > _PART else 0
    parts = []
    for part, shas in groupby(sorted(needed), lambda sha: sha[:digits]):
        rows = [{"sha": sha, "text": needed[sha]} for sha in shas]
        listed = index.to_parquet(index.rows_table(rows, _LIST))
        storage.write(_url(output, work.column, f"{_LISTED}-{part}.parquet"), listed)
        parts.append(columns.Job(SPLIT, f"{_TEXTS}-{part}", len(rows), b""))
    return parts


def make_shared(encoder: Any, work: Work, output: str, name: str, report: Report) -> dict[str, int]:
    """Encode a part of what `plan` has listed, but for what is there; returns counts."""
    part = name.removeprefix(f"{_TEXTS}-")
    listed = index.from_parquet(_url(output, work.column, f"{_LISTED}-{part}.parquet")).to_pylist()
    texts = {row["sha"]: row["text"] for row in listed}
    done = _places(output, work.column, name)
    if texts.keys() <= done.keys():
        return {"encoded": 0}
    tar = _url(output, work.column, f"{name}.tar")
    with storage.spool_folder(_url(output, work.column, "")) as spool:
        tokens = {sha: place.tokens for sha, place in done.items() if copy(place, spool / f"{sha}.npy")}
        rest = {sha: text for sha, text in texts.items() if sha not in tokens}
        for sha, length in encoded(encoder, rest, work, spool):
            tokens[sha] = length
            report(len(tokens), f"shared text {len(tokens)} of {len(texts)}")
        # the table first: beside another tar its checksums are wrong, and the texts are encoded again
        members, _, _ = store_tar(tar, ((s, {"npy": (spool / f"{s}.npy").read_bytes()}) for s in sorted(tokens)))
    rows = [
        {"sha": m.key, "offset": m.offset, "size": m.size, "crc32": m.crc32, "tokens": tokens[m.key]} for m in members
    ]
    storage.write(_url(output, work.column, f"{name}.parquet"), index.to_parquet(index.rows_table(rows, _PLACES)))
    return {"encoded": len(rest)}


def places(output: str, column: str) -> dict[str, Stored]:
    """Where the states of all shared captions are, by their sha; empty where none are encoded by themselves."""
    found: dict[str, Stored] = {}
    for name in storage.names(_url(output, column, "")):
        if name.startswith(f"{_TEXTS}-") and name.endswith(".parquet"):
            found |= _places(output, column, name.removesuffix(".parquet"))
    return found


def _places(output: str, column: str, name: str) -> dict[str, Stored]:
    url = _url(output, column, f"{name}.parquet")
    if not storage.exists(url):
        return {}
    rows = index.from_parquet(url).to_pylist()
    tar = _url(output, column, f"{name}.tar")
    return {row.pop("sha"): Stored(tar, **row) for row in rows}


def forget(output: str) -> None:
    """Delete the states of shared captions, which every shard has by now."""
    fs, path = storage.filesystem(storage.join(output, _FOLDER))
    with suppress(FileNotFoundError):
        storage.retrying(path, lambda: fs.rm(path, recursive=True))


def _bits(job: columns.Job) -> np.ndarray:
    return np.unpackbits(np.frombuffer(job.keep, np.uint8), count=job.clips).astype(bool)


def _url(output: str, column: str, name: str) -> str:
    return storage.join(output, _FOLDER, column, name) if name else storage.join(output, _FOLDER, column)
