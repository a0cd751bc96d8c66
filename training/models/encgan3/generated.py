"""Videos that an EncGAN3 generates when it is measured: their joints, and how they change bin by bin."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import to_pixels
from longtake.training.metrics.classifier import Classifier, log_probabilities
from longtake.training.metrics.coherence import inception_score
from longtake.training.metrics.degradation import heldout_degradation
from longtake.training.metrics.distance import Sample
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual, lpips
from longtake.training.metrics.seams import (
    around,
    bends,
    between,
    changes,
    heldout_seam_distances,
    out_of_range,
    seams,
)
from longtake.training.metrics.share import mine, united
from longtake.training.models.common.video import video_file
from longtake.training.models.encgan3.rollout import Rollout

_SHOWN = 6


class Judges(NamedTuple):
    """Networks that measure generated videos; each may be missing.

    network     distances to the real windows, `(1, 3, n, H, W)` in [-1, 1], this rank's share; n is what a clip adds
    classifier  inception score of first clips, over `splits` parts of the videos
    perceptual  LPIPS to the first frame
    """

    network: FeatureNetwork | None = None
    real: Iterable[Tensor] = ()
    classifier: Classifier | None = None
    splits: int = 1
    perceptual: Perceptual | None = None


class VideoPlan(NamedTuple):
    """Videos to generate.

    rollout  of seeds
    videos   how many, from `seed` on
    frames   of each
    bin      frames of a bin
    batch    how many a rank generates at once; they are in memory as a whole
    """

    rollout: Callable[[Sequence[int]], Rollout]
    videos: int
    frames: int
    bin: int
    seed: int
    fps: float
    batch: int
    judges: Judges

    @property
    def window(self) -> int:
        """Frames of what networks see: what a clip adds to a video, so that a window may lie inside of one."""
        config = self.rollout([self.seed]).model.config
        return min(config.frames - config.overlap, self.bin)


class _Samples(NamedTuple):
    """This rank's windows: with a joint in their middle, without any, and bin by bin."""

    at: Sample
    inside: Sample
    bins: list[Sample]

    @staticmethod
    def of(network: FeatureNetwork, bins: int) -> _Samples:
        named = [Sample(name, network) for name in ("joints", "inside", *(f"bin {n}" for n in range(bins)))]
        return _Samples(named[0], named[1], named[2:])

    def add(self, video: Tensor, joints: Sequence[int], plan: VideoPlan) -> None:
        """Videos `(B, 3, T, H, W)`."""
        length = plan.window
        parts = [(self.at, around(video, joints, length)), (self.inside, between(video, joints, length))]
        for number, sample in enumerate(self.bins):
            start = number * plan.bin
            starts = range(start, start + plan.bin - length + 1, length)
            parts.append((sample, torch.cat([video[:, :, first : first + length] for first in starts])))
        for sample, windows in parts:
            for window in windows.split(plan.batch):
                sample.add(window)


