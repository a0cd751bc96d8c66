"""Distances to held-out clips by a second network, one that sees movement more than single frames."""

from longtake.training.evaluation.distances import to_heldout
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import conditions


def run(subject: Subject, material: Material) -> Result:
    """`frechet_debiased` and `kernel_debiased` of the first frames of the videos."""
    found = to_heldout(subject, material, material.features("debiased"))
    return Result(pooled={f"{name}_debiased": pooled for name, pooled in found.pooled.items()}, notes=found.notes)


MEASURE = Measure(
    what="generated videos beside held-out clips by a network that was trained without labels, such as VideoMAE:"
    " content-debiased Fréchet distance (arXiv 2404.12391), and the kernel distance of the same features",
    version=1,
    of="generates",
    figures={"frechet_debiased": "lower", "kernel_debiased": "lower"},
    networks=("debiased",),
    conditions=conditions,
    run=run,
)
