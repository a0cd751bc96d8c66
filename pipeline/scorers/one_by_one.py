"""A looker that shows a network the frames of one clip at a time, so that no clip's values depend on the clips beside it.

Libraries choose by the shape of a batch how they add up, and another batch would give other last bits. It costs little: in
fp32 without TF32 a few frames keep a GPU busy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from longtake.pipeline.scorers.scorer import Values

Pool = Literal["mean", "max", "min"]  # over the frames of a clip


@dataclass
class OneByOne:
    """See `Looker`; `values` gives those of a clip from its frames (N, H, W, 3) uint8."""

    count: int
    size: tuple[int, int] | None
    values: Callable[[np.ndarray], Values]
    batch: int = 1

    def look(self, frames: np.ndarray) -> list[Values]:
        return [self.values(clip) for clip in frames]


def pooled(values: np.ndarray, pool: Pool) -> np.ndarray:
    """(N, ...) values of frames to those of their clip (...)."""
    wide = values.astype(np.float64)
    return np.asarray(wide.mean(0) if pool == "mean" else wide.max(0) if pool == "max" else wide.min(0))


def numbers(names: Sequence[str], values: np.ndarray) -> Values:
    """Values (N,) under their names."""
    return dict(zip(names, map(float, values), strict=True))
