"""Dimensions of VBench that need no weights, by our own code."""

from longtake.training.evaluation.material import Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import asked, conditions, length, openings
from longtake.training.metrics.dynamics import REACH, flickering, is_dynamic, least_movement


def run(subject: Subject, material: Material) -> Result:
    """`temporal_flickering` and `dynamic_degree` of each video's first frames."""
    suite = material.suite
    if length(suite, asked(suite)) < 2:
        return Result(notes=["a single frame does not move; raise frames of the suite's clips and videos"])
    assert suite.clips.fps
    fps, notes, rows = suite.clips.fps, list[str](), dict[tuple[Unit, str], dict[str, float]]()
    if (least := least_movement(suite.clips.size, fps)) >= REACH:
        notes.append(
            f"dynamic_degree is left out: at {fps:g} frames a second a movement has {least:.3g} pixels or more, and block"
            f" matching sees {REACH}; raise suite.clips.fps"
        )
    for made, video in openings(material, subject):
        row = {} if notes else {"dynamic_degree": is_dynamic(video, fps).item()}
        rows[made.unit, made.key] = {"temporal_flickering": flickering(video).item(), **row}
    return Result(rows, notes=notes)


MEASURE = Measure(
    what="dimensions of VBench (arXiv 2311.17982): temporal_flickering, over all videos, and dynamic_degree, by block matching in"
    " place of RAFT",
    version=2,
    of="generates",
    figures={"temporal_flickering": "higher", "dynamic_degree": "higher"},
    networks=(),
    conditions=conditions,
    run=run,
)
