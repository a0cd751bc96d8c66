"""Columns of latents that are not there: their rows, as an index would have them, and the pixels to encode.

A window's latents depend on all of its stream before it. So a sample has the frames from the beginning of its stream up to
the end of its window, scaled and cropped as `cache_latents` does: what an encoder makes of them is what a column would
have. That is the price: a window late in a long stream costs the decoding and the encoding of all that is before it.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import pyarrow as pa

from longtake.datasets import schema, view
from longtake.datasets.compact import Rows
from longtake.datasets.encoding import Settings, Strides, latents_of, positions, streams, target_size

_TABLES = 1024  # shards whose rows are kept in memory


@dataclass(frozen=True)
class Live:
    """A column that `cache_latents` would make with these settings; only clips that the view (URL) keeps have latents."""

    column: str
    settings: Settings
    strides: Strides
    view: str | None = None

    def open(self, base: Rows, facts: pa.Table) -> tuple["LiveRows", pa.Table]:
        """The rows of the column, and the columns `height` and `width` of all rows, 0 of a clip without latents."""
        keep, _, _ = view.kept(base, self.view)
        rows = LiveRows(base.dataset, base.split, base.shards, base.data, base.offsets, live=self, base=base, keep=keep)
        return rows, self._sides(facts, keep)

    def _sides(self, facts: pa.Table, keep: np.ndarray) -> pa.Table:
        sizes = np.stack([facts[name].to_numpy() for name in ("height", "width")], 1)
        kinds, kind = np.unique(sizes, axis=0, return_inverse=True)
        targets = [target_size((int(h), int(w)), self.settings, self.strides.stride) for h, w in kinds.tolist()]
        sides = [(0, 0) if size is None else positions(size, self.settings, self.strides) for size in targets]
        found = np.array(sides, np.int32).reshape(-1, 2)[kind.reshape(-1)] * keep[:, None]
        return pa.table({"height": found[:, 0], "width": found[:, 1]})

    def table(self, base: pa.Table, keep: np.ndarray) -> pa.Table:
        """The index of a shard, of which `keep` (N,) bool have latents if they are large enough."""
        rows = base.to_pylist()
        own: dict[str, tuple[int, int, tuple[int, int]]] = {}
        for stream in streams([row for row, kept in zip(rows, keep, strict=True) if kept], self.settings, self.strides):
            counts = latents_of(stream, self.strides)
            size = target_size((stream[0]["height"], stream[0]["width"]), self.settings, self.strides.stride)
            assert size
            sides = positions(size, self.settings, self.strides)
            for row, first, count in zip(stream, (np.cumsum(counts) - counts).tolist(), counts, strict=True):
                own[row["key"]] = first, count, sides
        joined = bool(self.settings.join_seconds)
        return pa.Table.from_pylist(
            [self._row(row, *own.get(row["key"], (0, 0, (0, 0))), joined) for row in rows],
            schema=schema.STREAM_INDEX if joined else schema.LATENT_INDEX,
        )

    def _row(
        self, row: Mapping[str, Any], first: int, count: int, sides: tuple[int, int], joined: bool
    ) -> dict[str, Any]:
        nowhere = {"offset": 0, "size": 0, "crc32": 0, "sha256": "", "step_crc32": b""}
        facts = {"key": row["key"], "base_sha256": row["sha256"], "steps": count, "height": sides[0], "width": sides[1]}
        facts |= {"factor": self.strides.factor, "channels": self.strides.channels, "dtype": self.settings.dtype}
        return nowhere | facts | ({"stream_step": first} if joined else {})


@dataclass
class LiveRows(Rows):
    """The rows of a live column, made from those of its base a shard at a time."""

    live: Any = None
    base: Any = None
    keep: Any = None  # (N,) bool

    @cached_property
    def digest(self) -> str:
        """Of the base and of the column's name, which has a digest of the encoder, the settings and the view."""
        return hashlib.sha256(f"{self.base.digest} {self.live.column}".encode()).hexdigest()

    def of(self, shard: int) -> pa.Table:
        if (rows := self._tables.get(shard)) is None:
            start = int(self.base.starts[shard])
            keep = self.keep[start : start + int(self.base.counts[shard])]
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            rows = self._tables[shard] = self.live.table(self.base.of(shard), keep)
        return rows


def live_columns(columns: Mapping[str, Rows]) -> tuple[str, ...]:
    """The names of the live columns among these."""
    return tuple(name for name, rows in columns.items() if isinstance(rows, LiveRows))
