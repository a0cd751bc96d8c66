"""How many frames a second a model makes, encodes, decodes, fills in or retrieves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from time import perf_counter
from typing import Any

import numpy as np
import torch

from longtake.training.evaluation import bootstrap, work
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite

_REPEATS = 5  # after one that is not counted


def run(subject: Subject, material: Material) -> Result:
    """Frames by the median time of some repeats, one video at a time; the interval is that of the repeats."""
    pooled, notes = dict[str, Pooled](), list[str]()
    for name, frames, call, told in work.of(subject, material.suite):
        _seconds(call)
        pooled[f"speed_{name}"] = rate(frames, [_seconds(call) for _ in range(_REPEATS)], material.suite)
        notes.append(f"{name}: {frames} frames of {told}")
    return Result(pooled=pooled, notes=notes)


def rate(frames: int, seconds: list[float], suite: Suite) -> Pooled:
    """Frames a second by the median of some times, and by those of resamples of them, scaled so that their mean is it.

    A rate is never below 0, so its error is a share: moved by a sum instead, slow repeats of a busy machine would go there.
    """
    draws = bootstrap.draws(len(seconds), suite.resamples, suite.seed)
    value, rates = frames / float(np.median(seconds)), frames / np.median(np.array(seconds)[draws], axis=1)
    return Pooled(value, (rates * (value / rates.mean())).tolist(), len(seconds))


def _seconds(call: Callable[[], object]) -> float:
    begin = perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return perf_counter() - begin


def asked(suite: Suite) -> dict[str, Any]:
    """The fields of the suite that say how much a model is to do."""
    return {
        "videos": [videos.model_dump(mode="json", exclude={"seeds"}) for videos in suite.videos[:1]],
        "prompt": suite.prompts[0] if suite.prompts else None,
        "gaps": suite.gaps.model_dump(mode="json"),
        "seconds": suite.seconds,
    }


def _conditions(suite: Suite) -> Mapping[str, Any]:
    return work.machine() | asked(suite) | {"repeats": _REPEATS}


MEASURE = Measure(
    what="frames a second that the model makes, encodes, decodes, fills in or retrieves, one video at a time",
    version=1,
    of="runs",
    figures={f"speed_{name}": "higher" for name in ("made", "encoded", "decoded", "filled", "retrieved")},
    networks=(),
    conditions=_conditions,
    run=run,
)
