"""Fréchet and kernel distances of held-out and generated videos as figures with replicates, or why there is none."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.record import Pooled
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import Side, asked, clips, drawn, length, listed, openings, side
from longtake.training.metrics import resampled
from longtake.training.metrics.features import FeatureNetwork

LEAST = 8  # videos on a side [assumption]; of fewer the bounds say nothing, as of a gate
_REPLICATES = (
    (300, 200),
    (1024, 100),
)  # features or samples, whichever are fewer, and the most replicates from there on

_DISTANCES: dict[str, tuple[Callable[..., float], Callable[..., Tensor]]] = {
    "frechet": (resampled.frechet, resampled.frechet_replicates),
    "kernel": (resampled.kernel, resampled.kernel_replicates),
}


class Distances(NamedTuple):
    """Distances by name, `frechet` and `kernel`, and notes for people."""

    pooled: dict[str, Pooled]
    notes: list[str]


def distances(real: Side, fake: Side, resamples: int, seed: int, paired: bool = False) -> Distances:
    """The distances of two sides, and what their errors come from: units of both sides are drawn, each by themselves.

    Where they are `paired`, both sides have the same units, which are drawn together.
    Too few videos on a side have no distance, but a note with the least number.
    """
    for each in (real, fake):
        if each.videos < LEAST:
            return Distances({}, [f"{each.videos} {each.what} are too few for a distance; it needs {LEAST} at least"])
    notes = []
    few, width = min(len(real.values), len(fake.values)), real.values.shape[1]
    if few <= width:
        notes.append(f"{few} samples for {width} features: Fréchet distances depend on their number")
    units = min(real.drawn_from, fake.drawn_from)
    for wide, most in _REPLICATES:
        if min(few, width) >= wide:
            resamples = min(resamples, most)
    sides = (real.rows(), fake.rows())
    # else another seed for the other side: they may have equally many units
    seeds = (seed, seed if paired else seed + 1)
    weights = [drawn(each.drawn_from, resamples, its) for each, its in zip((real, fake), seeds, strict=True)]
    pooled = {}
    for name, (value, replicates) in _DISTANCES.items():
        found = listed(replicates(*sides, *weights)) if units > 1 else []
        pooled[name] = Pooled(value(*sides), found, units)
    return Distances(pooled, notes)


def to_heldout(subject: Subject, material: Material, network: FeatureNetwork) -> Distances:
    """The distances of the first frames of generated videos to held-out clips."""
    suite = material.suite
    real = side("held-out clips", network, clips(material, length(suite, asked(suite))))
    fake = side("generated videos", network, ((made.unit, video) for made, video in openings(material, subject)))
    return distances(real, fake, suite.resamples, suite.seed)


def difference(first: Pooled, second: Pooled) -> Pooled:
    """How much higher the first is than the second, in each resample too."""
    found = [one - other for one, other in zip(first.replicates, second.replicates, strict=True)]
    return Pooled(first.value - second.value, found, min(first.units, second.units))
