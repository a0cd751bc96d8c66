"""How alike reconstructions of held-out clips look to a network."""

from longtake.datasets.loader import to_model
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure, of_clips
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.metrics.perceptual import lpips


def run(subject: Subject, material: Material) -> Result:
    """`lpips` of each clip, the mean over its frames."""
    perceptual, rows = material.perceptual(), dict[tuple[Unit, str], dict[str, float]]()
    for clip, made in material.reconstructed(subject):
        rows[clip.unit, clip.key] = {"lpips": lpips(perceptual, to_model(made), to_model(clip.video)).item()}
    return Result(rows)


MEASURE = Measure(
    what="reconstructions of held-out clips from all of their frames: LPIPS (arXiv 1801.03924, eq. 1)",
    version=1,
    of="reconstructs",
    figures={"lpips": "lower"},
    networks=("perceptual",),
    conditions=of_clips,
    run=run,
)
