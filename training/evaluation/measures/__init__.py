"""The table of measures. A measure is a file here, with `MEASURE`, and a line in `MEASURES`; imported when it is used."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from longtake.training.evaluation.record import Result
from longtake.training.evaluation.suite import Aspect, Suite
from longtake.training.registry.gate import Better

if TYPE_CHECKING:
    from longtake.training.evaluation.material import Material
    from longtake.training.evaluation.subject import Subject

MEASURES: dict[str, str] = {  # name -> module
    "agreement": "longtake.training.evaluation.measures.agreement",
    "background": "longtake.training.evaluation.measures.background",
    "clip_rs": "longtake.training.evaluation.measures.clip_rs",
    "coherence": "longtake.training.evaluation.measures.coherence",
    "consistency": "longtake.training.evaluation.measures.consistency",
    "debiased": "longtake.training.evaluation.measures.debiased",
    "degradation": "longtake.training.evaluation.measures.degradation",
    "distance": "longtake.training.evaluation.measures.distance",
    "diversity": "longtake.training.evaluation.measures.diversity",
    "diversity_lpips": "longtake.training.evaluation.measures.diversity_lpips",
    "drift": "longtake.training.evaluation.measures.drift",
    "equivariance": "longtake.training.evaluation.measures.equivariance",
    "gap_lpips": "longtake.training.evaluation.measures.gap_lpips",
    "gaps": "longtake.training.evaluation.measures.gaps",
    "inception": "longtake.training.evaluation.measures.inception",
    "latents": "longtake.training.evaluation.measures.latents",
    "lpips": "longtake.training.evaluation.measures.lpips",
    "memory": "longtake.training.evaluation.measures.memory",
    "motion": "longtake.training.evaluation.measures.motion",
    "prediction": "longtake.training.evaluation.measures.prediction",
    "reconstruction": "longtake.training.evaluation.measures.reconstruction",
    "reconstruction_distance": "longtake.training.evaluation.measures.reconstruction_distance",
    "retrieval": "longtake.training.evaluation.measures.retrieval",
    "seam_distance": "longtake.training.evaluation.measures.seam_distance",
    "seams": "longtake.training.evaluation.measures.seams",
    "speed": "longtake.training.evaluation.measures.speed",
    "vbench": "longtake.training.evaluation.measures.vbench",
}


class Measure(NamedTuple):
    """A measure of models.

    what        a line for people: what its figures are, with the paper or equation
    version     raise it when the same model would get other figures
    of          what a model must do to be measured
    figures     for each figure whether higher or lower is better
    networks    fields of `suite.Networks` that it needs; `Material` has them loaded
    conditions  `conditions(suite)`: the fields of the suite that its figures depend on, beside its networks, as plain data
    run         `run(subject, material)`: its figures of a model. Raises UserError, Failure
    own         only for models whose `Kind.measures` names it
    """

    what: str
    version: int
    of: Aspect
    figures: Mapping[str, Better]
    networks: tuple[str, ...]
    conditions: Callable[[Suite], Mapping[str, Any]]
    run: Callable[[Subject, Material], Result]
    own: bool = False


def of_clips(suite: Suite) -> Mapping[str, Any]:
    """The conditions of a measure whose figures depend on nothing beside the clips and its networks."""
    return {}


def load(name: str) -> Measure:
    """The measure of this name."""
    measure: Measure = importlib.import_module(MEASURES[name]).MEASURE
    return measure
