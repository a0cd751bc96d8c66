"""How well gaps in held-out clips are filled: close to the truth, without a joint that shows, another one for each seed."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.evaluation.material import Clip, Material
from longtake.training.evaluation.means import Curve, Figure, Means
from longtake.training.evaluation.measures import Measure
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite
from longtake.training.metrics import transitions
from longtake.training.metrics.reconstruction import psnr_by_frame

_WHERE = ("seam_at", "seam_inside", "bend_at", "bend_inside")  # of `transitions.joints`
_STILL = 1e-6  # change of pixels in 0..1, below which nothing moves


class Case(NamedTuple):
    """A gap in a held-out clip, and what a model has made in it; all in [-1, 1].

    video  the clip (1, 3, T, H, W)
    begin  the first frame of the gap
    made   (S, 3, n, H, W), one for each draw
    own    numbers of the clip's frames at the model's rate (see `Filled`)
    """

    clip: Clip
    video: Tensor
    begin: int
    made: Tensor
    own: Sequence[int]

    @property
    def truth(self) -> Tensor:
        """The frames of the gap (1, 3, n, H, W)."""
        return self.video[:, :, self.begin : self.begin + self.made.shape[2]]

    @property
    def filled(self) -> Tensor:
        """The clip with the first draw in its gap."""
        stop = self.begin + self.made.shape[2]
        return torch.cat([self.video[:, :, : self.begin], self.made[:1], self.video[:, :, stop:]], dim=2)


def cases(subject: Subject, material: Material) -> Iterator[Case]:
    """The gaps that a model has filled; those of one clip follow each other, one for each draw."""
    for _, draws in groupby(material.filled(subject), lambda filled: filled.clip.key):
        first, *others = draws
        made = torch.cat([to_model(each.made) for each in (first, *others)])
        yield Case(first.clip, to_model(first.clip.video), first.begin, made, first.own)


def conditions(suite: Suite) -> Mapping[str, Any]:
    """What the figures of gaps depend on."""
    return {"gaps": suite.gaps.model_dump(mode="json")}


def run(subject: Subject, material: Material) -> Result:
    """Figures of the frames that are made, without those given, all but `gap_diversity` of the first draw.

    PSNR follows as a curve, by seconds from the gap's begin. A ratio is that of the mean change at both joints to that of all
    other frames (see `metrics.transitions.with_ratios`); there is none where nothing moves.
    """
    rows, curve, made, true = dict[tuple[Unit, str], dict[str, float]](), Curve(), Means(), Means()
    for case in cases(subject, material):
        unit, first = case.clip.unit, case.made[:1]
        middle = {f"gap_{name}": value for name, value in transitions.middle(first, case.truth).items()}
        row = middle | {"gap_joint_error": transitions.joint_error(first, case.truth)}
        if len(case.made) > 1:
            row["gap_diversity"] = float(transitions.diversity(case.made).mean())
        rows[unit, case.clip.key] = row
        by_frame = psnr_by_frame(first, case.truth)[0].tolist()
        curve.add(unit, {number / case.clip.fps: value for number, value in enumerate(by_frame)})
        for means, video in ((made, case.filled), (true, case.video)):
            means.add(unit, _joints(video, case))
    ratios = {name: _ratio(place) for name, place in _PLACES.items() if made.mean()[0, place + 1] > _STILL}
    notes = [f"{name} of the true frames: {ratio(true.mean())[0]:.3g}" for name, ratio in ratios.items()]
    return Result(rows, made.pooled(material.suite, ratios), {"gap_psnr": curve.by_unit()}, notes)


def _ratio(place: int) -> Figure:
    """The figure of means (N, 4), as `_joints` has them: the change at joints, divided by that elsewhere."""
    return lambda rows: rows[:, place] / np.maximum(rows[:, place + 1], _STILL)


_PLACES = {"gap_seam_ratio": 0, "gap_bend_ratio": 2}


def _joints(video: Tensor, case: Case) -> list[float]:
    """See `transitions.joints`; of frames at the model's rate, and NaN where there are no such frames."""
    begin, end = (bisect_left(case.own, at) for at in (case.begin, case.begin + case.made.shape[2]))
    found = transitions.joints(video[:, :, list(case.own)], begin, end - begin)
    return [np.nan if (value := found[name]) is None else value for name in _WHERE]


MEASURE = Measure(
    what="gaps in held-out clips, filled: PSNR and SSIM of the frames that are made, their error beside the joints, how much"
    " more than elsewhere changes at the joints, and how unlike two draws are",
    version=2,
    of="fills",
    figures={
        "gap_psnr": "higher",
        "gap_ssim": "higher",
        "gap_joint_error": "lower",
        "gap_seam_ratio": "lower",
        "gap_bend_ratio": "lower",
        "gap_diversity": "higher",
    },
    networks=(),
    conditions=conditions,
    run=run,
)
