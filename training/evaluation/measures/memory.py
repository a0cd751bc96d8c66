"""The most memory that a model takes for what it does, in a process of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from longtake.training.engines import device
from longtake.training.evaluation import peak
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.measures.speed import asked
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite
from longtake.training.evaluation.work import machine


def run(subject: Subject, material: Material) -> Result:
    """GB at the peak: of the GPU's memory where there is one, else of the process, with its libraries (see `peak`)."""
    with torch.inference_mode(False), _elsewhere(subject, material):
        found = peak.measured(subject.pinned, material.suite)
    notes = [f"{found.before / 1e9:.2f} GB of it before the model is loaded"] if found.before else []
    return Result(pooled={"memory_gb": Pooled(found.most / 1e9, (), 1)}, notes=notes)


@contextmanager
def _elsewhere(subject: Subject, material: Material) -> Iterator[None]:
    """The model is not on the GPU, which may have no room for that of the other process too."""
    subject.module.to("cpu")
    material.close()
    try:
        yield
    finally:
        subject.module.to(device())


def _conditions(suite: Suite) -> Mapping[str, Any]:
    return machine() | asked(suite)


MEASURE = Measure(
    what="GB of memory at the peak of all that the model does: of the GPU's, or without one of its process",
    version=1,
    of="runs",
    figures={"memory_gb": "lower"},
    networks=(),
    conditions=_conditions,
    run=run,
)
