"""Scorers whose values a test can work out, in the place of the real ones: `tests/support/toy_scorers.py` as modules."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values


class Brightness(StageConfig):
    """Mean luma of all frames.

    scale   that it is multiplied by
    """

    scale: float = 1.0


class _Bright:
    def __init__(self, scale: float) -> None:
        self._scale, self._sums = scale, list[int]()

    def begin(self, row: Mapping[str, Any]) -> _Bright:
        time.sleep(float(os.environ.get("TOY_WAIT", "0")))
        return _Bright(self._scale)

    def add(self, frames: Frames) -> None:
        assert frames.first == len(self._sums)
        self._sums += frames.luma.mean((1, 2), dtype=np.float64).tolist()

    def values(self) -> Values:
        mean = float(np.mean(self._sums))
        return {"mean": mean * self._scale, "frames": len(self._sums), "side": "dark" if mean < 126 else "bright"}


class Colour(StageConfig):
    """Mean colour of some frames.

    frames  of a clip
    size    pixels a side; null: the clip's own
    """

    frames: int = 4
    size: int | None = None


class _Colours:
    def __init__(self, config: Colour) -> None:
        self.count, self.batch = config.frames, 3
        self.size = None if config.size is None else (config.size, config.size)

    def look(self, frames: np.ndarray) -> list[Values]:
        means = frames.mean((2, 3), dtype=np.float64)
        return [{"each": each, "vector": each.mean(0)} for each in means]


BRIGHT = Scorer(
    Brightness,
    1,
    lambda config: (
        Field("mean", "number", "0..255"),
        Field("frames", "number", "of the clip"),
        Field("side", "label", "of the middle", ("dark", "bright")),
    ),
    lambda config, device: _Bright(config.scale),
)
COLOUR = Scorer(
    Colour,
    1,
    lambda config: (
        Field("each", "vector", "red, green, blue of each frame", width=3, count=config.frames),
        Field("vector", "vector", "of all", width=3),
    ),
    lambda config, device: _Colours(config),
)


def modules(names: Sequence[str] = ("bright", "colour")) -> dict[str, str]:
    """The table of scorers with these alone."""
    return {name: f"toy_{name}" for name in names}
