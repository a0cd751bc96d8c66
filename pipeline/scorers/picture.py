"""What the scorers of single pictures share: which frames they look at, and at what size."""

import importlib.util
from typing import Any

import numpy as np

from longtake.datasets.errors import not_installed
from longtake.datasets.networks import imported
from longtake.pipeline.scorers.scorer import Frames


def needed(*names: str) -> str:
    """Nothing. Raises UserError where one of the extra's modules is not installed, before anything is decoded."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise not_installed(name, "curation")
    return ""


def opencv() -> Any:
    """OpenCV, on one thread for as long as the process lives: its flow and its bodies would be others with more.

    Its lengths of vectors (`magnitude`, `cartToPolar`) are left alone: their last bits depend on where their arrays lie.
    """
    cv2 = imported("cv2", "scorers", "curation")
    cv2.setNumThreads(1)
    return cv2


def chosen(frames: Frames, rate: float) -> list[int]:
    """Places in `frames` of those that a look `rate` times a second falls on; the clip's first is always one.

    They depend on the numbers of the frames in the clip alone, not on how it is cut into pieces.
    """
    step = rate / frames.fps
    count = len(frames.planes)
    return [n for n in range(count) if (i := frames.first + n) == 0 or int(i * step) > int((i - 1) * step)]


def reduced(luma: np.ndarray, side: int) -> np.ndarray:
    """(H, W) uint8 to float32, averaged over whole boxes so that the shorter side has `side` to 2 `side` - 1 pixels where it can."""
    factor = max(1, min(luma.shape) // side)
    if factor == 1:
        return luma.astype(np.float32)
    h, w = (n // factor for n in luma.shape)
    boxes = luma[: h * factor, : w * factor].reshape(h, factor, w, factor)
    return np.asarray(boxes.mean((1, 3), dtype=np.float32))
