"""Scorer of cadence: frames that repeat the one before, in a freeze or in the rhythm of a conversion of the frame rate.

Two frames are the same where no part of the picture has changed: the measure is the change of the cell that changed most, so
that a small thing that moves counts, and coding noise does not. A repeated frame stands out from its neighbours on both sides.
"""

import cv2
import numpy as np

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values, Watching

SIDE = 240  # pixels of the shorter side are looked at, or up to twice as many: every nth, so that noise stays as it is
CELLS = 12  # along the shorter side
STILL = 0.5  # of 255: with less change in every cell the picture stands still
REFRESH = 3.0  # of 255: as much change as a coder makes in a still picture, now and then
SHARE = 0.25  # of the change around it: a repeated frame changes less
AROUND = 8  # frames on either side
FREEZE = 0.25  # seconds that a picture stands still in a freeze
FROZEN = 0.25  # share of a frozen clip in freezes
FEW = 0.03  # share of repeated frames of a clip that has all its frames
RHYTHM = 0.7  # share of repeated frames that come again a period later
PERIODS = range(2, 31)  # frames; 5 is 3:2, 30 is any conversion to 30 frames a second

LABELS = ("full", "frozen", "doubled", "tripled", "telecine", "irregular")


class Config(StageConfig):
    """Of `cadence`. It has no settings."""


def fields(config: Config) -> tuple[Field, ...]:
    """What it gives."""
    return (
        Field("frozen", "number", "share of the clip in freezes, a quarter of a second or longer, 0 to 1"),
        Field("longest", "number", "seconds of the longest freeze"),
        Field("duplicate", "number", "share of the frames outside freezes that repeat the one before, 0 to 1"),
        Field("true_fps", "number", "different pictures a second outside freezes; 0 where all is frozen"),
        Field(
            "cadence",
            "label",
            "full: every frame is new; frozen: a quarter of the clip or more stands still; doubled, tripled: each picture"
            " twice, three times; telecine: another steady rhythm, such as 3:2 or every fifth frame; irregular",
            LABELS,
        ),
    )


class Watch:
    """The changes between neighbouring frames of one clip."""

    def __init__(self) -> None:
        self.changes: list[float] = []
        self.last: np.ndarray | None = None
        self.fps = 0.0

    def add(self, frames: Frames) -> None:
        """The next frames of the clip."""
        self.fps = frames.fps
        step = max(1, min(frames.luma.shape[1:]) // SIDE)

        for luma in frames.luma:
            picture = np.ascontiguousarray(luma[::step, ::step])
            if self.last is not None:
                self.changes.append(_change(self.last, picture))
            self.last = picture

    def values(self) -> Values:
        """The values of the clip, after its last frame."""
        changes = np.array(self.changes)
        repeated = _repeated(changes)
        frozen = _freezes(repeated | _still(changes), max(2, round(FREEZE * self.fps)))
        lengths = [end - start for start, end in _runs(frozen)]

        moving = repeated[~frozen]
        duplicate = float(moving.mean()) if len(moving) else 0.0
        return {
            "frozen": float(frozen.sum()) / max(1, len(frozen)),
            "longest": max(lengths, default=0) / self.fps,
            "duplicate": duplicate,
            "true_fps": self.fps * (1 - duplicate) if len(moving) or not len(frozen) else 0.0,
            "cadence": _label(repeated, frozen, duplicate),
        }


def _change(one: np.ndarray, other: np.ndarray) -> float:
    # the mean change of the cell that changed most, of 255, in whole numbers for as long as it can
    size = max(1, min(one.shape) // CELLS)
    sums = cv2.integral(cv2.absdiff(one, other))[::size, ::size].astype(np.int64)
    cells = sums[1:, 1:] - sums[:-1, 1:] - sums[1:, :-1] + sums[:-1, :-1]
    return float(cells.max()) / size**2


def _repeated(changes: np.ndarray) -> np.ndarray:
    # a level needs two frames of change, so that a cut or a flash is none, and is the lower of the two sides', so that what
    # begins to move slowly isn't taken for a repeated frame; a side that the clip ends in says nothing where there is another
    repeated = np.zeros(len(changes), bool)
    for n, change in enumerate(changes):
        sides = [changes[max(0, n - AROUND) : n], changes[n + 1 : n + 1 + AROUND]]
        full = [side for side in sides if len(side) == AROUND] or [np.delete(changes, n)]
        level = min(float(np.sort(side)[-2]) if len(side) > 1 else 0.0 for side in full)
        repeated[n] = level > REFRESH and change <= SHARE * level
    return repeated


def _still(changes: np.ndarray) -> np.ndarray:
    # no change, or that of a coder before or after two frames without any
    none = np.pad(changes <= STILL, 2)
    beside = (none[:-4] & none[1:-3]) | (none[4:] & none[3:-1])
    return none[2:-2] | ((changes <= REFRESH) & beside)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    # (start, end) of each run of set flags
    edges = np.flatnonzero(np.diff(np.concatenate([[False], flags, [False]]).astype(np.int8)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]


def _freezes(still: np.ndarray, least: int) -> np.ndarray:
    frozen = np.zeros(len(still), bool)
    for start, end in _runs(still):
        frozen[start:end] = end - start >= least
    return frozen


def _label(repeated: np.ndarray, frozen: np.ndarray, duplicate: float) -> str:
    if len(frozen) and frozen.mean() >= FROZEN:
        return "frozen"
    loose = repeated & ~frozen
    if duplicate <= FEW or loose.sum() < 2:
        return "full"

    # the shortest period after which repeated frames come again
    for period in PERIODS:
        clear = ~(frozen[:-period] | frozen[period:])
        early, late = loose[:-period][clear], loose[period:][clear]
        if (early | late).any() and (early & late).sum() >= RHYTHM * (early | late).sum():
            fresh = round(period * (1 - duplicate))  # pictures in a period
            return {(2, 1): "doubled", (3, 1): "tripled"}.get((period, fresh), "telecine")
    return "irregular"


def load(config: Config, device: str) -> Watching:
    """The scorer."""
    return Watching(Watch)


SCORER = Scorer(config=Config, version=1, fields=fields, load=load)
