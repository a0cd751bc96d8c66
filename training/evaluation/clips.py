"""The held-out clips of an evaluation: the same random ones for every model, at the suite's rate and size."""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets import captions, clip, compact, index, later, storage, view
from longtake.datasets.errors import UserError
from longtake.datasets.loader.captions import Place, drawn
from longtake.datasets.loader.reader import Reader
from longtake.datasets.neighbours import follows
from longtake.datasets.shard import described

SPLIT = "val"
_ALMOST = 1e-6  # of a frame, which rounding may take


class Part(NamedTuple):
    """A part of a held-out clip: from frame `first` of the clip on, which its `row` in the index describes.

    It goes on in the clips of `rest`, rows of the same shard, which follow without a hole.
    """

    shard: int
    number: int  # of the row in its shard
    row: Mapping[str, Any]
    first: int
    rest: Sequence[Mapping[str, Any]] = ()

    @property
    def key(self) -> str:
        return str(self.row["key"])

    @property
    def source(self) -> str:
        return str(self.row["source"])

    @property
    def rows(self) -> Sequence[Mapping[str, Any]]:
        return (self.row, *self.rest)

    @property
    def content(self) -> list[Any]:
        """What it shows, for digests."""
        return [self.key, self.row["sha256"], self.first, *(row["sha256"] for row in self.rest)]


def ticks(count: int, fps: float, rate: float) -> list[int]:
    """The frame that is on screen in a video of `rate` at each of the first `count` frames of one of `fps`."""
    return [math.floor(number * rate / fps + _ALMOST) for number in range(count)]


def changing(count: int, fps: float, rate: float, first: int = 0) -> list[int]:
    """Those of `count` frames at `fps` that show another frame of a video of `rate` than the one before: all of a high rate.

    Args:
        first: the frame that shows the video's first one; it goes on before.
    """
    shown = [math.floor((number - first) * rate / fps + _ALMOST) for number in range(-1, count)]
    return [number for number in range(count) if shown[number + 1] != shown[number]]


def frames_needed(count: int, fps: float, rate: float) -> int:
    """The frames at `rate` that `count` frames at `fps` are taken from."""
    return math.floor((count - 1) * rate / fps + _ALMOST) + 1


