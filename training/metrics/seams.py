"""How visible the joints are at which clips of a long video meet, beside what happens inside of the clips.

A joint is the number of the first frame of a new clip. A ratio is 1 where joints cannot be told from the rest. A still
video has no joints that show, so ratios are read beside `change`, what a video moves at all, and `out_of_range`.
All of it is our own definition [assumption]: the paper (arXiv 2512.21776) only suggests to measure where clips meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.metrics.distance import Sample, distance

_LEAST = 1e-6  # of change: below, it is that of rounding


class Seams(NamedTuple):
    """What is seen at the joints of videos, and inside of their clips; pixels are in 0..1.

    ratio         mean |x_t - x_t-1| at joints, divided by that inside; None without joints, or where nothing moves inside
    bend_ratio    the same of |x_t - 2 x_t-1 + x_t-2|, where a movement turns: a clip that begins with the last frame of the
                  one before has no jump, and yet may go on in another direction
    change        mean |x_t - x_t-1| over all frames
    """

    ratio: float | None
    bend_ratio: float | None
    change: float


def changes(video: Tensor) -> Tensor:
    """Mean |x_t - x_t-1| of frames 1, 2, ...: `(B, 3, T, H, W)` in [-1, 1] -> `(B, T - 1)`, in 0..1."""
    return video.float().diff(dim=2).abs().mean((1, 3, 4)) / 2


def bends(video: Tensor) -> Tensor:
    """Mean |x_t - 2 x_t-1 + x_t-2| of frames 2, 3, ...: `(B, 3, T, H, W)` in [-1, 1] -> `(B, T - 2)`, in 0..2."""
    return video.float().diff(n=2, dim=2).abs().mean((1, 3, 4)) / 2


def out_of_range(video: Tensor) -> float:
    """The share of values outside of [-1, 1], by more than a rounding."""
    return float((video.float().abs() > 1 + 1e-3).float().mean())


def seams(changed: Tensor, bent: Tensor, joints: Sequence[int]) -> Seams:
    """The ratios of videos, from their `changes` (B, T - 1) and `bends` (B, T - 2). Bends that reach over a joint are its own.

    Raises:
        ValueError: no frame follows another; a joint that is beyond the video, or its first frame.
    """
    if not changed.numel():
        raise ValueError("there are no two frames, so nothing changes")
    _check(joints, changed.shape[-1] + 1)
    return Seams(_ratio(changed, joints, 1, 1), _ratio(bent, joints, 2, 2), float(changed.mean()))


def _ratio(curve: Tensor, joints: Sequence[int], first: int, reach: int) -> float | None:
    at, within = apart(curve, joints, first, reach)
    return None if at is None else ratio(at, within)


def ratio(at: float, within: float | None) -> float | None:
    """What is at joints, divided by what is within clips; None where nothing moves there."""
    return at / within if within is not None and within > _LEAST else None


def apart(curve: Tensor, joints: Sequence[int], first: int, reach: int) -> tuple[float | None, float | None]:
    """The means of a curve at joints, and of frames whose own `reach` crosses none; None for no such frames.

    Args:
        curve: of frames from `first` on: `changes`, first and reach 1, or `bends`, both 2.
    """
    inside = torch.ones(curve.shape[-1], dtype=torch.bool)
    at = torch.zeros_like(inside)
    for joint in joints:
        place = joint - first
        if place >= 0:
            at[place] = True
        inside[max(0, place) : place + reach] = False
    means = [float(curve[..., where].double().mean()) if where.any() else None for where in (at, inside)]
    return means[0], means[1]


def around(video: Tensor, joints: Sequence[int], length: int) -> Tensor:
    """Windows with a joint in their middle: `(B, 3, T, H, W)` -> `(N, 3, length, H, W)`, without those beyond an end."""
    return _windows(video, starts_around(joints, video.shape[2], length), length)


def between(video: Tensor, joints: Sequence[int], length: int) -> Tensor:
    """Windows that reach over no joint, one from the middle of each clip that is long enough, as `around`."""
    return _windows(video, starts_between(joints, video.shape[2], length), length)


def starts_around(joints: Sequence[int], frames: int, length: int) -> list[int]:
    """The first frames of the windows of `around`, in a video of so many frames."""
    _check(joints, frames)
    starts = [joint - length // 2 for joint in joints]
    return [start for start in starts if 0 <= start <= frames - length]


def starts_between(joints: Sequence[int], frames: int, length: int) -> list[int]:
    """The first frames of the windows of `between`, in a video of so many frames."""
    _check(joints, frames)
    ends = [*sorted(joints), frames]
    spans = zip([0, *ends], ends, strict=False)
    return [(begin + end - length) // 2 for begin, end in spans if end - begin >= length]


def seam_distances(real: Sample, at: Sample, inside: Sample, *, split: str, seed: int) -> dict[str, Any]:
    """Fréchet and kernel distances to real windows, of windows with joints in their middle and of those without any.

    With StyleGAN-V's I3D they are seam and inner FVD and KVD.

    Returns:
        For JSON: `frechet_seam` and `frechet_inner`, `frechet_gap`, by how much the first is above the second, the same of
        `kernel`, and `distance`, that of the windows with joints as `distance.distance` gives it, with network and counts.

    Raises:
        ValueError: fewer than two windows of a kind; windows of unequal shape.
    """
    found = [distance(real, each, split=split, seed=seed) for each in (at, inside)]
    result: dict[str, Any] = {"distance": found[0]}
    for name in ("frechet", "kernel"):
        seam, inner = (each[name] for each in found)
        result |= {f"{name}_seam": seam, f"{name}_inner": inner}
        result[f"{name}_gap"] = None if seam is None else seam - inner
    return result


def heldout_seam_distances(real: Sample, at: Sample, inside: Sample, seed: int) -> dict[str, Any]:
    """`seam_distances` beside held-out videos; UserError where that raises ValueError."""
    try:
        return seam_distances(real, at, inside, split="val", seed=seed)
    except ValueError as e:
        raise UserError(f"features: {e}") from e


def _windows(video: Tensor, starts: Sequence[int], length: int) -> Tensor:
    if not starts:
        return video.new_empty(0, video.shape[1], length, *video.shape[3:])
    return torch.cat([video[:, :, start : start + length] for start in starts])


def _check(joints: Sequence[int], frames: int) -> None:
    if wrong := [joint for joint in joints if not 1 <= joint < frames]:
        raise ValueError(f"joint {wrong[0]}: a video of {frames} frames has joints from 1 to {frames - 1}")
