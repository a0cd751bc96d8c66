"""People: upright bodies by OpenCV's histograms of gradients (Dalal and Triggs, 2005), and faces as `faces` finds them.

The detector of bodies is old and knows people who stand or walk, seen whole. No package ships a better one with its
weights. So a face counts as a person too, and people who sit, lie or are cut off with their faces turned away are missed.
"""

from typing import Any

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers import faces
from longtake.pipeline.scorers.picture import needed, opencv
from longtake.pipeline.scorers.scorer import Scorer, Values

_OVERLAP = 0.3  # area that two bodies share, of what they cover together


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


class Looker:
    size: tuple[int, int] | None = None
    batch = 8

    def __init__(self, config: Config) -> None:
        self.count = config.frames
        self._config = config
        self._cv2 = opencv()
        self._bodies = self._cv2.HOGDescriptor()
        self._bodies.setSVMDetector(self._cv2.HOGDescriptor_getDefaultPeopleDetector())
        self._faces = faces.Looker(faces.Config(least=config.face))

    def look(self, frames: np.ndarray) -> list[Values]:
        return [self._clip(clip) for clip in frames]

    def _clip(self, clip: np.ndarray) -> Values:
        margins = [self._margins(rgb) for rgb in clip]
        bodies = [int((each >= self._config.margin).sum()) for each in margins]
        people = [max(count, self._faces_in(rgb)) for count, rgb in zip(bodies, clip, strict=True)]
        return {
            "count": float(max(people)),
            "bodies": float(max(bodies)),
            "margin": max(float(each.max(initial=0.0)) for each in margins),
            "seen": sum(count > 0 for count in people) / len(people),
        }

    def _margins(self, rgb: np.ndarray) -> np.ndarray:
        """(N,) of the bodies in (H, W, 3)."""
        height, width = rgb.shape[:2]
        scale = self._config.side / min(height, width)
        size = round(width * scale), round(height * scale)
        way = self._cv2.INTER_AREA if scale < 1 else self._cv2.INTER_LINEAR
        picture = self._cv2.resize(rgb, size, interpolation=way)
        found, margins = self._bodies.detectMultiScale(picture, winStride=(8, 8), padding=(16, 16), scale=1.1)

        # the surest first; another one that covers much of the same is the same body
        margins = np.asarray(margins, np.float64).reshape(-1)
        boxes = np.asarray(found, np.float64).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        kept: list[int] = []
        for n in np.argsort(-margins, kind="stable"):
            if not kept or faces.overlap(boxes[n], boxes[kept]).max() < _OVERLAP:
                kept.append(int(n))
        return np.asarray(margins[kept])

    def _faces_in(self, rgb: np.ndarray) -> int:
        _, likely = self._faces.find(rgb)
        return int((likely >= self._config.face).sum())


def _load(config: Config, device: str, threads: int) -> Any:
    return Looker(config)


SCORER = Scorer(Config, 1, fields, _load, digest=lambda config: needed("cv2") + faces.SCORER.digest(faces.Config()))
