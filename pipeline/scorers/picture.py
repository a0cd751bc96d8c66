"""What the scorers of single pictures share: which frames they look at, at what size, and how they count what they find."""

import importlib.util
from collections.abc import Sequence
from typing import Any

import numpy as np

from longtake.datasets.errors import not_installed
from longtake.datasets.networks import imported
from longtake.pipeline.scorers.scorer import Frames, Values

_OVERLAP = 0.3  # area that two boxes share, of what they cover together: from here on they are around the same thing


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


def resized(cv2: Any, rgb: np.ndarray, side: int, multiple: int = 1) -> np.ndarray:
    """(H, W, 3) uint8 whose shorter side is scaled to `side`, and both to the nearest `multiple`."""
    scale = side / min(rgb.shape[:2])
    height, width = (max(multiple, round(n * scale / multiple) * multiple) for n in rgb.shape[:2])
    way = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    return np.asarray(cv2.resize(rgb, (width, height), interpolation=way))


def distinct(boxes: np.ndarray) -> list[int]:
    """Numbers of those of boxes (N, 4), left, top, right, bottom, the surest first, that no surer one of them covers as well."""
    kept: list[int] = []
    for n, box in enumerate(boxes):
        if not kept or _overlap(box, boxes[kept]).max() < _OVERLAP:
            kept.append(n)
    return kept


def _overlap(box: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Area that (4,) shares with each of (N, 4), of what both cover together."""
    sides = np.minimum(box[2:], others[:, 2:]) - np.maximum(box[:2], others[:, :2])
    both = np.maximum(sides, 0).prod(1)
    area = (box[2:] - box[:2]).prod() + (others[:, 2:] - others[:, :2]).prod(1) - both
    return np.asarray(both / np.maximum(area, 1e-9))


def presence(counts: Sequence[int]) -> Values:
    """Of what was counted in each frame of a clip: `count` in the frame with most, and `seen`, the share of frames with any."""
    return {"count": float(max(counts)), "seen": sum(count > 0 for count in counts) / len(counts)}
