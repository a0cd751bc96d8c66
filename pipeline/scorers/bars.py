"""Black bars at the sides of a picture, that stay for the whole clip.

A bar is black and of one level from the side of the picture to a straight edge, behind which the picture is lit. Where the
picture behind is dark for the whole clip, nobody can tell a bar from the night, and none is said to be there.
"""

from functools import partial

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.picture import chosen
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values, Watching

_BLACK = 28  # luma; bars of careless footage are not quite 16
_SPREAD = 6  # luma within a bar
_LIT = 12  # luma above a bar's own, of the picture behind it
_STRAIGHT = 0.25  # share of the edge behind which it is lit
_SOFT = 4  # lines from a bar to its lit neighbour, where scaling or coding has smeared the edge


class Config(StageConfig):
    """Letterbox and pillarbox.

    rate      looks per second
    thinnest  share of the picture's side; thinner bars count as none
    """

    rate: float = Setting(2.0, gt=0, le=240)
    thinnest: float = Setting(0.01, ge=0, lt=0.5)


def fields(config: Config) -> tuple[Field, ...]:
    of_height, of_width = "share of the picture's height, 0 to 1", "share of the picture's width, 0 to 1"
    return (
        Field("top", "number", f"black bar at the top, {of_height}"),
        Field("bottom", "number", f"black bar at the bottom, {of_height}"),
        Field("left", "number", f"black bar at the left, {of_width}"),
        Field("right", "number", f"black bar at the right, {of_width}"),
        Field("share", "number", "of the picture that bars cover, 0 to 1"),
        Field(
            "shape",
            "label",
            "letterbox (above and below), pillarbox (both sides), window (all round), edge (fewer), or none",
            ("none", "letterbox", "pillarbox", "window", "edge"),
        ),
    )


class Watch:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._highest: np.ndarray | None = None
        self._lowest: np.ndarray | None = None

    def add(self, frames: Frames) -> None:
        places = chosen(frames, self._config.rate)
        if places:
            luma = frames.luma[places]
            high, low = luma.max(0), luma.min(0)
            self._highest = high if self._highest is None else np.maximum(self._highest, high)
            self._lowest = low if self._lowest is None else np.minimum(self._lowest, low)

    def values(self) -> Values:
        assert self._highest is not None and self._lowest is not None  # every clip has a first frame
        # side bars are measured between those above and below, and the other way round
        most = self._highest
        (top, bottom), (left, right) = bars(most, self._lowest), bars(most.T, self._lowest.T)
        h, w = most.shape
        if top + bottom and not left + right:
            left, right = bars(most[top : h - bottom].T, self._lowest[top : h - bottom].T)
        elif left + right and not top + bottom:
            top, bottom = bars(most[:, left : w - right], self._lowest[:, left : w - right])

        shares = {"top": top / h, "bottom": bottom / h, "left": left / w, "right": right / w}
        shares = {side: share if share >= self._config.thinnest else 0.0 for side, share in shares.items()}
        picture = (1 - shares["top"] - shares["bottom"]) * (1 - shares["left"] - shares["right"])
        return {**shares, "share": 1 - picture, "shape": shape(**shares)}


def bars(highest: np.ndarray, lowest: np.ndarray) -> tuple[int, int]:
    """Lines of the bars above and below.

    Args:
        highest: (H, W) uint8, the most luma that each pixel ever had.
        lowest: (H, W) uint8, the least.
    """
    # a hundredth of a line may be anything: noise, or a spot on the glass
    peak = np.quantile(highest, 0.99, axis=1)
    floor = np.quantile(lowest, 0.01, axis=1)
    black = (peak <= _BLACK) & (peak - floor <= _SPREAD)
    if black.all():
        return 0, 0
    return _lines(black, highest, peak), _lines(black[::-1], highest[::-1], peak[::-1])


def _lines(black: np.ndarray, highest: np.ndarray, peak: np.ndarray) -> int:
    """Lines of the bar at the beginning; 0 where no lit picture begins at a straight edge."""
    lines = int(black.argmin())
    if not lines:
        return 0
    lit = highest[lines : lines + _SOFT] > float(np.median(peak[:lines])) + _LIT
    return lines if lit.any(0).mean() >= _STRAIGHT else 0


def shape(top: float, bottom: float, left: float, right: float) -> str:
    """The label of bars."""
    across, aside = bool(top and bottom), bool(left and right)
    if across and aside:
        return "window"
    if across or aside:
        return "letterbox" if across else "pillarbox"
    return "edge" if top or bottom or left or right else "none"


def _load(config: Config, device: str) -> Watching:
    return Watching(partial(Watch, config))


SCORER = Scorer(Config, 1, fields, _load)
