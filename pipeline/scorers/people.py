"""People: upright bodies by OpenCV's histograms of gradients (Dalal and Triggs, 2005), and faces as `faces` finds them.

The detector of bodies is old and knows people who stand or walk, seen whole. No package ships a better one with its
weights. So a face counts as a person too, and people who sit, lie or are cut off with their faces turned away are missed.
"""

from typing import Any

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers import centerface
from longtake.pipeline.scorers.one_by_one import OneByOne
from longtake.pipeline.scorers.picture import distinct, opencv, presence, resized
from longtake.pipeline.scorers.scorer import Scorer, Values


class Config(StageConfig):
    """People.

    frames   of a clip, spread evenly
    side     pixels; the shorter side is scaled to it; bodies of 100 of these pixels and more are seen
    margin   of the detector of bodies, from 0 (many mistakes) to about 3; below it a body does not count
    face     how likely a face has to be to count as a person, 0 to 1
    """

    frames: int = Setting(4, ge=1, le=64)
    side: int = Setting(384, ge=128, le=2048)
    margin: float = Setting(1.0, ge=0, le=10)
    face: float = Setting(0.5, ge=0, le=1)


def fields(config: Config) -> tuple[Field, ...]:
    return (
        Field("count", "number", "of people in the frame with most: its bodies or its faces, whichever are more"),
        Field("bodies", "number", "of upright bodies in the frame with most"),
        Field("margin", "number", "of the surest body of all frames, 0 (none) to about 3"),
        Field("seen", "number", "share of the frames with a person, 0 to 1"),
    )


def _load(config: Config, device: str) -> OneByOne:
    cv2 = opencv()
    detector = cv2.HOGDescriptor()
    detector.setSVMDetector(cv2.HOGDescriptor_getDefaultPeopleDetector())
    finder = centerface.finder(centerface.SIDE, config.face)

    def values(clip: np.ndarray) -> Values:
        margins = [_margins(detector, resized(cv2, rgb, config.side)) for rgb in clip]
        bodies = [int((each >= config.margin).sum()) for each in margins]
        faces = [int((likely >= config.face).sum()) for _, likely in finder.find(clip)]
        surest = max(float(each.max(initial=0.0)) for each in margins)
        return {**presence(list(map(max, bodies, faces))), "bodies": float(max(bodies)), "margin": surest}

    return OneByOne(config.frames, None, values)


def _margins(detector: Any, picture: np.ndarray) -> np.ndarray:
    """(N,) of the bodies in (H, W, 3)."""
    found, margins = detector.detectMultiScale(picture, winStride=(8, 8), padding=(16, 16), scale=1.1)
    margins = np.asarray(margins, np.float64).reshape(-1)
    boxes = np.asarray(found, np.float64).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    order = np.argsort(-margins, kind="stable")
    return np.asarray(margins[order][distinct(boxes[order])])


SCORER = Scorer(Config, 1, fields, _load, digest=lambda config: centerface.digest())
