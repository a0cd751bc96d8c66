"""A 3D PatchGAN discriminator with hinge losses: one logit for each overlapping patch of a video or an image.

The layout is that of the 2D PatchGAN (arXiv 1611.07004) with convolutions over time, as TATS uses it beside its VQGAN
(arXiv 2204.03638): `layers` strided convolutions, one that keeps the size, one that computes the logits.

Normalisation is by groups of channels within a sample. Batch statistics would differ between ranks, mean little with
one clip a rank, and mix real and fake, which share one call. Spectral normalisation changes a buffer at every call and
needs whole weight matrices, which ZeRO-3 splits.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveInt, model_validator
from torch import Tensor, nn

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "patchgan":       dict(width=64, layers=3, groups=32),
    "patchgan_small": dict(width=32, layers=3, groups=16),
    "patchgan_tiny":  dict(width=16, layers=2, groups=8),
}
# fmt: on


class PatchGANConfig(BaseModel):
    """The numbers of one discriminator.

    width      channels after the first layer [TATS: 64]; doubled by each further one up to 8 times
    layers     strided layers, each halving height, width and (rounding up) time [TATS: 3]
    groups     groups of channels, each normalised together, in every layer but the first [assumption: 32]
    channels   of the video
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    width: PositiveInt
    layers: PositiveInt
    groups: PositiveInt
    channels: PositiveInt = 3

    @model_validator(mode="after")
    def _groups_divide(self) -> PatchGANConfig:
        if 2 * self.width % self.groups:
            raise ValueError(f"groups is {self.groups}; it must divide twice the width, {2 * self.width}")
        return self

    def widths(self) -> list[int]:
        """Channels after each layer but that of the logits."""
        return [self.width * min(2**i, 8) for i in range(self.layers + 1)]


def config_from_preset(preset: str, **overrides: Any) -> PatchGANConfig:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return PatchGANConfig(**PRESETS[preset] | overrides)


class PatchConv(nn.Conv3d):
    """3 x 4 x 4 convolution; `stride` 2 halves H and W and, rounding up, T; `stride` 1 keeps them.

    In time the first and the last frame are repeated, so that an image is treated as a still clip; in space the border
    is zero.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(in_channels, out_channels, (3, 4, 4), stride)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x[:, :, :1], x, x[:, :, -1:]], dim=2)
        after = 1 if self.stride[1] == 2 else 2
        return super().forward(F.pad(x, (1, after, 1, after)))


class PatchGAN(nn.Module):
    """Video `(B, 3, T, H, W)` in [-1, 1] -> logits `(B, 1, t, H / 2^layers, W / 2^layers)`, high for real; any T >= 1.

    A sample's logits do not depend on the other samples. The input is cast to the dtype of the weights.
    """

    def __init__(self, config: PatchGANConfig) -> None:
        super().__init__()
        self.config = config
        widths = config.widths()
        steps: list[nn.Module] = [PatchConv(config.channels, widths[0], stride=2), nn.LeakyReLU(0.2)]
        for i in range(1, config.layers + 1):
            steps.append(PatchConv(widths[i - 1], widths[i], stride=2 if i < config.layers else 1))
            steps += [nn.GroupNorm(config.groups, widths[i]), nn.LeakyReLU(0.2)]
        steps.append(PatchConv(widths[-1], 1, stride=1))
        self.steps = nn.Sequential(*steps)

    def forward(self, video: Tensor) -> Tensor:
        """ValueError for frames smaller than one patch."""
        return self.features(video)[-1]

    def features(self, video: Tensor) -> list[Tensor]:
        """What each layer makes of a video, at last the logits. ValueError as `forward`."""
        least = 2**self.config.layers
        if min(video.shape[3:]) < least:
            height, width = video.shape[3:]
            raise ValueError(f"video is {height}x{width}; this discriminator needs at least {least}x{least}")
        x, layers = video.to(next(self.parameters()).dtype), list[Tensor]()
        for step in self.steps:
            x = step(x)
            if isinstance(step, nn.LeakyReLU):
                layers.append(x)
        return [*layers, x]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """Hinge loss of the discriminator from its logits, fp32: half of mean relu(1 - real) + mean relu(1 + fake).

    Real and fake are judged in one call, `discriminator(cat([real, fake])).chunk(2)`: its engine then sees one
    forward for each backward.
    """
    return 0.5 * (F.relu(1 - real.float()).mean() + F.relu(1 + fake.float()).mean())


def generator_loss(fake: Tensor) -> Tensor:
    """Hinge loss of the generator from the discriminator's logits of its output, fp32: -mean."""
    return -fake.float().mean()
