"""The longest clips of a split as a whole, for measurements on more frames than a training window has."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets import clip, compact
from longtake.datasets.cache import Cache
from longtake.datasets.loader.reader import Reader
from longtake.datasets.view import kept


class Whole(NamedTuple):
    """A clip by its shard and row of a split's index."""

    base: compact.Rows
    reader: Reader
    shard: int
    row: dict[str, Any]

    def frames(self, size: tuple[int, int], stride: int = 1) -> Iterator[np.ndarray]:
        """Every `stride`-th frame (H, W, 3) uint8, scaled and cropped as the loader does, decoded as they are taken.

        Raises:
            Failure: the clip is damaged.
        """
        row = self.row
        mp4 = self.reader.member(self.base, self.shard, row["mp4_offset"], row["mp4_size"], row["mp4_crc32"])
        name = f"{self.base.tar(self.shard)[0]}: {row['key']}.mp4"
        numbers = range(0, row["frame_count"], stride)
        yield from clip.fitted(mp4, (row["height"], row["width"]), numbers, size, name)


def longest(
    dataset: str,
    split: str,
    view: str | None,
    size: tuple[int, int],
    count: int,
    least: int,
    cache: Cache | None = None,
) -> list[Whole]:
    """The `count` longest clips of a split that have at least `least` frames and are as large as `size`, longest first.

    Among equally long clips the choice is always the same, and from all over the split.
    """
    base, facts = compact.open_split(dataset, split, cache=cache)
    keep, _, _ = kept(base, view)
    lengths, heights, widths = (facts[name].to_numpy() for name in ("frame_count", "height", "width"))
    usable = np.flatnonzero(keep & (lengths >= least) & (heights >= size[0]) & (widths >= size[1]))
    order = np.lexsort((np.random.default_rng(0).permutation(len(usable)), -lengths[usable]))
    reader = Reader(cache)
    numbers = usable[order[:count]]
    shards = np.searchsorted(base.starts, numbers, "right") - 1
    places = zip(shards.tolist(), (numbers - base.starts[shards]).tolist(), strict=True)
    return [Whole(base, reader, shard, base.row(shard, row)) for shard, row in places]
