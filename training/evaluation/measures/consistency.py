"""Whether frames of a video look alike to a network of pictures: consistency of subjects, as VBench defines it."""

from collections.abc import Callable
from functools import partial

from torch import Tensor

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import asked, conditions, embedded, length, openings
from longtake.training.metrics.dynamics import consistency


def run(subject: Subject, material: Material) -> Result:
    """`subject_consistency` of each video's first frames; with the weights of DINO's ViT-B/16 it is that of VBench."""
    network = material.features()
    if network.images is None:
        return Result(notes=[f"subject_consistency needs a network of pictures, and {network.name} takes whole videos"])
    return alike(subject, material, "subject_consistency", partial(embedded, network))


def alike(subject: Subject, material: Material, figure: str, vectors: Callable[[Tensor], Tensor]) -> Result:
    """How alike frames of each video are, by their vectors: those of a window (1, 3, T, H, W) are (T, D)."""
    if length(material.suite, asked(material.suite)) < 2:
        return Result(notes=["a single frame has no other to be like; raise frames of the suite's clips and videos"])
    videos = openings(material, subject)
    return Result({(made.unit, made.key): {figure: consistency(vectors(video))} for made, video in videos})


MEASURE = Measure(
    what="VBench's subject_consistency (arXiv 2311.17982): mean cosine of each frame's features with those of the first frame and"
    " of the one before",
    version=1,
    of="generates",
    figures={"subject_consistency": "higher"},
    networks=("features",),
    conditions=conditions,
    run=run,
)
