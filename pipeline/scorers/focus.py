"""How blurred a picture is, without another one to compare it with.

A picture that is sharp loses much of its gradient when it is blurred; one that is blurred already loses little. The share
that is left says how blurred it is, whatever its contrast and its contents.

What it gives up: noise and the edges of blocks count as sharp; a blur along an edge, as of a panning camera, counts half.
"""

from functools import partial
from typing import Any

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.picture import chosen, needed, opencv, reduced
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values, Watching

_SIDE = 256  # pixels; at the least, of the shorter side
_SIZES = 3  # each half of the one before
_NOISE = 3  # pixels of a first blur, against noise
_BOX = 9  # pixels of the second one
_TILES = 8  # by as many, for the sharpest part
_FLAT = 1.0  # luma; standard deviation of a picture that shows nothing to be sharp


class Config(StageConfig):
    """Blur and focus.

    rate   looks per second
    """

    rate: float = Setting(2.0, gt=0, le=240)


def fields(config: Config) -> tuple[Field, ...]:
    return (
        Field(
            "blur", "number", "how blurred the picture is: 0.4 is sharp, 0.6 soft, 0.8 has no detail; median over time"
        ),
        Field(
            "subject",
            "number",
            "how blurred its sharpest tenth is, in the same way; far below `blur` where a subject stands in focus before a soft ground",
        ),
        Field(
            "worst",
            "number",
            "the blur of its most blurred tenth of the time: moments of motion blur or refocusing",
        ),
    )


class Watch:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._cv2 = opencv()
        self._whole: list[float] = []
        self._sharpest: list[float] = []

    def add(self, frames: Frames) -> None:
        for n in chosen(frames, self._config.rate):
            whole, sharpest = blur(reduced(frames.luma[n], _SIDE), self._cv2)
            if whole is not None and sharpest is not None:
                self._whole.append(whole)
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
    """Blur of an (H, W) float32 picture and of its sharpest tenth, 0..1; None where it shows nothing."""
    if picture.std() < _FLAT:
        return None, None
    # the gradient of a strong blur is less than a level per pixel, and stairs; it is measured in a smaller picture
    values = []
    for _ in range(_SIZES):
        values.append(_blur(picture, cv2))
        h, w = (n // 2 for n in picture.shape)
        if min(h, w) < 4 * _TILES:
            break
        picture = picture[: 2 * h, : 2 * w].reshape(h, 2, w, 2).mean((1, 3))
    return max(whole for whole, _ in values), values[0][1]


def _blur(picture: np.ndarray, cv2: Any) -> tuple[float, float]:
    """Of one size of a picture."""
    picture = cv2.blur(picture, (_NOISE, _NOISE))
    slope, left = np.zeros((2, _TILES, _TILES))
    for axis, box in ((1, (_BOX, 1)), (0, (1, _BOX))):
        steps = np.abs(np.diff(picture, axis=axis))
        soft = np.abs(np.diff(cv2.blur(picture, box), axis=axis))
        slope += _tiled(steps)
        left += _tiled(np.minimum(steps, soft))
    rich = slope >= slope.mean() / 2
    return float(left.sum() / slope.sum()), float(np.quantile(left[rich] / slope[rich], 0.1))


def _tiled(values: np.ndarray) -> np.ndarray:
    """(H, W) to means over a grid of tiles; what is over at the right and below is left out."""
    h, w = (n // _TILES for n in values.shape)
    return np.asarray(values[: h * _TILES, : w * _TILES].reshape(_TILES, h, _TILES, w).mean((1, 3)))


def _load(config: Config, device: str) -> Watching:
    return Watching(partial(Watch, config))


SCORER = Scorer(Config, 1, fields, _load, digest=lambda config: needed("cv2"))
