"""What earlier plans of a dataset have: which sources are known without reading them, which were planned twice."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longtake.datasets import index, storage
from longtake.datasets.errors import Failure
from longtake.pipeline.retry import Tries

_ROWS = 1 << 16


class Seen:
    """What is known of all planned sources before reading them, as sorted digests.

    A source is new when no plan has its URI with its size. One that was read without its size being known is not new
    when its size is told later, nor is one whose size is no longer told.
    """

    def __init__(self, plans: Sequence[str], tries: Tries) -> None:
        self._plans, self._uris = plans, np.empty(0, "S16")
        sized, unsized = [np.empty(0, "S16")], [np.empty(0, "S16")]
        for batch in self._planned(("uri", "bytes")):
            sized.append(_digests(batch["bytes"], batch["uri"]))
            unknown = batch.filter(pc.is_null(batch["bytes"]))
            read = unknown.filter(pc.invert(pc.is_in(unknown["uri"], tries.unread["uri"].combine_chunks())))
            unsized.append(_digests(read["uri"]))
        self._sized, self._unsized = np.sort(np.concatenate(sized)), np.sort(np.concatenate(unsized))

    def _planned(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return chain.from_iterable(batches(url, columns) for url in self._plans)

    def times(self, row: Mapping[str, Any]) -> int:
        """How often a source was planned, whether or not it has been tried as often."""
        (key,) = _digests(pa.array([row["bytes"]], pa.int64()), pa.array([row["uri"]]))
        return int(np.searchsorted(self._sized, key, "right") - np.searchsorted(self._sized, key, "left"))

    def unseen(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        if not len(self._sized):
            return batch
        seen = _held(self._sized, _digests(batch["bytes"], batch["uri"]))
        if len(self._unsized):
            seen |= _held(self._unsized, _digests(batch["uri"]))
        if batch["bytes"].null_count:
            if not len(self._uris):
                self._uris = np.sort(np.concatenate([_digests(part["uri"]) for part in self._planned(("uri",))]))
            seen |= np.asarray(pc.is_null(batch["bytes"])) & _held(self._uris, _digests(batch["uri"]))
        return batch.filter(pa.array(~seen))


def _held(keys: np.ndarray, asked: np.ndarray) -> np.ndarray:
    return keys[np.minimum(search(keys, asked), len(keys) - 1)] == asked


def search(keys: np.ndarray, asked: np.ndarray, side: Literal["left", "right"] = "left") -> np.ndarray:
    """`np.searchsorted` of many: asked in order, each lies close to the one before."""
    order = np.argsort(asked)
    places = np.empty(len(asked), np.int64)
    places[order] = np.searchsorted(keys, asked[order], side)
    return places


def _digests(*columns: pa.Array) -> np.ndarray:
    texts = [pc.fill_null(column.cast(pa.string()), "") for column in columns]
    named = pc.binary_join_element_wise(*texts, " ").to_pylist()
    return np.frombuffer(b"".join([hashlib.blake2b(n.encode(), digest_size=16).digest() for n in named]), "S16")


def batches(url: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Some columns of a plan, a row group at a time. Raises Failure: it cannot be read."""
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as f:
            yield from pq.ParquetFile(f).iter_batches(_ROWS, columns=list(columns))
    except (pa.ArrowException, OSError) as e:
        raise Failure(f"{url}: cannot be read ({' '.join(str(e).split())}); run the same command again") from e


def planned_again(dataset: str, some: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], list[str]]:
    """`{(split, group): URIs}` of sources, those of some groups among them, that a later plan has once more."""
    folder = storage.join(dataset, "plan")
    names = [n for n in index.table_names(folder) if n >= min(group["plan"] for group in some)]
    later, found = np.empty(0, "S16"), dict[tuple[str, int], list[str]]()
    for name in reversed(names if len(names) > 1 else []):
        keys = [later]
        for batch in batches(storage.join(folder, name), ("uri", "bytes", "split", "group")):
            keys.append(_digests(batch["bytes"], batch["uri"]))
            if len(later):
                for row in batch.filter(pa.array(_held(later, keys[-1]))).to_pylist():
                    found.setdefault((row["split"], row["group"]), []).append(row["uri"])
        later = np.sort(np.concatenate(keys))
    return found
