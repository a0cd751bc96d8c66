"""The streams that a column of latents was encoded in, and where in one a window begins.

A stream is a clip, or clips that follow each other without a hole and were encoded as one video. Its first latent is of a
single frame, all others of a group of frames, as in a generated video. The history of a window is what its stream has
before it, so that a model learns of nothing that its own videos lack.

The indexes call latents `steps`, and `stream_step` the number of latents in a stream before a clip's own; so do the keys of
batches. `_facts` reads these names.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from longtake.datasets.compact import Rows


@dataclass(frozen=True)
class Lengths:
    """The places in a stream at which windows begin, and so the lengths of their histories: all before, at most `most`.

    With probability `none` it begins at the stream's first latent, else at one of `some`, each as likely. Histories are
    alike from `most` on, so a window at the last of `some` may as well begin later, by any multiple of `unit`. Beginnings
    that a stream is too short for are not drawn. With a curriculum, `reaches`, each batch draws only beginnings in its reach.
    """

    some: tuple[int, ...]  # rising
    most: int
    none: float = 0.0
    unit: int = 1
    least: int = 0  # latents before a window that a stream must have room for
    reaches: tuple[tuple[int, int], ...] = ()  # (first batch, most latents), rising, from batch 0 on

    def beginnings(self, total: int, window: int) -> tuple[int, ...]:
        """The places of `some` that a stream of `total` latents has room for, else the stream's first latent."""
        return tuple(begin for begin in self.some if begin + window <= total) or (0,)

    def within(self, reach: int) -> "Lengths":
        """Lengths with histories of at most `reach` latents; if all are longer, the shortest, cut to `reach`."""
        if reach >= self.most:
            return self
        some = tuple(begin for begin in self.some if begin <= reach) or self.some[:1]
        return replace(self, some=some, most=min(reach, some[-1]))

    def of_batch(self, number: int) -> "Lengths":
        """The lengths that global batch `number` draws from."""
        return self.within([reach for first, reach in self.reaches if first <= number][-1]) if self.reaches else self

    def mean(
        self, totals: np.ndarray, window: int, reach: int | None = None, weights: np.ndarray | None = None
    ) -> float:
        """The mean number of latents in a history, `reach` at most.

        Args:
            totals: (N,) latents in the stream of each sample.
            window: latents in a window.
            weights: (N,) how often each sample comes; None: all alike.
        """
        lengths = self if reach is None else self.within(reach)
        kinds, kind = np.unique(totals, return_inverse=True)
        means = np.array([np.minimum(lengths.beginnings(int(n), window), lengths.most).mean() for n in kinds])
        return (1 - self.none) * float(np.average(means[kind], weights=weights)) if len(kinds) else 0.0

    def draw(self, total: int, window: int, rng: np.random.Generator | None) -> int:
        """The latent of a stream at which a window begins. Without `rng` the last of `some` that it has room for."""
        beginnings = self.beginnings(total, window)
        if rng is None:
            return beginnings[-1]
        if rng.random() < self.none:
            return 0
        begin = int(rng.choice(beginnings))
        later = (total - window - begin) // self.unit if begin == self.some[-1] >= self.most else 0
        return begin + self.unit * int(rng.integers(later + 1))


def totals(rows: Rows) -> np.ndarray:
    """(N,) for all rows of a column of latents, the number of latents in their streams."""
    out = np.empty(int(rows.counts.sum()), np.int64)
    for shard, (start, count) in enumerate(zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)):
        before, latents = _facts(rows, shard)
        number = np.cumsum(before == 0) - 1
        out[start : start + count] = np.bincount(number, latents)[number]
    return out


def firsts(rows: Rows) -> np.ndarray:
    """(N,) for all rows of a column of latents, the row of the first clip of their streams."""
    out = np.empty(int(rows.counts.sum()), np.int64)
    for shard, (start, count) in enumerate(zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)):
        before, _ = _facts(rows, shard)
        out[start : start + count] = start + np.maximum.accumulate(np.where(before == 0, np.arange(count), 0))
    return out


def joined(rows: Rows) -> bool:
    """Whether a column's streams may be of several clips."""
    filled = np.flatnonzero(rows.counts)
    return len(filled) > 0 and "stream_step" in rows.of(int(filled[0])).column_names


def clips_of(before: Sequence[int], row: int) -> range:
    """The rows of a shard whose clips make up the stream that `row` is in, given what their streams have before each."""
    first, end = row, row + 1
    while before[first]:
        first -= 1
    while end < len(before) and before[end]:
        end += 1
    return range(first, end)


def _facts(rows: Rows, shard: int) -> tuple[np.ndarray, np.ndarray]:
    """For each clip of a shard the latents of its stream before it, and its own."""
    table = rows.of(shard)
    latents = table["steps"].to_numpy()
    before = table["stream_step"].to_numpy() if "stream_step" in table.column_names else np.zeros(len(latents), int)
    return before, latents
