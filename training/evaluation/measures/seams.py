"""How visible the joints are at which windows, segments or clips of long videos meet."""

from bisect import bisect_left
from collections.abc import Iterator

import torch
from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.evaluation.material import Generated, Material
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Pooled, Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.windows import asked, conditions_by_chunk, drawn, listed, numbered
from longtake.training.metrics.seams import apart, bends, changes, ratio


def run(subject: Subject, material: Material) -> Result:
    """`seam_ratio` and `bend_ratio` of all videos with joints: the mean at joints, divided by that elsewhere."""
    suite, units = material.suite, list[Unit]()
    found: dict[str, list[tuple[float, float]]] = {"seam_ratio": [], "bend_ratio": []}
    for made in material.generated(subject, asked(suite)):
        changed, bent = _curves(made)
        joints = [bisect_left(made.own, joint) for joint in made.joints]
        pairs = {"seam_ratio": apart(changed, joints, 1, 1), "bend_ratio": apart(bent, joints, 2, 2)}
        # without a joint, or with nothing but joints, there is nothing to compare
        if joints and all(None not in pair for pair in pairs.values()):
            units.append(made.unit)
            for name, (at, within) in pairs.items():
                assert at is not None and within is not None
                found[name].append((at, within))
    if not units:
        return Result(notes=["no video has joints with frames between them"])
    count = len(set(units))
    times = drawn(count, suite.resamples, suite.seed)[:, numbered(units)]
    pooled = {}
    for name, pairs_of in found.items():
        at, within = torch.tensor(pairs_of, dtype=torch.float64).T
        value = ratio(float(at.mean()), float(within.mean()))
        if value is not None:
            pooled[name] = Pooled(value, listed((times @ at) / (times @ within)) if count > 1 else [], count)
    return Result(pooled=pooled, notes=[] if len(pooled) == 2 else ["nothing moves between the joints"])


def _curves(made: Generated) -> tuple[Tensor, Tensor]:
    """The `changes` and `bends` of a video of any length, (1, T - 1) and (1, T - 2) of T of its own frames."""
    parts = list(_overlapping(made))
    return torch.cat([each for each, _ in parts], 1), torch.cat([each for _, each in parts], 1)


def _overlapping(made: Generated) -> Iterator[tuple[Tensor, Tensor]]:
    last: Tensor | None = None
    own, first = set(made.own), 0
    for piece in made.frames():
        places = [number for number in range(piece.shape[2]) if first + number in own]
        first += piece.shape[2]
        if not places:
            continue
        video = to_model(piece[:, :, places])
        long = video if last is None else torch.cat([last, video], 2)
        begin = 0 if last is None else last.shape[2] - 1
        yield changes(long)[:, begin:].cpu(), bends(long).cpu()
        last = long[:, :, -2:]


MEASURE = Measure(
    what="joints of long videos: mean |x_t - x_t-1|, and |x_t - 2 x_t-1 + x_t-2|, at joints divided by that elsewhere; 1 cannot"
    " be told from the rest",
    version=2,
    of="generates",
    figures={"seam_ratio": "lower", "bend_ratio": "lower"},
    networks=(),
    conditions=conditions_by_chunk,
    run=run,
)
