"""What a scorer is: it gives values to a clip from its frames, and says what they mean.

There are two kinds. One sees every frame of a clip, piece by piece, in constant memory: motion, flicker, frozen frames. The
other sees some frames, spread evenly, of several clips of one shape at once: networks. A stage decodes a clip once for all of
them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig

# a value of each field: float, str, or (D,) or (N, D) float32; None where there is none, and then perhaps `reason`, a code
# that says why
Values = dict[str, Any]


@dataclass
class Frames:
    """Neighbouring frames of a clip.

    first   number of the first of them in the clip
    fps     of the clip
    planes  (T, H 3/2, W) uint8, the planes of yuv420p one below the other; H and W are even
    """

    first: int
    fps: float
    planes: np.ndarray

    @property
    def luma(self) -> np.ndarray:
        """(T, H, W) uint8, 16 (black) to 235 (white)."""
        return self.planes[:, : self.planes.shape[1] * 2 // 3]

    @property
    def chroma(self) -> np.ndarray:
        """(T, 2, H/2, W/2) uint8, blue and red difference, 128 is grey."""
        t, h, w = self.luma.shape
        return self.planes.reshape(t, -1)[:, h * w :].reshape(t, 2, h // 2, w // 2)

    @cached_property
    def small(self) -> np.ndarray:
        """(T, h, w) uint8, luma by area averaging of whole boxes, so that the shorter side has 72 to 143 pixels where it can."""
        factor = max(1, min(self.luma.shape[1:]) // 72)
        t, h, w = self.luma.shape
        h, w = h // factor, w // factor
        small = np.empty((t, h, w), np.uint8)
        # one frame stays in the CPU's cache: ten times faster than the mean of all boxes at once
        for luma, out in zip(self.luma, small, strict=True):
            rows = luma[: h * factor].reshape(h, factor, -1).sum(1, dtype=np.uint32)
            sums = sum(rows[:, x : w * factor : factor] for x in range(factor))
            out[:] = np.rint(sums / np.float32(factor * factor))
        return small


class Watch(Protocol):
    """What a scorer keeps while it watches one clip."""

    def add(self, frames: Frames) -> None:
        """The next frames of the clip."""

    def values(self) -> Values:
        """The values of the clip, after its last frame."""


class Watcher(Protocol):
    """A scorer that sees every frame of a clip."""

    def begin(self, row: Mapping[str, Any]) -> Watch:
        """`row` is that of the clip in the index (see `schema.INDEX`)."""


@dataclass(frozen=True)
class Watching:
    """A scorer whose watches begin alike, whatever the clip.

    watch  begins one
    """

    watch: Callable[[], Watch]

    def begin(self, row: Mapping[str, Any]) -> Watch:
        return self.watch()


class Looker(Protocol):
    """A scorer that sees some frames of each clip.

    count  frames of a clip, spread evenly (see `places`)
    size   (height, width) that they are scaled to cover and cropped to; None: each clip's own
    batch  clips at once, at most
    """

    count: int
    size: tuple[int, int] | None
    batch: int

    def look(self, frames: np.ndarray) -> list[Values]:
        """The values of B clips of one shape from (B, N, H, W, 3) uint8, N = `count` or fewer in shorter clips."""


def places(frame_count: int, count: int) -> list[int]:
    """Numbers of at most `count` frames of a clip, the middles of equal parts; each once, in order."""
    count = min(count, frame_count)
    return [(2 * n + 1) * frame_count // (2 * count) for n in range(count)]


@dataclass(frozen=True)
class Scorer:
    """A kind of scorer: a module of this package has one, named SCORER.

    config   its settings, whose docstring documents them
    version  raised when the same settings would give other values
    fields   `fields(config)`: what it gives
    digest   `digest(config)`: of files that decide the values beside the settings, "" without any; raises UserError
    load     `load(config, device)`: the scorer itself, in an actor, "cpu" or "cuda"; raises UserError, Failure. It works
             on one thread: with more a sum may come in another order
    gpu      whether a GPU makes it faster
    """

    config: type[StageConfig]
    version: int
    fields: Callable[[Any], tuple[Field, ...]]
    load: Callable[[Any, str], Watcher | Looker]
    digest: Callable[[Any], str] = lambda config: ""
    gpu: bool = False
