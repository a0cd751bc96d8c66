"""How blurred a picture is, without another one to compare it with.

A picture that is sharp loses much of its gradient when it is blurred; one that is blurred already loses little. The share
that is left says how blurred it is, whatever its contrast and its contents.

What it gives up: noise and the edges of blocks count as sharp; a blur along an edge, as of a panning camera, counts half.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.picture import chosen, needed, package, reduced
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values

_SIDE = 256  # pixels; at the least, of the shorter side
_BOX = 9  # pixels of the second blur
_TILES = 8  # by as many, for the sharpest part
_FAINT = 2.0  # luma per pixel; a tile of less gradient shows nothing to be sharp


class Config(StageConfig):
    """Blur and focus.

    rate   looks per second
    """

    rate: float = 2.0


def fields(config: Config) -> tuple[Field, ...]:
    return (
        Field("blur", "number", "how blurred the picture is, 0 (every edge is one pixel wide) to 1; median over time"),
        Field(
            "subject",
            "number",
            "how blurred its sharpest tenth is, 0 to 1: low with a subject in focus before a soft ground",
        ),
        Field(
            "worst",
            "number",
            "the blur of its most blurred tenth of the time, 0 to 1: moments of motion blur or refocusing",
        ),
    )


class Watch:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._cv2 = package("cv2")
        self._whole: list[float] = []
        self._sharpest: list[float] = []

    def add(self, frames: Frames) -> None:
        for n in chosen(frames, self._config.rate):
            whole, sharpest = blur(reduced(frames.luma[n], _SIDE), self._cv2)
            if whole is not None:
                self._whole.append(whole)
            if sharpest is not None:
                self._sharpest.append(sharpest)

    def values(self) -> Values:
        if not self._whole:
            return {"blur": None, "subject": None, "worst": None}
        subject = float(np.median(self._sharpest)) if self._sharpest else None
        return {
            "blur": float(np.median(self._whole)),
            "subject": subject,
            "worst": float(np.quantile(self._whole, 0.9)),
        }


def blur(picture: np.ndarray, cv2: Any) -> tuple[float | None, float | None]:
    """Blur of an (H, W) float32 picture and of its sharpest tenth, 0..1; None where it shows nothing but flat areas."""
    slope, left = np.zeros((2, _TILES, _TILES), np.float32)
    for axis, box in ((1, (_BOX, 1)), (0, (1, _BOX))):
        steps = np.abs(np.diff(picture, axis=axis))
        soft = np.abs(np.diff(cv2.blur(picture, box), axis=axis))
        lost = np.maximum(steps - soft, 0)
        # per tile
        slope = slope + _tiled(steps)
        left = left + _tiled(steps - lost)

    rich = slope > 2 * _FAINT
    if not rich.any():
        return None, None
    sharpest = np.quantile(left[rich] / slope[rich], 0.1)
    return float(left[rich].sum() / slope[rich].sum()), float(sharpest)


def _tiled(values: np.ndarray) -> np.ndarray:
    """(H, W) to means over a grid of tiles; what is over at the right and below is left out."""
    h, w = (n // _TILES for n in values.shape)
    return np.asarray(values[: h * _TILES, : w * _TILES].reshape(_TILES, h, _TILES, w).mean((1, 3)))


class Watcher:
    def __init__(self, config: Config) -> None:
        self._config = config

    def begin(self, row: Mapping[str, Any]) -> Watch:
        return Watch(self._config)


SCORER = Scorer(Config, 1, fields, lambda config, device, threads: Watcher(config), digest=lambda config: needed("cv2"))
