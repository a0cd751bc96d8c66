"""How alike filled gaps and the truth look to a network of images (LPIPS, arXiv 1801.03924)."""

from __future__ import annotations

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.measures.gaps import cases, conditions
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.metrics.perceptual import lpips


def run(subject: Subject, material: Material) -> Result:
    """LPIPS of the frames that are made, of the first draw."""
    network = material.perceptual()
    return Result(
        {
            (case.clip.unit, case.clip.key): {"gap_lpips": lpips(network, case.made[:1], case.truth).item()}
            for case in cases(subject, material)
        }
    )


MEASURE = Measure(
    what="LPIPS of the frames that are made in gaps (arXiv 1801.03924)",
    version=1,
    of="fills",
    figures={"gap_lpips": "lower"},
    networks=("perceptual",),
    conditions=conditions,
    run=run,
)
