"""Scorer of light: exposure, flicker and fades, from luma."""

import numpy as np

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers.scorer import Frames, Scorer, Values, Watching

BLACK, WHITE = 16, 235  # luma of clips
LUMA = (np.arange(256) - BLACK) / (WHITE - BLACK)  # 0 (black) to 1 (white)
NEAR = 3  # levels from either: as good as black, or white
BLOCKS = 6  # along each side
WINDOW = 0.5  # seconds: slower changes of light are no flicker
FLAT = 0.35  # share of a clip's contrast that is left in the first or last frame of a fade
EMPTY, WHOLE = 0.05, 0.9  # shares of it between which the fade is
STEADY = 0.8  # share of its frames that have more contrast than the one before
STEP = 0.6  # of the contrast, at most, between neighbouring frames: more is a cut
LONGEST = 4.0  # seconds of a fade


class Config(StageConfig):
    """Of `light`. It has no settings."""


def fields(config: Config) -> tuple[Field, ...]:
    """What it gives."""
    return (
        Field("exposure", "number", "mean luma, 0 (black) to 1 (white), black bars included"),
        Field("dark", "number", "share of the picture that is as good as black, 0 to 1, black bars included"),
        Field("bright", "number", "share of the picture that is as good as white, 0 to 1"),
        Field("contrast", "number", "standard deviation of luma in a frame, mean over frames, 0 to 0.5"),
        Field(
            "flicker", "number", "typical swing of the whole picture's luma within half a second, of 1; 0.01 is seen"
        ),
        Field("fade_in", "number", "seconds of the fade at the start, from black, white or grey; 0: none"),
        Field("fade_out", "number", "seconds of the fade at the end; 0: none"),
    )


class Watch:
    """Some numbers of each frame of one clip."""

    def __init__(self) -> None:
        self.rows: list[np.ndarray] = []  # of each frame: mean, dark, bright, deviation, change of level since the last
        self.last: np.ndarray | None = None
        self.fps = 0.0

    def add(self, frames: Frames) -> None:
        """The next frames of the clip."""
        self.fps = frames.fps
        for small in frames.small:
            counts = np.bincount(small.ravel(), minlength=256) / small.size
            mean = float(counts @ LUMA)
            deviation = max(0.0, float(counts @ LUMA**2) - mean**2) ** 0.5
            dark, bright = counts[: BLACK + NEAR + 1].sum(), counts[WHITE - NEAR :].sum()

            # what moves changes blocks up and down; light changes most of them alike
            blocks = _blocks(small)
            change = 0.0 if self.last is None else float(np.median(blocks - self.last))
            self.rows.append(np.array([mean, dark, bright, deviation, change]))
            self.last = blocks

    def values(self) -> Values:
        """The values of the clip, after its last frame."""
        rows = np.array(self.rows)
        mean, dark, bright, deviation = rows[:, :4].mean(0)
        return {
            "exposure": float(np.clip(mean, 0, 1)),
            "dark": float(dark),
            "bright": float(bright),
            "contrast": float(deviation),
            "flicker": _flicker(np.cumsum(rows[:, 4]), self.fps),
            "fade_in": _fade(rows[:, 3], self.fps),
            "fade_out": _fade(rows[::-1, 3], self.fps),
        }


def _blocks(small: np.ndarray) -> np.ndarray:
    # (BLOCKS^2,) mean luma
    rows, columns = (np.linspace(0, size, BLOCKS + 1).astype(int) for size in small.shape)
    sums = np.add.reduceat(np.add.reduceat(small, rows[:-1], 0, dtype=np.int64), columns[:-1], 1)
    means = sums / np.outer(np.diff(rows), np.diff(columns))
    return np.asarray((means - BLACK) / (WHITE - BLACK)).ravel()


def _flicker(level: np.ndarray, fps: float) -> float:
    # the swing about a straight line through the frames nearby; the median, so that a step of light hardly counts
    reach = min(max(1, round(WINDOW * fps / 2)), (len(level) - 1) // 2)
    if reach < 1:
        return 0.0
    kernel = np.ones(2 * reach + 1) / (2 * reach + 1)
    swing = level[reach:-reach] - np.convolve(level, kernel, "valid")
    return float(1.4826 * 2**0.5 * np.median(np.abs(swing)))


def _fade(deviation: np.ndarray, fps: float) -> float:
    # seconds until a picture that is flat at first has its contrast, by a steady rise
    usual = float(np.quantile(deviation, 0.75))
    if usual < 0.02 or deviation[0] > FLAT * usual:
        return 0.0
    start, end = (int(np.argmax(deviation >= share * usual)) for share in (EMPTY, WHOLE))
    start = max(0, start - 1)  # what is black before it is no part of the fade
    steps = np.diff(deviation[start : end + 1]) / usual
    steady = (steps > 0).mean() >= STEADY and steps.min() >= -0.05 and steps.max() <= STEP
    return (end - start) / fps if 2 <= end - start <= LONGEST * fps and steady else 0.0


def load(config: Config, device: str) -> Watching:
    """The scorer."""
    return Watching(Watch)


SCORER = Scorer(config=Config, version=1, fields=fields, load=load)
