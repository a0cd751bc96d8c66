"""Whether generated videos move as much, and where to, as held-out clips do."""

import torch
from torch import Tensor

from longtake.training.evaluation.distances import LEAST
from longtake.training.evaluation.material import Generated, Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import (
    asked,
    clips,
    conditions,
    drawn,
    length,
    listed,
    numbered,
    openings,
)
from longtake.training.metrics.dynamics import direction_distance, movements, speed_distance


def run(subject: Subject, material: Material) -> Result:
    """`speed_distance` and `direction_distance` of the first frames of the videos to held-out clips."""
    suite = material.suite
    frames = length(suite, asked(suite))
    if frames < 2:
        return Result(notes=["a single frame does not move; raise frames of the suite's clips and videos"])
    real = [(unit, movements(video)) for unit, video in clips(material, frames)]
    fake = [(made.unit, _movements(made, video)) for made, video in openings(material, subject)]
    for what, side in (("held-out clips", real), ("generated videos", fake)):
        if len(side) < LEAST:
            return Result(notes=[f"{len(side)} {what} are too few for a distance; it needs {LEAST} at least"])
    rows, times, ones, units = [], [], [], []
    for number, side in enumerate((real, fake)):
        numbers = numbered([unit for unit, _ in side])
        units.append(int(numbers.max()) + 1)
        rows.append(torch.cat([each for _, each in side]))
        ones.append(torch.ones(1, len(side), dtype=torch.float64))
        times.append(drawn(units[-1], suite.resamples, suite.seed + number)[:, numbers])
    speeds = [each.sum(1) for each in rows]
    enough = min(units) > 1
    pooled = {}
    for name, distance, values in (
        ("speed_distance", speed_distance, speeds),
        ("direction_distance", direction_distance, rows),
    ):
        replicates = listed(distance(values[0], values[1], times[0], times[1])) if enough else []
        value = float(distance(values[0], values[1], ones[0], ones[1]))
        pooled[name] = Pooled(value, replicates, min(units))
    means = [100 * float(each.mean()) for each in speeds]
    note = f"moves by {means[1]:.3g} % of the shorter side a frame, held-out clips by {means[0]:.3g} %"
    return Result(pooled=pooled, notes=[note])


def _movements(made: Generated, video: Tensor) -> Tensor:
    """The `movements` of a video's first frames, a frame of the suite: of a model of a lower rate its own are farther apart."""
    own = [number for number in made.own if number < video.shape[2]]
    if len(own) < 2:
        return movements(video)
    return movements(video[:, :, own]) * (len(own) - 1) / (own[-1] - own[0])


MEASURE = Measure(
    what="generated videos beside held-out clips: Wasserstein distance of how much they move, in shares of the shorter side a"
    " frame, and total variation of the shares of 8 directions, by block matching; our own definition",
    version=2,
    of="generates",
    figures={"speed_distance": "lower", "direction_distance": "lower"},
    networks=(),
    conditions=conditions,
    run=run,
)
