"""What a camera and a coder leave in a picture: noise, and the edges of blocks.

Noise is measured where the picture is flattest. Block edges are found by their comb: at a fixed distance, columns whose
small step exceeds both neighbours' are frequent. The distance is searched for, since clips were scaled after they were
coded.

What it gives up: a coder that smooths noise away leaves nothing to measure; blocks that scaling made smaller than five
pixels are not seen.
"""

from functools import partial

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.picture import chosen
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values, Watching

_TILE = 16  # pixels, of the flat areas
_FLAT = 0.1  # share of the tiles that count as flat
_WINDOW = 1024  # pixels of the middle of the picture, at most, either way
_STEP = 24  # luma; larger steps belong to the picture
_NEAREST, _FARTHEST = 5.0, 24.0  # pixels between the edges of blocks
_FINE = 16  # frequencies in one of the Fourier transform's


class Config(StageConfig):
    """Noise and blockiness.

    rate   looks per second
    """

    rate: float = Setting(2.0, gt=0, le=240)


def fields(config: Config) -> tuple[Field, ...]:
    return (
        Field("noise", "number", "standard deviation of the noise in levels of luma, 0 to 219; 2 shows, 5 is strong"),
        Field(
            "blocks",
            "number",
            "how much more often steps stand on a grid than off it, 0 to 1; blocks show above about 0.1",
        ),
        Field("spacing", "number", "pixels between the edges of blocks where `blocks` is above 0.05; 0: no grid"),
    )


class Watch:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._noise: list[float] = []
        self._across: list[np.ndarray] = []
        self._down: list[np.ndarray] = []

    def add(self, frames: Frames) -> None:
        for n in chosen(frames, self._config.rate):
            picture = _middle(frames.luma[n])
            sigma = noise(picture)
            if sigma is not None:
                self._noise.append(sigma)
            self._across.append(peaks(picture))
            self._down.append(peaks(picture.T))

    def values(self) -> Values:
        # a grid has both directions
        across, down = (comb(np.mean(each, 0)) for each in (self._across, self._down))
        height, spacing = min(across, down)
        sigma = float(np.median(self._noise)) if self._noise else None
        return {"noise": sigma, "blocks": height, "spacing": spacing if height > 0.05 else 0.0}


def noise(picture: np.ndarray) -> float | None:
    """Standard deviation of the noise of an (H, W) int16 picture; None where no area is flat and within the range of luma."""
    # a mask that is blind to planes and edges, and has variance 36 under white noise of variance 1
    rows = picture[:-2] - 2 * picture[1:-1] + picture[2:]
    masked = np.abs(rows[:, :-2] - 2 * rows[:, 1:-1] + rows[:, 2:])
    h, w = (n // _TILE * _TILE for n in masked.shape)
    if not h or not w:
        return None

    # areas at the ends of the range are clipped, and show none
    shape = (h // _TILE, _TILE, w // _TILE, _TILE)
    level = picture[1 : h + 1, 1 : w + 1].reshape(shape).mean((1, 3))
    sigma = masked[:h, :w].reshape(shape).mean((1, 3)) * (np.sqrt(np.pi / 2) / 6)
    sigma = sigma[(level > 24) & (level < 227)]
    return float(np.quantile(sigma, _FLAT)) if sigma.size else None


def peaks(picture: np.ndarray) -> np.ndarray:
    """(H, W) int16 to (W - 3,): in which share of the rows the small step between two columns exceeds both its neighbours."""
    steps = np.abs(np.diff(picture, axis=1))
    middle = steps[:, 1:-1]
    return np.asarray(((middle > steps[:, :-2]) & (middle > steps[:, 2:]) & (middle <= _STEP)).mean(0))


def comb(shares: np.ndarray) -> tuple[float, float]:
    """Height above the rest of the highest comb in (N,) values, and the distance between its teeth."""
    count = len(shares)
    if count < 2 * _FARTHEST:
        return 0.0, 0.0
    spectrum = np.abs(np.fft.rfft(shares - shares.mean(), count * _FINE)) / count
    # the wave once and twice as frequent as the teeth: a comb has both, a pattern in the picture seldom
    once = np.arange(int(np.ceil(count * _FINE / _FARTHEST)), int(count * _FINE / _NEAREST) + 1)
    spacing = count * _FINE / once
    heights = np.minimum(spectrum[once], spectrum[2 * once]) * spacing
    best = int(heights.argmax())
    return float(heights[best]), float(spacing[best])


def _middle(luma: np.ndarray) -> np.ndarray:
    """The middle of the picture, as int16."""
    (top, left), (h, w) = ((max(0, n - _WINDOW) // 2 for n in luma.shape), (min(n, _WINDOW) for n in luma.shape))
    return luma[top : top + h, left : left + w].astype(np.int16)


def _load(config: Config, device: str) -> Watching:
    return Watching(partial(Watch, config))


SCORER = Scorer(Config, 2, fields, _load)
