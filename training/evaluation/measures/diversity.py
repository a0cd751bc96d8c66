"""How unlike videos of one prompt are, pixel by pixel."""

from collections.abc import Mapping
from typing import Any

from longtake.training.evaluation import windows
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite
from longtake.training.evaluation.unlike import FRAMES, MOST, WITHOUT, unlike
from longtake.training.metrics.diversity import pixels


def conditions(suite: Suite) -> Mapping[str, Any]:
    """What figures depend on beside the clips: also how many videos and frames are compared."""
    return {**windows.conditions(suite), "of_a_prompt": MOST, "looked_at": FRAMES}


def run(subject: Subject, material: Material) -> Result:
    """`diversity` of the first frames of the videos; of a model that takes no prompts `diversity_without_prompts`."""
    return unlike(subject, material, "diversity", pixels)


MEASURE = Measure(
    what="generated videos of one prompt, or of any class without prompts: the mean root of the squared difference of two of"
    " them, in 0..1; our own definition",
    version=2,
    of="generates",
    figures={"diversity": "higher", f"diversity{WITHOUT}": "higher"},
    networks=(),
    conditions=conditions,
    run=run,
)
