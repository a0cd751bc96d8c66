"""Whether frames of a video look alike to a dual encoder: consistency of backgrounds, as VBench defines it."""

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import (
    asked,
    conditions,
    dual_encoder,
    length,
    openings,
    pictures,
)
from longtake.training.metrics.dynamics import consistency


def run(subject: Subject, material: Material) -> Result:
    """`background_consistency` of each video's first frames; with CLIP's ViT-B/32 it is that of VBench."""
    suite, encoder = material.suite, dual_encoder(material)
    if length(suite, asked(suite)) < 2:
        return Result(notes=["a single frame has no other to be like; raise frames of the suite's clips and videos"])
    return Result(
        {
            (made.unit, made.key): {"background_consistency": consistency(pictures(encoder, video))}
            for made, video in openings(material, subject)
        }
    )


MEASURE = Measure(
    what="VBench's background_consistency (arXiv 2311.17982): mean cosine of each frame's vector with those of the first frame"
    " and of the one before",
    version=1,
    of="generates",
    figures={"background_consistency": "higher"},
    networks=("dual",),
    conditions=conditions,
    run=run,
)
