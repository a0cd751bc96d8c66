"""Look up sources in the earlier plans of a dataset: which are planned already, which were planned twice."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
    """All planned sources, as sorted digests.

    A source is new when no plan has its URI with its size, and it was not read with this size either. One that was read while
    its size was unknown is not new when its size becomes known, nor is one whose size is no longer known.
    """

    def __init__(self, plans: Sequence[str], tries: Tries) -> None:
        self._plans, self._uris = plans, np.empty(0, "S16")
        # filled and sorted in place: a copy more is 160 MB of ten million sources
        self._sized, unsized, start = np.empty(row_count(plans), "S16"), [np.empty(0, "S16")], 0
        for batch in self._planned(("uri", "bytes")):
            self._sized[start : start + len(batch)] = _digests(batch["bytes"], batch["uri"])
            start += len(batch)
            without_size = batch.filter(pc.is_null(batch["bytes"]))
            unread = pc.is_in(without_size["uri"], tries.unread["uri"].combine_chunks())
            read = without_size.filter(pc.invert(unread))
            unsized.append(_digests(read["uri"]))
        self._unsized = np.concatenate(unsized)
        self._sized.sort()
        self._unsized.sort()
        # with another size than planned, as a file that was still growing when it was listed
        self._read = np.sort(_digests(tries.resized["bytes"], tries.resized["uri"]))

    def _planned(self, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        return chain.from_iterable(batches(url, columns) for url in self._plans)

    def times(self, row: Mapping[str, Any]) -> int:
        """How often a source was planned, which may be more often than it was tried."""
        (key,) = _digests(pa.array([row["bytes"]], pa.int64()), pa.array([row["uri"]]))
        return int(np.searchsorted(self._sized, key, "right") - np.searchsorted(self._sized, key, "left"))

    def unseen(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The new sources of a batch of `discover.find`."""
        if not len(self._sized):
            return batch
        is_seen = _contains(self._sized, _digests(batch["bytes"], batch["uri"]))
        if len(self._unsized):
            is_seen |= _contains(self._unsized, _digests(batch["uri"]))
        if len(self._read):
            is_seen |= _contains(self._read, _digests(batch["bytes"], batch["uri"]))
        if batch["bytes"].null_count:
            if not len(self._uris):
                self._uris = np.sort(np.concatenate([_digests(part["uri"]) for part in self._planned(("uri",))]))
            is_seen |= np.asarray(pc.is_null(batch["bytes"])) & _contains(self._uris, _digests(batch["uri"]))
        return batch.filter(pa.array(~is_seen))


def _contains(keys: np.ndarray, values: np.ndarray) -> np.ndarray:
    return keys[np.minimum(search(keys, values), len(keys) - 1)] == values


def search(keys: np.ndarray, values: np.ndarray, side: Literal["left", "right"] = "left") -> np.ndarray:
    """`np.searchsorted` of many values, in ascending order, which is kinder to the cache."""
    order = np.argsort(values)
    places = np.empty(len(values), np.int64)
    places[order] = np.searchsorted(keys, values[order], side)
    return places


def _digests(*columns: pa.Array) -> np.ndarray:
    texts = [pc.fill_null(column.cast(pa.string()), "") for column in columns]
    rows = pc.binary_join_element_wise(*texts, " ").to_pylist()
    return np.frombuffer(b"".join([hashlib.blake2b(row.encode(), digest_size=16).digest() for row in rows]), "S16")


def batches(url: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
    """Columns of a plan, a batch of rows at a time. Raises Failure: it cannot be read."""
    with _reading(url) as file:
        yield from file.iter_batches(_ROWS, columns=list(columns))


def row_count(plans: Sequence[str]) -> int:
    """The rows of plans, from their footers. Raises Failure: one cannot be read."""
    count = 0
    for url in plans:
        with _reading(url) as file:
            count += file.metadata.num_rows
    return count


@contextmanager
def _reading(url: str) -> Iterator[pq.ParquetFile]:
    fs, path = storage.filesystem(url)
    try:
        with fs.open(path, "rb") as f:
            # buffered, all that is still to come would be in memory
            yield pq.ParquetFile(f, pre_buffer=False)
    except pa.ArrowException as e:
        raise Failure(f"{url}: not a readable plan ({' '.join(str(e).split())}); {index.PLAN_REMEDY}") from e
    except OSError as e:
        raise Failure(f"{url}: cannot be read ({' '.join(str(e).split())}); run the same command again") from e


def planned_again(dataset: str, groups: Sequence[Mapping[str, Any]]) -> dict[tuple[str, int], dict[str, bool]]:
    """`{(split, group): {URI: same}}` of the sources of groups that a later plan has once more.

    `same` is whether it has the size there that it has here. With another one it is another file by now.
    """
    folder = storage.join(dataset, "plan")
    names = [n for n in index.table_names(folder) if n >= min(group["plan"] for group in groups)]
    asked = {(group["split"], group["group"]) for group in groups}
    later, repeated = np.empty(0, "S16"), list[tuple[str, dict[str, Any]]]()
    for name in reversed(names if len(names) > 1 else []):
        keys = [later]
        for batch in batches(storage.join(folder, name), ("uri", "bytes", "split", "group")):
            keys.append(_digests(batch["uri"]))
            if len(later):
                rows = batch.filter(pa.array(_contains(later, keys[-1]))).to_pylist()
                repeated += [(name, row) for row in rows if (row["split"], row["group"]) in asked]
        later = np.sort(np.concatenate(keys))

    sizes = dict[str, list[tuple[str, int | None]]]()  # of their URIs, each with the plan that has it
    uris = pa.array({row["uri"] for _, row in repeated}, pa.string())
    for name in names if repeated else []:
        for batch in batches(storage.join(folder, name), ("uri", "bytes")):
            for row in batch.filter(pc.is_in(batch["uri"], uris)).to_pylist():
                sizes.setdefault(row["uri"], []).append((name, row["bytes"]))
    again = dict[tuple[str, int], dict[str, bool]]()
    for plan, row in repeated:
        then = {size for name, size in sizes[row["uri"]] if name > plan}
        same = bool({row["bytes"], None} & then) or row["bytes"] is None
        again.setdefault((row["split"], row["group"]), {})[row["uri"]] = same
    return again
