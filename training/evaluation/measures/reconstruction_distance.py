"""How far reconstructions are from held-out clips, as distributions of a network's features."""

from __future__ import annotations

from longtake.datasets.loader import to_model
from longtake.training.evaluation.distances import distances
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure, of_clips
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import clips, side


def run(subject: Subject, material: Material) -> Result:
    """`reconstruction_frechet` and `reconstruction_kernel`; a resample draws a source and its reconstruction together."""
    network, suite = material.features(), material.suite
    real = side("held-out clips", network, clips(material, suite.clips.frames))
    copies = ((clip.unit, to_model(copy)) for clip, copy in material.reconstructed(subject))
    found = distances(real, side("reconstructions", network, copies), suite.resamples, suite.seed, paired=True)
    return Result(pooled={f"reconstruction_{name}": each for name, each in found.pooled.items()}, notes=found.notes)


MEASURE = Measure(
    what="reconstructions of held-out clips beside them: Fréchet distance (arXiv 1706.08500, eq. 6) and squared MMD of a cubic"
    " kernel (arXiv 1801.01401); with StyleGAN-V's I3D they are rFVD and rKVD",
    version=1,
    of="reconstructs",
    figures={"reconstruction_frechet": "lower", "reconstruction_kernel": "lower"},
    networks=("features",),
    conditions=of_clips,
    run=run,
)