@dataclass
class Heldout:
    """The held-out clips of a dataset that a view keeps.

    dataset  its URL
    view     URL of the view, None keeps all
    """

    dataset: str
    view: str | None

    def __post_init__(self) -> None:
        index.describe(self.dataset)
        self._base, self._facts = compact.open_split(self.dataset, SPLIT)
        self._keep, _, self.view_digest = view.kept(self._base, self.view)
        self._reader = Reader()
        if not self._keep.any():
            which = "clip that the view keeps" if self.view else "clip"
            raise UserError(f"dataset: {self.dataset} has no held-out {which}; shard it with a val split")

    @cached_property
    def _rows(self) -> list[tuple[int, int, dict[str, Any]]]:
        rows = []
        for shard, start in enumerate(self._base.starts.tolist()):
            for number in np.flatnonzero(self._keep[start : start + int(self._base.counts[shard])]).tolist():
                rows.append((shard, number, self._base.row(shard, number)))
        return rows

    @cached_property
    def fps(self) -> float:
        """Frames a second of most clips."""
        return float(Counter(row["fps"] for _, _, row in self._rows).most_common(1)[0][0])

    def chosen(self, seconds: float, size: tuple[int, int], most: int, seed: int, join: bool = False) -> list[Part]:
        """Up to `most` random clips that last so long and are as large as `size`, each with a random part of such length.

        Which they are depends on the seed and their keys alone, so that they stay the same where others are added.

        Args:
            join: shorter clips count with those of their source that follow without a hole, as long as is needed.
        """
        fitting = []
        for stretch in self._stretches(seconds if join else 0.0):
            shard, number, row = stretch[0]
            rows = [each for _, _, each in stretch]
            latest = _count(rows) - _needed(seconds, row)
            if latest >= 0 and row["height"] >= size[0] and row["width"] >= size[1]:
                drawn_by = hashlib.sha256(f"{seed} {row['key']}".encode()).digest()
                first = int.from_bytes(drawn_by[8:16], "little") % (latest + 1)
                fitting.append((drawn_by, Part(shard, number, row, first, tuple(rows[1:]))))
        return [part for _, part in sorted(fitting, key=lambda each: each[0])[:most]]

    def _stretches(self, seconds: float) -> list[list[tuple[int, int, dict[str, Any]]]]:
        """Clips by themselves where they last so long, else with those after them until they do; none is in two."""
        stretches: list[list[tuple[int, int, dict[str, Any]]]] = []
        for each in self._rows:
            last = stretches[-1] if stretches else []
            short = all(_count(rows) < _needed(seconds, each[2]) for rows in ([row for *_, row in last], [each[2]]))
            if last and short and last[-1][0] == each[0] and follows(last[-1][2], each[2]):
                last.append(each)
            else:
                stretches.append([each])
        return stretches

    def longest(self, join: bool = False) -> str:
        """What the largest and the longest clips are, for messages; with `join` of clips with all that follow."""
        everything = sum(row["frame_count"] / row["fps"] for _, _, row in self._rows)
        stretches = self._stretches(everything if join else 0.0)
        longest = max(_count([row for *_, row in each]) / each[0][2]["fps"] for each in stretches)
        height, width = max(((row["height"], row["width"]) for _, _, row in self._rows), key=min)
        what = "longest held-out clips without a hole last" if join else "longest held-out clip lasts"
        return f"the {what} {longest:.3g} s, the largest has {height}x{width}"

    def frames(
        self, part: Part, count: int, fps: float, size: tuple[int, int], after: float = 0.0
    ) -> Iterator[np.ndarray]:
        """`count` frames (H, W, 3) uint8 of a part at `fps`, from `after` seconds in it on, scaled and cropped to `size`.

        Raises:
            Failure: the clip is damaged, or has no such frame.
        """
        begin = part.first + math.floor(after * part.row["fps"] + _ALMOST)
        last = _count(part.rows) - 1  # which rounding may go beyond
        often = Counter(min(begin + tick, last) for tick in ticks(count, fps, part.row["fps"]))
        gone = 0
        for row in part.rows:
            different = sorted(number - gone for number in often if gone <= number < gone + row["frame_count"])
            for number, frame in zip(different, self._decoded(part.shard, row, different, size), strict=True):
                for _ in range(often[gone + number]):
                    yield frame
            gone += row["frame_count"]

    def _decoded(
        self, shard: int, row: Mapping[str, Any], numbers: Sequence[int], size: tuple[int, int]
    ) -> Iterator[np.ndarray]:
        if numbers:
            mp4 = self._reader.member(self._base, shard, row["mp4_offset"], row["mp4_size"], row["mp4_crc32"])
            name = f"{self._base.tar(shard)[0]}: {row['key']}.mp4"
            yield from clip.fitted(mp4, (row["height"], row["width"]), numbers, size, name)

    def caption(self, part: Part, seconds: float) -> str | None:
        """The first caption about a part: of a column of captions where the dataset has one, else of its source's annotations."""
        begin = part.first / part.row["fps"]
        about = self._captions(part)
        found = drawn(about, Place(part.number, begin, begin + seconds, None))
        return None if found is None else str(about[found]["text"])

    def _captions(self, part: Part) -> Sequence[Mapping[str, Any]]:
        row = part.row
        if self._column is not None:
            return self._column.row(part.shard, part.number)["captions"] or ()
        if not row["json_size"]:
            return ()
        offset, size, crc32 = (row[f"json_{name}"] for name in ("offset", "size", "crc32"))
        content = described(bytes(self._reader.member(self._base, part.shard, offset, size, crc32)))
        said = later.sample(content, self._base.annotations(part.shard), row["source"])
        try:
            texts = captions.of_source({name: said[name] for name in captions.NAMES if name in said})
        except ValueError:
            return ()  # its source was annotated with something else
        lasts = row["frame_count"] / row["fps"]
        cut = captions.of_clip(texts, row["start_seconds"] or 0.0, lasts, 1 / row["fps"])
        return [caption._asdict() for caption in cut]

    @cached_property
    def _column(self) -> compact.Rows | None:
        for name in captions.columns_of(self.dataset):
            rows, _ = compact.open_split(self.dataset, SPLIT, name)
            if rows.counts.tolist() == self._base.counts.tolist():
                return rows
        return None


def listing(parts: Sequence[Part], texts: Sequence[str | None] = ()) -> str:
    """The digest of a choice of clips, and of what is said of them."""
    lines = [part.content for part in parts]
    return hashlib.sha256(json.dumps([lines, list(texts)]).encode()).hexdigest()


def _count(rows: Sequence[Mapping[str, Any]]) -> int:
    return sum(row["frame_count"] for row in rows)


def _needed(seconds: float, row: Mapping[str, Any]) -> int:
    """Frames of a clip that last so long."""
    return math.ceil(seconds * row["fps"] - _ALMOST)


def where(dataset: str) -> str:
    """A dataset as conditions name it."""
    return storage.absolute(dataset)
