"""Whole clips, the longest of a split: for what is measured on more frames than a training window has."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets import clip, compact
from longtake.datasets.cache import Cache
from longtake.datasets.loader.reader import Reader
from longtake.datasets.view import kept


class Whole(NamedTuple):
    """A clip by its place in a split."""

    base: compact.Rows
    reader: Reader
    shard: int
    row: dict[str, Any]

    def frames(self, size: tuple[int, int], stride: int = 1) -> Iterator[np.ndarray]:
        """Every `stride`-th frame (H, W, 3) uint8, scaled and cropped as the loader does, decoded as they are taken.

        Raises:
            Failure: the clip is damaged.
        """
        own, row = (self.row["height"], self.row["width"]), self.row
        mp4 = self.reader.member(self.base, self.shard, row["mp4_offset"], row["mp4_size"], row["mp4_crc32"])
        scaled = clip.covering_size(own, size)
        name = f"{self.base.tar(self.shard)[0]}: {row['key']}.mp4"
        for frame in clip.decoded(mp4, range(0, row["frame_count"], stride), None if scaled == own else scaled, name):
            yield clip.crop(frame[None], size)[0]


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

    Of equally long ones always the same, from all over the split.
    """
    base, facts = compact.open_split(dataset, split, cache=cache)
    keep, _, _ = kept(base, view)
    lengths, heights, widths = (facts[name].to_numpy() for name in ("frame_count", "height", "width"))
    usable = np.flatnonzero(keep & (lengths >= least) & (heights >= size[0]) & (widths >= size[1]))
    order = np.lexsort((np.random.default_rng(0).permutation(len(usable)), -lengths[usable]))
    reader, found = Reader(cache), []
    for number in usable[order[:count]].tolist():
        shard = int(np.searchsorted(base.starts, number, "right")) - 1
        found.append(Whole(base, reader, shard, base.row(shard, number - int(base.starts[shard]))))
    return found
