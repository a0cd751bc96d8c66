"""How clear and how varied generated videos are, in the eyes of a classifier."""

from functools import partial

import torch

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import conditions, drawn, listed, numbered, openings, taken
from longtake.training.metrics.classifier import log_probabilities
from longtake.training.metrics.coherence import inception_score, score_replicates


def run(subject: Subject, material: Material) -> Result:
    """`inception_score` of the first frames of the videos, all in one part."""
    classifier, suite = material.classifier(), material.suite
    found, units = [], []
    for made, video in openings(material, subject):
        found.append(taken("classifier", video, partial(log_probabilities, classifier, video)).cpu())
        units.append(made.unit)
    if len(found) < 2:
        return Result(notes=[f"{len(found)} videos are too few for an inception score; it needs 2 at least"])
    log_p, count = torch.cat(found), len(set(units))
    times = drawn(count, suite.resamples, suite.seed)[:, numbered(units)]
    replicates = listed(score_replicates(log_p, times)) if count > 1 else []
    return Result(pooled={"inception_score": Pooled(inception_score(log_p, 1, suite.seed).mean, replicates, count)})


MEASURE = Measure(
    what="generated videos: inception score (arXiv 1606.03498, §4), exp of the mean KL(p(y | video) || p(y)), in one part",
    version=1,
    of="generates",
    figures={"inception_score": "higher"},
    networks=("classifier",),
    conditions=conditions,
    run=run,
)
