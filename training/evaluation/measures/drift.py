"""How far long videos go from how they begin, in a network's eyes."""

import torch
import torch.nn.functional as F

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import chunks, conditions_by_chunk, curve, embedded, seconds


def run(subject: Subject, material: Material) -> Result:
    """`drift` of each video, of its last chunk, and the drift by the second of the chunk."""
    network = material.features()
    rows, points = dict[tuple[Unit, str], dict[str, float]](), list[tuple[float, Unit, float]]()
    for made, parts in chunks(material, subject):
        means = torch.stack([embedded(network, part).double().mean(0) for part in parts])
        if len(means) < 2:
            return Result(
                notes=["videos of a single chunk have no drift; make them longer, or the suite's chunk shorter"]
            )
        drift = (1 - F.cosine_similarity(means, means[:1])).tolist()
        rows[made.unit, made.key] = {"drift": drift[-1]}
        points += [(seconds(material.suite, number), made.unit, value) for number, value in enumerate(drift)]
    return Result(rows, curves={"drift_by_second": curve(points)})


MEASURE = Measure(
    what="long videos by chunks: 1 - cosine of the mean features of the last chunk and of the first; our own definition",
    version=1,
    of="generates",
    figures={"drift": "lower"},
    networks=("features",),
    conditions=conditions_by_chunk,
    run=run,
)
