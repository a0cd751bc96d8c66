"""How alike two videos look to a network: LPIPS as a loss and as a metric (Zhang et al., arXiv 1801.03924).

The network is a file that the caller names. None means no term: nothing is downloaded, nothing is implied.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.engines import device
from longtake.training.metrics.features import (
    FeatureNetwork,
    Pixels,
    feature_maps,
    load_network,
    load_state_dict,
    read_file,
    reason,
)

_SMALL = 1e-10  # inside the root, so that the gradient of a dead position is 0 and not NaN


@dataclass(frozen=True)
class Perceptual:
    """A network of images and a weight for each channel (C,) of each of its taps; None weighs them alike."""

    network: FeatureNetwork
    weights: tuple[Tensor, ...] | None = None

    def record(self) -> dict[str, Any]:
        kind = "uniform" if self.weights is None else "linear"
        return {**self.network.record(), "weights": kind}


def load_perceptual(
    path: str | None,
    linear: str | None = None,
    *,
    pixels: Pixels = "imagenet",
    digest: str | None = None,
    device: torch.device | str = "cpu",
) -> Perceptual | None:
    """The network of a perceptual loss, or None where no path is given.

    LPIPS v0.1 is a VGG16, AlexNet or SqueezeNet 1.1 with ImageNet's weights and its published `linear` weights
    (`lin0.model.1.weight` (1, C, 1, 1), ...). Without `linear` the squared differences are summed over the channels
    with weight 1 (the paper's section 3, "w = 1"), and the record says "uniform".

    Args:
        path: a state dict or TorchScript archive, see features.load_network.
        linear: a state dict with the weights of each tap.

    Raises:
        UserError: a file that is missing or does not fit; linear weights without a network; a network of videos.
    """
    if path is None:
        if linear is not None:
            raise UserError(f"{linear}: linear weights need the network that they belong to; name its path too")
        return None
    network = load_network(path, pixels=pixels, digest=digest, device=device)
    if network.images is None:
        raise UserError(f"{path}: takes whole videos; a perceptual loss needs a network of images")
    if linear is None:
        return Perceptual(network)
    weights = _linear_weights(linear, device)
    probe = feature_maps(network, torch.zeros(1, 3, 64, 64, device=device))
    if [tap.shape[1] for tap in probe] != [len(w) for w in weights]:
        raise UserError(
            f"{linear}: weights for {[len(w) for w in weights]} channels, {path} has {[t.shape[1] for t in probe]}"
        )
    return Perceptual(network, weights)


def checked_perceptual(path: str | None, linear: str | None, size: tuple[int, int]) -> Perceptual | None:
    """`load_perceptual`, on this rank's device, after it has seen frames of this size; UserError where it takes none."""
    perceptual = load_perceptual(path, linear, device=device())
    if perceptual:
        frames = torch.zeros(1, 3, 1, *size, device=device())
        try:
            lpips(perceptual, frames, frames)
        except (RuntimeError, torch.jit.Error) as e:
            raise UserError(f"perceptual: {path}: takes no frames of {size[0]}x{size[1]} ({reason(e)})") from e
    return perceptual


def lpips(perceptual: Perceptual, output: Tensor, source: Tensor) -> Tensor:
    """LPIPS of each clip, the mean over its frames; 0 for equal clips.

    d = sum over taps of the spatial mean of w . (f_made - f_source)^2, where f has unit length over the channels at
    each position (arXiv 1801.03924, eq. 1).

    Args:
        output, source: (B, 3, T, H, W) in [-1, 1].

    Returns:
        (B,) fp32.
    """
    if output.shape != source.shape or output.ndim != 5:
        raise ValueError(
            f"LPIPS needs two (B, 3, T, H, W) of one shape, got {tuple(output.shape)} and {tuple(source.shape)}"
        )
    pair = [_unit(perceptual.network, video.transpose(1, 2).flatten(0, 1)) for video in (output, source)]
    each = output.new_zeros(output.shape[0] * output.shape[2], dtype=torch.float32)
    for tap, (a, b) in enumerate(zip(*pair, strict=True)):
        square = (a - b).square()
        if perceptual.weights is not None:
            square = square * perceptual.weights[tap][:, None, None]
        each = each + square.sum(1).mean((1, 2))
    return each.view(output.shape[0], -1).mean(1)


def perceptual_loss(
    perceptual: Perceptual | None,
    output: Tensor,
    source: Tensor,
    *,
    frames: int | None = None,
    rng: torch.Generator | None = None,
) -> Tensor:
    """LPIPS averaged over clips and frames, as a loss: its gradient reaches `output` only. Without a network, 0.

    Args:
        output, source: (B, 3, T, H, W) in [-1, 1].
        frames: number of frames, drawn for each clip without repetition; None takes all.
        rng: draws them.

    Returns:
        () fp32.
    """
    if perceptual is None:
        return output.new_zeros((), dtype=torch.float32)
    if frames is not None and frames < output.shape[2]:
        output, source = _draw_frames((output, source), frames, rng)
    return lpips(perceptual, output, source.detach()).mean()


def _draw_frames(videos: Sequence[Tensor], frames: int, rng: torch.Generator | None) -> list[Tensor]:
    if frames < 1:
        raise ValueError(f"frames must be at least 1, got {frames}")
    first = videos[0]
    device = rng.device if rng is not None else first.device
    chosen = torch.rand(first.shape[0], first.shape[2], generator=rng, device=device).argsort(1)[:, :frames]
    clips = torch.arange(first.shape[0], device=first.device)[:, None]
    return [video.transpose(1, 2)[clips, chosen.to(first.device)].transpose(1, 2) for video in videos]


def _unit(network: FeatureNetwork, frames: Tensor) -> list[Tensor]:
    return [x * (x.square().sum(1, keepdim=True) + _SMALL).rsqrt() for x in feature_maps(network, frames)]


def _linear_weights(path: str, device: torch.device | str) -> tuple[Tensor, ...]:
    state = load_state_dict(read_file(path), path)
    weights: list[Tensor] = []
    for index in count():
        weight = state.get(f"lin{index}.model.1.weight")
        if weight is None:
            break
        if weight.ndim != 4 or weight.shape[0] != 1:
            raise UserError(f"{path}: lin{index}.model.1.weight must be (1, C, 1, 1), is {tuple(weight.shape)}")
        weights.append(weight.float().flatten().to(device))
    if not weights:
        raise UserError(f"{path}: no LPIPS weights, such as lin0.model.1.weight")
    return tuple(weights)
