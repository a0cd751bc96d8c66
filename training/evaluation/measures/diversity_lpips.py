"""How unlike videos of one prompt look to a network."""

from functools import partial

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.measures.diversity import conditions
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.unlike import unlike
from longtake.training.metrics.perceptual import lpips


def run(subject: Subject, material: Material) -> Result:
    """`diversity_lpips` of the first frames of the videos."""
    found, notes = unlike(subject, material, partial(lpips, material.perceptual()))
    return Result(pooled={"diversity_lpips": found} if found else {}, notes=notes)


MEASURE = Measure(
    what="generated videos of one prompt: the mean LPIPS of two of them (arXiv 1801.03924; as diversity, 1711.11586, §4)",
    version=1,
    of="generates",
    figures={"diversity_lpips": "higher"},
    networks=("perceptual",),
    conditions=conditions,
    run=run,
)
