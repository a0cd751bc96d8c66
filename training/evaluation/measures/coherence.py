"""Whether long videos keep the class that they begin with, in the eyes of a classifier."""

from functools import partial

import torch

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import chunks, conditions_by_chunk, curve, seconds, taken
from longtake.training.metrics.classifier import log_probabilities
from longtake.training.metrics.coherence import coherence, coherence_of


def run(subject: Subject, material: Material) -> Result:
    """`ccs` and `ics` of each video, the means over its chunks but the first, and both by the second of the chunk."""
    classifier = material.classifier()
    rows, points, told = dict[tuple[Unit, str], dict[str, float]](), list[tuple[float, Unit, float, float]](), []
    for made, parts in chunks(material, subject):
        each = [taken("classifier", part, partial(log_probabilities, classifier, part)) for part in parts]
        if len(each) < 2:
            return Result(
                notes=["videos of a single chunk have no coherence; make them longer, or the suite's chunk shorter"]
            )
        log_p = torch.cat(each)
        told.append(log_p)
        same, apart = (values[0].tolist() for values in coherence_of(log_p[None]))
        rows[made.unit, made.key] = {name: sum(of[1:]) / len(of[1:]) for name, of in (("ccs", same), ("ics", apart))}
        points += [
            (seconds(material.suite, n), made.unit, *both) for n, both in enumerate(zip(same, apart, strict=True))
        ]
    notes = [f"ccs by chance is {coherence(torch.stack(told)).chance:.3g}"] if len(told) > 1 else []
    curves = {
        f"{name}_by_second": curve((at, unit, (ccs, ics)[which]) for at, unit, ccs, ics in points)
        for which, name in enumerate(("ccs", "ics"))
    }
    return Result(rows, curves=curves, notes=notes)


MEASURE = Measure(
    what="long videos by chunks: CCS, the share of later chunks of the first one's class, and ICS, KL(p(y | chunk) || p(y |"
    " first chunk)) in nats (arXiv 2204.03638)",
    version=1,
    of="generates",
    figures={"ccs": "higher", "ics": "lower"},
    networks=("classifier",),
    conditions=conditions_by_chunk,
    run=run,
)
