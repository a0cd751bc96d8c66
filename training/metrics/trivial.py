"""Baselines that take no training, which a model that has learned anything must beat.

For a video autoencoder: a repeated frame, a mean, and a clip scaled down to the size of its latents. For a flow: the
velocity that knows only the data's mean, or its mean and variance.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.models.common.codec import latent_groups


class Against(NamedTuple):
    """A figure of a model beside that of a trivial prediction, by their names in a summary."""

    what: str  # the thing measured, in words
    figure: str
    trivial: str  # in words
    baseline: str
    unit: str = "dB"
    higher: bool = True  # is better


FLOW = (
    Against("held-out loss", "heldout_loss", "predicting the mean velocity", "heldout_loss_mean", "", False),
    Against("held-out loss", "heldout_loss", "a Gaussian for each number", "heldout_loss_gaussian", "", False),
)


def comparisons(table: Sequence[Against], summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The comparisons for which the summary has both figures, for JSON: what, figure, trivial, baseline, unit, and whether it `beats`."""
    rows = []
    for what, figure, trivial, baseline, unit, higher in table:
        ours, theirs = summary.get(figure), summary.get(baseline)
        if ours is None or theirs is None:
            continue
        beats = ours > theirs if higher else ours < theirs
        rows.append(
            {"what": what, "figure": ours, "trivial": trivial, "baseline": theirs, "unit": unit, "beats": beats}
        )
    return rows


def mean_colour(video: Tensor) -> Tensor:
    """Each clip (B, 3, T, H, W) as its mean colour alone."""
    return video.mean((2, 3, 4), keepdim=True).expand_as(video)


def scaled_down(video: Tensor, vae: Any) -> Tensor:
    """A clip (B, 3, T, H, W) scaled down, in height and width alike, to about as many numbers as its latent has, and up again."""
    _, channels, frames, height, width = video.shape
    groups = latent_groups(frames, vae.temporal_stride, vae.first_frames)
    positions = groups * (height // vae.spatial_stride) * (width // vae.spatial_stride)
    scale = math.sqrt(vae.latent_channels * positions / (channels * frames * height * width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    pictures = video.transpose(1, 2).flatten(0, 1)
    small = F.interpolate(pictures, size, mode="bilinear", antialias=True, align_corners=False)
    large = F.interpolate(small, (height, width), mode="bicubic", align_corners=False).clamp(-1, 1)
    return large.unflatten(0, (-1, frames)).transpose(1, 2)


class Still(NamedTuple):
    """A velocity that knows only the mean of the data, (C,): E[ε - x0]."""

    mean: Tensor

    def __call__(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
        return -_channels(self.mean, x).expand_as(x)


class Gaussian(NamedTuple):
    """A velocity that knows mean and standard deviation of each channel, (C,): E[ε - x0 | x_t] of numbers drawn one by one."""

    mean: Tensor
    std: Tensor

    def __call__(self, x: Tensor, t: Tensor, *_: Any) -> Tensor:
        mean, variance = _channels(self.mean, x), _channels(self.std, x).square()
        times = (t[:, None] if t.ndim == 1 else t)[:, None, :, None, None]
        spread = (1 - times).square() * variance + times.square()
        pull = (times - (1 - times) * variance) / spread.clamp_min(1e-12)
        return pull * (x - (1 - times) * mean) - mean


def unit(channels: int, like: Tensor) -> tuple[Still, Gaussian]:
    """Both baselines for normalised data, on the device of `like`."""
    mean, std = like.new_zeros(channels, dtype=torch.float32), like.new_ones(channels, dtype=torch.float32)
    return Still(mean), Gaussian(mean, std)


def _channels(values: Tensor, x: Tensor) -> Tensor:
    return values.to(x)[:, None, None, None]