@torch.no_grad()
def generated(plan: VideoPlan, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Generate videos, each rank its share, some as NAME.mp4 in `folder`; their entries, and figures with their `series`.

    Always: `seam_ratio`, `bend_ratio` and `change` (see `metrics.seams`), `out_of_range`, and `level_drift`, by how much the
    mean brightness of the last bin differs from that of the first, in 0..1; the curve `change_by_frame`, with its joints in
    `marks`. A network adds `frechet_seam`, `frechet_inner`, `frechet_gap` and the curve `frechet_by_bin` with
    `frechet_rise`, the same of `kernel`, and `distance`; perceptual the curve `lpips_by_bin`, of the last frame of each bin
    to the first of the video; a classifier the `inception_score`. Every rank must call it.

    Raises:
        UserError: too few videos for a distance.
    """
    judges, count = plan.judges, plan.frames // plan.bin
    joints = plan.rollout([plan.seed]).joints(plan.frames)
    samples = _Samples.of(judges.network, count) if judges.network else None
    rows, shown = dict[int, dict[str, Any]](), dict[int, dict[str, Any]]()
    for block in mine(math.ceil(plan.videos / plan.batch), "generate", "batch"):
        numbers = range(block * plan.batch, min(plan.videos, (block + 1) * plan.batch))
        rollout = plan.rollout([plan.seed + number for number in numbers])
        raw = torch.cat(list(rollout.pieces(plan.frames)), dim=1).transpose(1, 2).float()
        video = raw.clamp(-1, 1)
        if samples:
            samples.add(video, joints, plan)
        for row, number in enumerate(numbers):
            rows[number] = _row(plan, raw[row : row + 1], video[row : row + 1])
            if number < _SHOWN:
                name = f"seed-{plan.seed + number}.mp4"
                write(folder / name, video[row], plan.fps)
                shown[number] = {"file": name, "seed": plan.seed + number, "frames": plan.frames}
    found = list(united(rows).values())

    # figures over all ranks
    changed, bent, levels = (torch.tensor([row[name] for row in found]) for name in ("changes", "bends", "levels"))
    figures: dict[str, Any] = seams(changed, bent, joints)._asdict()
    figures = {"seam_ratio": figures.pop("ratio"), **figures, "videos": len(found), "frames": plan.frames}
    figures["out_of_range"] = float(np.mean([row["out_of_range"] for row in found]))
    figures["level_drift"] = float((levels[:, -1] - levels[:, 0]).abs().mean())
    curve = list(enumerate(changed.mean(0).tolist(), 1))
    figures |= {"distance": None, "series": {"change_by_frame": curve}, "marks": {"change_by_frame": joints}}
    for more in (_distances(plan, samples), _classified(plan, found), _perceived(plan, found)):
        figures["series"] |= more.pop("series", {})
        figures |= more
    return list(united(shown).values()), figures


def write(path: Path, video: Tensor, fps: float) -> None:
    """A video `(3, T, H, W)` in [-1, 1] as mp4."""
    with video_file(path, fps) as frames:
        frames(to_pixels(video.permute(1, 2, 3, 0)).cpu().numpy())


def _row(plan: VideoPlan, raw: Tensor, video: Tensor) -> dict[str, Any]:
    """The figures of one video, `(1, 3, T, H, W)`, as it has come and within [-1, 1]."""
    bins = [video[:, :, n * plan.bin : (n + 1) * plan.bin] for n in range(plan.frames // plan.bin)]
    row: dict[str, Any] = {
        "changes": changes(video)[0].tolist(),
        "bends": bends(video)[0].tolist(),
        "levels": [float(part.mean()) / 2 for part in bins],
        "out_of_range": out_of_range(raw),
    }
    if plan.judges.perceptual:
        first = video[:, :, :1]
        row["lpips"] = [float(lpips(plan.judges.perceptual, part[:, :, -1:], first)) for part in bins]
    if plan.judges.classifier:
        clip = video[:, :, : plan.rollout([0]).model.config.frames]
        row["log_p"] = log_probabilities(plan.judges.classifier, clip)[0].cpu()
    return row


def _distances(plan: VideoPlan, samples: _Samples | None) -> dict[str, Any]:
    """Distances of windows to the real ones, over all ranks."""
    if samples is None or plan.judges.network is None:
        return {}
    truth = Sample("real", plan.judges.network)
    for video in plan.judges.real:
        truth.add(video)
    real, at, inside = (each.of_all_ranks() for each in (truth, samples.at, samples.inside))
    figures = heldout_seam_distances(real, at, inside, plan.seed)
    found = heldout_degradation(real, [each.of_all_ranks() for each in samples.bins], plan.seed)
    series = {f"{name}_by_bin": _by_bin(plan, found[name]) for name in ("frechet", "kernel")}
    return figures | {f"{name}_rise": found[f"{name}_rise"] for name in ("frechet", "kernel")} | {"series": series}


def _classified(plan: VideoPlan, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    judges = plan.judges
    if judges.classifier is None:
        return {}
    score = inception_score(torch.stack([row["log_p"] for row in rows]), judges.splits, plan.seed)
    conditions = {"splits": judges.splits, "seed": plan.seed, "videos": len(rows)}
    figures = {"inception_score": score.mean, "inception_score_std": score.std}
    return figures | {"classified": judges.classifier.record() | conditions}


def _perceived(plan: VideoPlan, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    if plan.judges.perceptual is None:
        return {}
    curve = np.mean([row["lpips"] for row in rows], 0).tolist()
    described = {"lpips_last": curve[-1], "perceptual": plan.judges.perceptual.record()}
    return described | {"series": {"lpips_by_bin": _by_bin(plan, curve)}}


def _by_bin(plan: VideoPlan, curve: Sequence[float]) -> list[tuple[int, float]]:
    """A curve over the first frames of its bins."""
    return [(n * plan.bin, value) for n, value in enumerate(curve)]
