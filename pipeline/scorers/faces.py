"""Faces, as the network CenterFace finds them (see centerface.py)."""

from functools import partial

import numpy as np
from pydantic import Field as Setting

from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.scorers import centerface
from longtake.pipeline.scorers.one_by_one import OneByOne
from longtake.pipeline.scorers.picture import presence
from longtake.pipeline.scorers.scorer import Scorer, Values


class Config(StageConfig):
    """Faces.

    frames   of a clip, spread evenly
    side     pixels; the shorter side is scaled to it, smaller ones find only larger faces
    least    how likely a face has to be to count, 0 to 1
    """

    frames: int = Setting(4, ge=1, le=64)
    side: int = Setting(centerface.SIDE, ge=64, le=2048)
    least: float = Setting(0.5, ge=0, le=1)


def fields(config: Config) -> tuple[Field, ...]:
    return (
        Field("count", "number", "of faces in the frame with most"),
        Field("largest", "number", "share of the picture that the largest face's box covers, 0 to 1; 0 without faces"),
        Field("confidence", "number", "how likely the surest face of all frames is, 0 to 1, counted or not"),
        Field("seen", "number", "share of the frames with a face, 0 to 1"),
    )


def _load(config: Config, device: str) -> OneByOne:
    return OneByOne(config.frames, None, partial(_values, centerface.finder(config.side, config.least), config.least))


def _values(finder: centerface.Finder, least: float, clip: np.ndarray) -> Values:
    counts, largest, surest = [], 0.0, 0.0
    for boxes, likely in finder.find(clip):
        surest = max(surest, float(likely.max(initial=0.0)))
        left, top, right, bottom = boxes[likely >= least].T
        counts.append(len(left))
        # pixels of the frame to a share of it
        areas = (right - left) * (bottom - top) / (clip.shape[1] * clip.shape[2])
        largest = max(largest, float(areas.max(initial=0.0)))
    return {**presence(counts), "largest": largest, "confidence": surest}


SCORER = Scorer(Config, 1, fields, _load, digest=lambda config: centerface.digest())
