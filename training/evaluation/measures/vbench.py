"""Dimensions of VBench that need no weights, by our own code."""

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import asked, conditions, length, openings
from longtake.training.metrics.dynamics import flickering, is_dynamic


def run(subject: Subject, material: Material) -> Result:
    """`temporal_flickering` and `dynamic_degree` of each video's first frames."""
    suite = material.suite
    if length(suite, asked(suite)) < 2:
        return Result(notes=["a single frame does not move; raise frames of the suite's clips and videos"])
    assert suite.clips.fps
    rows = {
        (made.unit, made.key): {
            "temporal_flickering": flickering(video).item(),
            "dynamic_degree": is_dynamic(video, suite.clips.fps).item(),
        }
        for made, video in openings(material, subject)
    }
    return Result(rows)


MEASURE = Measure(
    what="dimensions of VBench (arXiv 2311.17982): temporal_flickering, over all videos, and dynamic_degree, by block matching in"
    " place of RAFT",
    version=1,
    of="generates",
    figures={"temporal_flickering": "higher", "dynamic_degree": "higher"},
    networks=(),
    conditions=conditions,
    run=run,
)
