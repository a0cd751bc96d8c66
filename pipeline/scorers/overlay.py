"""What stands still in a picture while the rest moves: a logo, a watermark, subtitles, a frame around it.

Over some seconds the gradient of each pixel is averaged. Where something moves the directions cancel; where something was laid
over they add up. A still part counts only if something moves around it, or nearly everything else does: before a camera
that stands still a wall does too.

What it gives up: an overlay on a still background cannot be told from the background, and a moving overlay is none. A clip
in which too little moves is labelled `still`, and has no share.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.picture import chosen, needed, opencv, reduced
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values, Watching

_SIDE = 160  # pixels; at the least, of the shorter side
_FEWEST = 4  # looks in a window that can tell anything
_EDGE = 5.0  # luma per pixel, of an edge that people see
_STANDS = 0.93  # |mean gradient| / mean |gradient| of what stands still; 1 in a photograph
_MOVES = 0.6  # of what moves
_CHANGE = 5.0  # luma; standard deviation over time of what moves
_AROUND = 0.5  # share of the surroundings of an overlay that change, on its stillest side
_ALL = 0.7  # share of the edges that move when the camera does: flat surroundings need not change then
_CORNERS = (
    0.15  # least of the least variance of its gradients over the most: a line along its own motion stands still too
)
_TOO_STILL = 0.5  # less of the edges moves: a camera that stands still, before which walls stand too
_SMALLEST = 0.0006  # share of the picture


Box = tuple[int, int, int, int]  # left, top, width, height in pixels


class Config(StageConfig):
    """Static overlays.

    rate     looks per second
    seconds  an overlay stands so long; subtitles change after some
    """

    rate: float = Setting(6.0, gt=0, le=240)
    seconds: float = Setting(2.0, gt=0, le=60)


def fields(config: Config) -> tuple[Field, ...]:
    return (
        Field(
            "share",
            "number",
            "of the picture that lies within overlays, 0 to 1; none, by the reason `still`, where too little moves to tell",
        ),
        Field("moves", "number", "share of the edges that move, 0 to 1: below 0.3 an overlay is easily missed"),
        Field(
            "place",
            "label",
            "of the largest overlay: logo (in a corner), subtitle (low in the middle), other, none; still: too little moves to tell",
            ("none", "logo", "subtitle", "other", "still"),
        ),
    )


@dataclass
class _Sums:
    """Of the looks in one window, by pixel: of the gradients, of their lengths, of the luma and its square."""

    looks: int
    across: np.ndarray
    down: np.ndarray
    length: np.ndarray
    luma: np.ndarray
    square: np.ndarray


@dataclass(frozen=True)
class Still:
    """What one window shows: boxes of overlays; None where too little moves."""

    boxes: tuple[Box, ...] | None
    share: float
    moves: float


class Watch:
    def __init__(self, config: Config) -> None:
        self._config = config
        self._cv2 = opencv()
        self._sums: _Sums | None = None
        self._windows: list[Still] = []
        self._shape = (1, 1)

    def add(self, frames: Frames) -> None:
        rate = min(self._config.rate, frames.fps)
        longest = max(_FEWEST, round(rate * self._config.seconds))
        for n in chosen(frames, self._config.rate):
            self._look(reduced(frames.luma[n], _SIDE))
            if self._sums is not None and self._sums.looks == longest:
                self._close()

    def values(self) -> Values:
        # a rest is too short to tell, unless it is all that there is
        if self._sums is not None and (self._sums.looks >= _FEWEST or not self._windows):
            self._close()
        told = [window for window in self._windows if window.boxes is not None]
        moves = float(np.median([window.moves for window in self._windows]))
        if not told:
            return {"share": None, "moves": moves, "place": "still", "reason": "still"}
        most = max(told, key=lambda window: window.share)
        boxes = most.boxes or ()
        place = _place(max(boxes, key=lambda box: box[2] * box[3]), self._shape) if boxes else "none"
        return {"share": most.share, "moves": moves, "place": place}

    def _look(self, luma: np.ndarray) -> None:
        self._shape = luma.shape
        across = self._cv2.Sobel(luma, self._cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
        down = self._cv2.Sobel(luma, self._cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
        length = np.sqrt(across * across + down * down)
        sums = self._sums
        if sums is None:
            self._sums = _Sums(1, across, down, length, luma.copy(), luma * luma)
            return
        sums.looks += 1
        sums.across += across
        sums.down += down
        sums.length += length
        sums.luma += luma
        sums.square += luma * luma

    def _close(self) -> None:
        sums, self._sums = self._sums, None
        assert sums is not None
        self._windows.append(_judged(sums, self._cv2))


def _judged(sums: _Sums, cv2: Any) -> Still:
    """What a window shows."""
    looks = sums.looks
    length = sums.length / looks
    mean = np.sqrt(sums.across * sums.across + sums.down * sums.down) / looks
    change = np.sqrt(np.maximum(sums.square / looks - (sums.luma / looks) ** 2, 0))
    edges = length > _EDGE
    stands = mean / np.maximum(length, 1e-6)
    moving = float((edges & (stands < _MOVES)).sum() / max(1, edges.sum()))
    changing = (change > _CHANGE).astype(np.float32)
    if looks < _FEWEST or moving < _TOO_STILL:
        return Still(None, 0.0, moving)

    # letters and the parts of a logo grow together
    h, w = length.shape
    reach = max(2, round(min(h, w) / 40))
    still = ((mean > _EDGE) & (stands > _STANDS)).astype(np.uint8)
    near = cv2.morphologyEx(still, cv2.MORPH_CLOSE, np.ones((reach, 2 * reach), np.uint8))
    count, parts, stats, _ = cv2.connectedComponentsWithStats(near, connectivity=8)
    boxes: list[Box] = []
    covered = np.zeros((h, w), bool)
    for part in range(1, count):
        left, top, width, height = (int(n) for n in stats[part, :4])
        box = (left, top, width, height)
        inside = slice(top, top + height), slice(left, left + width)
        own = (parts[inside] == part) & (still[inside] > 0)
        if own.sum() < _SMALLEST * h * w or width * height > 0.4 * h * w:
            continue
        if not _has_corners(sums.across[inside][own], sums.down[inside][own]):
            continue
        if moving > _ALL or _surrounded(box, reach, changing):
            boxes.append(box)
            covered[inside] = True
    return Still(tuple(boxes), float(covered.mean()), moving)


def _has_corners(across: np.ndarray, down: np.ndarray) -> bool:
    """Whether (N,) gradients have many directions."""
    xx, yy, xy = (float((a * b).mean()) for a, b in ((across, across), (down, down), (across, down)))
    half, root = (xx + yy) / 2, float(np.hypot((xx - yy) / 2, xy))
    return half - root >= _CORNERS * (half + root)


def _surrounded(box: Box, reach: int, changing: np.ndarray) -> bool:
    """Whether the picture changes at each side of a box; a side at the picture's own counts as changing."""
    left, top, width, height = box
    right, bottom, far = left + width, top + height, 2 * reach
    above, below = slice(max(0, top - far), top), slice(bottom, bottom + far)
    before, behind = slice(max(0, left - far), left), slice(right, right + far)
    rows, columns = slice(top, bottom), slice(left, right)
    sides = (changing[above, columns], changing[below, columns], changing[rows, before], changing[rows, behind])
    return all(side.mean() > _AROUND for side in sides if side.size)


def _place(box: Box, size: tuple[int, int]) -> str:
    """The label of an overlay."""
    (left, top, width, height), (h, w) = box, size
    x, y = (left + width / 2) / w, (top + height / 2) / h
    if y > 0.65 and 0.3 < x < 0.7 and width > height:
        return "subtitle"
    if (x < 0.3 or x > 0.7) and (y < 0.3 or y > 0.7):
        return "logo"
    return "other"


def _load(config: Config, device: str) -> Watching:
    return Watching(partial(Watch, config))


SCORER = Scorer(Config, 2, fields, _load, digest=lambda config: needed("cv2"))
