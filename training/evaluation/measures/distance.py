"""How far generated videos are from held-out clips, as distributions of a network's features."""

from longtake.training.evaluation.distances import to_heldout
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import conditions


def run(subject: Subject, material: Material) -> Result:
    """`frechet` and `kernel` of the first frames of the videos."""
    found = to_heldout(subject, material, material.features())
    return Result(pooled=found.pooled, notes=found.notes)


MEASURE = Measure(
    what="generated videos beside held-out clips: Fréchet distance (arXiv 1706.08500, eq. 6; of videos 1812.01717) and squared"
    " MMD of a cubic kernel (arXiv 1801.01401); with StyleGAN-V's I3D they are FVD and KVD",
    version=1,
    of="generates",
    figures={"frechet": "lower", "kernel": "lower"},
    networks=("features",),
    conditions=conditions,
    run=run,
)
