"""How unlike videos of one prompt look to a network."""

from functools import partial

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.measures.diversity import conditions
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.unlike import WITHOUT, unlike
from longtake.training.metrics.perceptual import lpips


def run(subject: Subject, material: Material) -> Result:
    """`diversity_lpips` of the first frames of the videos; of a model that takes no prompts `diversity_lpips_without_prompts`."""
    return unlike(subject, material, "diversity_lpips", partial(lpips, material.perceptual()))


MEASURE = Measure(
    what="generated videos of one prompt, or of any class without prompts: the mean LPIPS of two of them (arXiv 1801.03924; as"
    " diversity, 1711.11586, §4)",
    version=2,
    of="generates",
    figures={"diversity_lpips": "higher", f"diversity_lpips{WITHOUT}": "higher"},
    networks=("perceptual",),
    conditions=conditions,
    run=run,
)
