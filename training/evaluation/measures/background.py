"""Whether frames of a video look alike to a dual encoder: consistency of backgrounds, as VBench defines it."""

from functools import partial

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.measures.consistency import alike
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import conditions, dual_encoder, pictures


def run(subject: Subject, material: Material) -> Result:
    """`background_consistency` of each video's first frames; with CLIP's ViT-B/32 it is that of VBench."""
    return alike(subject, material, "background_consistency", partial(pictures, dual_encoder(material)))


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
