"""Measures of evaluations that are quick: how bright what a model makes is, by what it does."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Aspect, Suite

CALLS: list[str] = []  # the models that were measured, in order
STOP_AT: list[int] = []  # numbers of calls that are stopped


def conditions(suite: Suite) -> Mapping[str, Any]:
    return {"videos": [video.model_dump(mode="json") for video in suite.videos]}


def run(aspect: Aspect, subject: Subject, material: Material) -> Result:
    CALLS.append(f"{aspect} {subject.uri.rpartition('/')[2]}")
    if len(CALLS) in STOP_AT:
        raise KeyboardInterrupt
    rows, levels = {}, []
    for unit, key, video in _videos(aspect, subject, material):
        levels.append(float(video.float().mean()))
        rows[unit, key] = {"level": levels[-1]}
    total = Pooled(max(levels), [max(levels)] * 3)
    return Result(rows, {"brightest": total}, {"level": {0.0: {unit: row["level"] for (unit, _), row in rows.items()}}})


def _videos(aspect: Aspect, subject: Subject, material: Material) -> Any:
    if aspect == "generates":
        for made in material.generated(subject, material.suite.videos[0]):
            yield made.unit, made.key, torch.cat(list(made.frames()), 2)
    elif aspect == "fills":
        for number, filled in enumerate(material.filled(subject)):
            yield filled.clip.unit, f"{filled.clip.key}-{number}", filled.made
    elif aspect == "retrieves":
        for kept in material.retrieved(subject):
            yield kept.clip.unit, kept.clip.key, kept.made
    else:
        for clip, video in material.reconstructed(subject):
            yield clip.unit, clip.key, video


def measure(aspect: Aspect) -> Measure:
    return Measure("levels", 1, aspect, {"level": "lower", "brightest": "lower"}, (), conditions, partial(run, aspect))
