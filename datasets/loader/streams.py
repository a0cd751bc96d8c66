"""The streams that a column of latents was encoded in, and where in one a training step begins.

A stream is a clip, or clips that follow each other without a hole and were encoded as one video: its step 0 is of a
single frame, all others of a group, as in a video that is generated. What comes before a window is what its stream has
before it, so that a model learns of nothing that its own films have not.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from longtake.datasets.compact import Rows


@dataclass(frozen=True)
class Lengths:
    """Where in its stream a window begins, and so how much history it has: all that is before, `most` steps of it.

    One of `some` steps, each as likely, or with the probability `none` the stream's first. From `most` on histories are
    alike, so that a window at the last of `some` may as well begin later, by any multiple of `unit`. What a stream is too
    short for is not drawn from it. With a curriculum, `reaches`, a batch draws from those that are within its reach alone.
    """

    some: tuple[int, ...]  # rising
    most: int
    none: float = 0.0
    unit: int = 1
    least: int = 0  # steps before a window that a stream must have room for
    reaches: tuple[tuple[int, int], ...] = ()  # (batch, steps): from which batch on how many at most, from batch 0 on

    def of(self, total: int, window: int) -> tuple[int, ...]:
        """Those that a stream of `total` steps has, 0 where it has none of them."""
        return tuple(begin for begin in self.some if begin + window <= total) or (0,)

    def within(self, reach: int) -> "Lengths":
        """Those of at most `reach` steps, each as likely; where all are longer the shortest, of which a sample has so many."""
        if reach >= self.most:
            return self
        some = tuple(begin for begin in self.some if begin <= reach) or self.some[:1]
        return replace(self, some=some, most=min(reach, some[-1]))

    def at(self, batch: int) -> "Lengths":
        """Those that global batch number `batch` draws from."""
        return self.within([reach for begins, reach in self.reaches if begins <= batch][-1]) if self.reaches else self

    def mean(
        self, totals: np.ndarray, window: int, reach: int | None = None, weights: np.ndarray | None = None
    ) -> float:
        """How many steps of history, `reach` at most, a sample has on the average, of streams of so many steps.

        `weights` say how often each comes; None: all alike.
        """
        drawn = self if reach is None else self.within(reach)
        kinds, kind = np.unique(totals, return_inverse=True)
        means = np.array([np.minimum(drawn.of(int(total), window), drawn.most).mean() for total in kinds])
        return (1 - self.none) * float(np.average(means[kind], weights=weights)) if len(kinds) else 0.0

    def draw(self, total: int, window: int, rng: np.random.Generator | None) -> int:
        """The step of a stream at which a window begins. Without `rng` the last of `some` that it has."""
        able = self.of(total, window)
        if rng is None:
            return able[-1]
        if rng.random() < self.none:
            return 0
        begin = int(rng.choice(able))
        later = (total - window - begin) // self.unit if begin == self.some[-1] >= self.most else 0
        return begin + self.unit * int(rng.integers(later + 1))


def totals(rows: Rows) -> np.ndarray:
    """(N,) of all rows of a column of latents: how many steps their streams have."""
    out = np.empty(int(rows.counts.sum()), np.int64)
    for shard, (start, count) in enumerate(zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)):
        first, steps = _facts(rows, shard)
        number = np.cumsum(first == 0) - 1
        out[start : start + count] = np.bincount(number, steps)[number]
    return out


def firsts(rows: Rows) -> np.ndarray:
    """(N,) of all rows of a column of latents: the row of the first clip of their streams."""
    out = np.empty(int(rows.counts.sum()), np.int64)
    for shard, (start, count) in enumerate(zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)):
        first, _ = _facts(rows, shard)
        out[start : start + count] = start + np.maximum.accumulate(np.where(first == 0, np.arange(count), 0))
    return out


def joined(rows: Rows) -> bool:
    """Whether a column's streams may be of several clips."""
    filled = np.flatnonzero(rows.counts)
    return len(filled) > 0 and "stream_step" in rows.of(int(filled[0])).column_names


def _facts(rows: Rows, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each clip the steps of its stream before it, and its own."""
    table = rows.of(shard)
    steps = table["steps"].to_numpy()
    joined = "stream_step" in table.column_names
    return (table["stream_step"].to_numpy() if joined else np.zeros(len(steps), int)), steps


def clips_of(rows: Rows, shard: int, at: int) -> range:
    """The places in their shard of the clips of the stream that one is of."""
    begin, end = at, at + 1
    while first_step(rows.row(shard, begin)):
        begin -= 1
    while end < rows.counts[shard] and first_step(rows.row(shard, end)):
        end += 1
    return range(begin, end)


def first_step(place: Mapping[str, Any]) -> int:
    """How many steps of its stream come before a clip's own."""
    return place.get("stream_step") or 0
