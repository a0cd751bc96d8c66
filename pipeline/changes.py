"""Find annotations in manifests that differ from those in the plan, and write them beside the shard of their source.

Memory: 22 bytes a planned source while a manifest with annotations is read; differences are on the local disk.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import annotations, index, later, schema, storage
from longtake.datasets.errors import Failure
from longtake.pipeline.seen import batches, row_count, search

_BUCKETS = 64
_SPOOLED = pa.schema([("split", pa.string()), ("group", pa.int32()), ("uri", pa.string()), ("extra", pa.string())])
_PLANNED = {"extra": np.dtype("i8"), "val": np.dtype("?"), "group": np.dtype("i4"), "same": np.dtype("?")}


class Changes:
    """Changed annotations of planned sources. Values are compared by hashes, which hold in this process only."""

    def __init__(self, dataset: str, plans: Sequence[str], spool: Path) -> None:
        self.dataset, self.plans, self.spool = dataset, plans, spool
        # of the planned sources: sorted hashes, and what is known of each. Arrays by themselves, which are sorted one after
        # the other
        self._uris: np.ndarray | None = None
        self._planned: dict[str, np.ndarray] = {}
        self._files = contextlib.ExitStack()
        self._writers: dict[int, pa.ipc.RecordBatchStreamWriter] = {}

    def watch(self, listings: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        """Pass on the batches of `discover.find` and note differences. A row without annotations makes none."""
        for batch in listings:
            if self.plans and batch["extra"].null_count < len(batch):
                self._compare(batch.filter(pc.is_valid(batch["extra"])))
            yield batch

    def _compare(self, batch: pa.RecordBatch) -> None:
        if self._uris is None:
            self._read()
        assert self._uris is not None
        planned = self._planned
        uris, extras = (_hashes(batch[name]) for name in ("uri", "extra"))
        # a file that changed was planned again: its latest plan counts
        places = np.maximum(search(self._uris, uris, "right") - 1, 0)
        is_planned = self._uris[places] == uris
        same = is_planned & (planned["extra"][places] == extras)
        planned["same"][places[same]] = True
        differing = np.flatnonzero(is_planned & ~same)
        if len(differing):
            val, group = (planned[name][places[differing]] for name in ("val", "group"))
            rows = batch.take(pa.array(differing))
            split = pa.array(np.array(schema.SPLITS, object)[val.astype(int)], pa.string())
            columns = [split, pa.array(group), rows["uri"], rows["extra"]]
            buckets = group % _BUCKETS
            for bucket in np.unique(buckets).tolist():
                members = pa.array(np.flatnonzero(buckets == bucket))
                table = pa.RecordBatch.from_arrays([column.take(members) for column in columns], schema=_SPOOLED)
                self._writer(bucket).write_batch(table)

    def _writer(self, bucket: int) -> pa.ipc.RecordBatchStreamWriter:
        if bucket not in self._writers:
            self.spool.mkdir(exist_ok=True)
            file = self._files.enter_context((self.spool / f"{bucket}").open("wb"))
            self._writers[bucket] = self._files.enter_context(pa.ipc.new_stream(file, _SPOOLED))
        return self._writers[bucket]

    def _read(self) -> None:
        count, start = row_count(self.plans), 0
        uris = np.empty(count, np.int64)
        self._planned = planned = {name: np.zeros(count, dtype) for name, dtype in _PLANNED.items()}
        for url in self.plans:
            for batch in batches(url, ("uri", "extra", "split", "group")):
                rows = slice(start, start + len(batch))
                uris[rows], start = _hashes(batch["uri"]), rows.stop
                planned["extra"][rows] = _hashes(batch["extra"])
                planned["val"][rows] = np.asarray(pc.equal(batch["split"], schema.SPLITS[1]))
                planned["group"][rows] = np.asarray(batch["group"])
        order = np.argsort(uris, kind="stable")
        self._uris = uris = uris[order]
        for name in planned:
            planned[name] = planned[name][order]
        for split in schema.SPLITS:
            for shard in later.shards(self.dataset, split):
                for row in later.read(self.dataset, split, shard):
                    place = self._place(row["uri"])
                    # what was planned again since has its own in its latest plan
                    if (schema.SPLITS[int(planned["val"][place])], f"{planned['group'][place]:05d}") == (split, shard):
                        planned["extra"][place] = hash(row["extra"])

    def _place(self, uri: str) -> int:
        """The place of the latest planned source with this URI."""
        assert self._uris is not None
        return int(np.searchsorted(self._uris, hash(uri), "right")) - 1

    @property
    def differ(self) -> bool:
        return bool(self._writers)

    def write(self, rows_of: Callable[[str, int], list[dict[str, Any]]]) -> int:
        """Write the changed annotations beside the shards of their sources; returns the number of sources.

        Args:
            rows_of: `rows_of(split, group)` gives the plan rows of a group.
        """
        self._files.close()
        count = 0
        for bucket in sorted(self._writers):
            with (self.spool / f"{bucket}").open("rb") as f:
                table = pa.ipc.open_stream(f).read_all().sort_by([("split", "ascending"), ("group", "ascending")])
            for (split, group), rows in groupby(table.to_pylist(), lambda row: (row["split"], row["group"])):
                count += self._write_group(split, group, list(rows), rows_of(split, group))
        return count

    def _write_group(
        self, split: str, group: int, differing: list[dict[str, Any]], planned: list[dict[str, Any]]
    ) -> int:
        extras: dict[str, list[str | None]] = {}
        for row in differing:
            extras.setdefault(row["uri"], []).append(row["extra"])
        changed, cut = {}, self._cut(split, group)
        for row in planned:
            is_cut = cut[row["source"]] == row["uri"] if row["source"] in cut else row["duplicate_of"] is None
            if row["uri"] in extras and is_cut:
                # the manifest may have the planned row too, beside one with other annotations
                same = int(self._planned["same"][self._place(row["uri"])])
                extra = annotations.merged([row["extra"]] * same + extras[row["uri"]])
                if not annotations.same(extra, row["extra"]):
                    changed[row["source"]] = {"source": row["source"], "uri": row["uri"], "extra": extra}
        if changed:
            shard = f"{group:05d}"
            rows = {row["source"]: row for row in later.read(self.dataset, split, shard)} | changed
            later.write(self.dataset, split, shard, [rows[source] for source in sorted(rows)])
        return len(changed)

    def _cut(self, split: str, group: int) -> dict[str, str]:
        """The URI that each source of a group was cut from: a copy may have taken the place of what could not be read."""
        with contextlib.suppress(Failure):
            rows = index.from_parquet(
                storage.join(self.dataset, "sources", f"{split}-{group:05d}.parquet"), ["source", "uri", "status"]
            )
            return {row["source"]: row["uri"] for row in rows.to_pylist() if row["status"] == "good"}
        # not cut yet, or its account is damaged
        return {}


def _hashes(column: pa.Array) -> np.ndarray:
    return np.fromiter(map(hash, column.to_pylist()), np.int64, len(column))
