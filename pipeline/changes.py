"""Columns of manifests that say other things of a source than the plan does: found in passing, kept beside its shard.

Memory: 22 bytes a planned source while a manifest with such columns is read; what differs lies on the local disk.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longtake.datasets import annotations, later, schema, storage
from longtake.pipeline.seen import search

_BUCKETS = 64
_ROWS = 1 << 16
_SPOOLED = pa.schema([("split", pa.string()), ("group", pa.int32()), ("uri", pa.string()), ("extra", pa.string())])
_KNOWN = np.dtype([("extra", "i8"), ("val", "?"), ("group", "i4"), ("same", "?")])


class Changes:
    """Of the annotations of sources that are planned already. Tables are compared by hashes of this process."""

    def __init__(self, dataset: str, plans: Sequence[str], spool: Path) -> None:
        self.dataset, self.plans, self.spool = dataset, plans, spool
        # sorted; not in the records, of whose columns each search would make a copy
        self._uris: np.ndarray | None = None
        self._known = np.empty(0, _KNOWN)
        self._open = contextlib.ExitStack()
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}

    def watch(self, found: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """The batches of `discover.find` as they are, noting what differs. A row without annotations says nothing."""
        for batch in found:
            if self.plans and batch["extra"].null_count < len(batch):
                self._compare(batch.filter(pc.is_valid(batch["extra"])))
            yield batch

    def _compare(self, batch: pa.RecordBatch) -> None:
        if self._uris is None:
            self._read()
        assert self._uris is not None
        known = self._known
        uris, extras = (_hashes(batch[name]) for name in ("uri", "extra"))
        # of a file that was planned again, having changed, the latest plan counts
        at = np.maximum(search(self._uris, uris, "right") - 1, 0)
        there = self._uris[at] == uris
        same = there & (known["extra"][at] == extras)
        known["same"][at[same]] = True
        differ = np.flatnonzero(there & ~same)
        if len(differ):
            place = known[at[differ]]
            rows = batch.take(pa.array(differ))
            split = pa.array(np.array(schema.SPLITS, object)[place["val"].astype(int)], pa.string())
            columns = [split, pa.array(place["group"]), rows["uri"], rows["extra"]]
            for bucket in np.unique(place["group"] % _BUCKETS).tolist():
                mine = pa.array(np.flatnonzero(place["group"] % _BUCKETS == bucket))
                table = pa.RecordBatch.from_arrays([column.take(mine) for column in columns], schema=_SPOOLED)
                self._writer(bucket).write_batch(table)

    def _writer(self, bucket: int) -> pa.ipc.RecordBatchStreamWriter:
        if bucket not in self._writers:
            self.spool.mkdir(exist_ok=True)
            file = self._open.enter_context((self.spool / f"{bucket}").open("wb"))
            self._writers[bucket] = self._open.enter_context(pa.ipc.new_stream(file, _SPOOLED))
        return self._writers[bucket]

    def _read(self) -> None:
        hashes, parts = [np.empty(0, np.int64)], [self._known]
        for url in self.plans:
            fs, path = storage.filesystem(url)
            with fs.open(path, "rb") as f:
                for batch in pq.ParquetFile(f).iter_batches(_ROWS, columns=["uri", "extra", "split", "group"]):
                    part = np.zeros(len(batch), _KNOWN)
                    part["extra"] = _hashes(batch["extra"])
                    part["val"] = np.asarray(pc.equal(batch["split"], schema.SPLITS[1]))
                    part["group"] = np.asarray(batch["group"])
                    hashes.append(_hashes(batch["uri"]))
                    parts.append(part)
        uris, known = np.concatenate(hashes), np.concatenate(parts)
        order = np.argsort(uris, kind="stable")
        self._uris, self._known = uris[order], known[order]
        for split in schema.SPLITS:
            for shard in later.shards(self.dataset, split):
                for row in later.read(self.dataset, split, shard):
                    self._known["extra"][self._place(row["uri"])] = hash(row["extra"])

    def _place(self, uri: str) -> int:
        """Of the latest that a plan has of this name."""
        assert self._uris is not None
        return int(np.searchsorted(self._uris, hash(uri), "right")) - 1

    @property
    def differ(self) -> bool:
        return bool(self._writers)

    def keep(self, planned: Callable[[str, int], list[dict[str, Any]]]) -> int:
        """Write what differs beside the shards that it is about. Returns of how many sources.

        Args:
            planned: the plan rows of the group of this split and number.
        """
        self._open.close()
        count = 0
        for bucket in sorted(self._writers):
            with (self.spool / f"{bucket}").open("rb") as f:
                table = pa.ipc.open_stream(f).read_all().sort_by([("split", "ascending"), ("group", "ascending")])
            for (split, group), rows in groupby(table.to_pylist(), lambda row: (row["split"], row["group"])):
                count += self._keep(split, group, list(rows), planned(split, group))
        return count

    def _keep(self, split: str, group: int, differing: list[dict[str, Any]], planned: list[dict[str, Any]]) -> int:
        told: dict[str, list[str | None]] = {}
        for row in differing:
            told.setdefault(row["uri"], []).append(row["extra"])
        changed = {}
        for row in planned:
            if row["uri"] in told and row["duplicate_of"] is None:
                # a row that says what is known may stand beside one that says more
                same = int(self._known["same"][self._place(row["uri"])])
                extra = annotations.merged([row["extra"]] * same + told[row["uri"]])
                if not annotations.same(extra, row["extra"]):
                    changed[row["source"]] = {"source": row["source"], "uri": row["uri"], "extra": extra}
        if changed:
            shard = f"{group:05d}"
            kept = {row["source"]: row for row in later.read(self.dataset, split, shard)} | changed
            later.write(self.dataset, split, shard, [kept[source] for source in sorted(kept)])
        return len(changed)


def _hashes(column: pa.Array) -> np.ndarray:
    return np.fromiter(map(hash, column.to_pylist()), np.int64, len(column))
