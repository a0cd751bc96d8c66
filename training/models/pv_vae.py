"""The predictive video VAE of PV-VAE (arXiv 2605.02134): encode a prefix, reconstruct and predict the whole clip.

A clip of 1 + 4n frames becomes 1 + n latent steps of 64 channels at 1/16 of the size: the first frame stands alone,
then every 4 frames are one step. Encoder and decoder are causal in time: latent step i depends on no frame after
4i, frame 4i on no latent step after i. In training the encoder sees only the first latent groups; the steps it did
not see are filled with padding, and the decoder has to predict their frames.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from longtake.training.models.layers import (
    CausalConv3d,
    ChannelRMSNorm,
    Downsample,
    ResBlock,
    SpatialAttention,
    Upsample,
    fold,
    unfold,
)

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "pv_vae":       dict(patch=2, encoder_width=160, decoder_width=256, multipliers=(1, 2, 4, 4), encoder_blocks=2, decoder_blocks=2),
    "pv_vae_small": dict(patch=2, encoder_width=64,  decoder_width=96,  multipliers=(1, 2, 4, 4), encoder_blocks=2, decoder_blocks=2),
    "pv_vae_tiny":  dict(patch=4, encoder_width=24,  decoder_width=32,  multipliers=(1, 2, 4),    encoder_blocks=1, decoder_blocks=1),
}
# fmt: on


class PVVAEConfig(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)

    patch: int
    encoder_width: int
    decoder_width: int
    multipliers: tuple[int, ...]
    encoder_blocks: int
    decoder_blocks: int
    latent_channels: int = 64
    temporal_downs: int = 2
    attention: bool = True
    padding: Literal["token", "noise"] = "token"
    activation_checkpointing: bool = False

    @property
    def spatial_stride(self) -> int:
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2**self.temporal_downs


def config_from_preset(preset: str, **overrides: Any) -> PVVAEConfig:
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of {', '.join(PRESETS)}")
    return PVVAEConfig(**PRESETS[preset] | overrides)


def latent_groups(frames: int, temporal_stride: int = 4) -> int:
    return 1 + (frames - 1) // temporal_stride


def frames_of(groups: int, temporal_stride: int = 4) -> int:
    return 1 + (groups - 1) * temporal_stride


@dataclass(frozen=True)
class Posterior:
    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        noise = torch.randn(self.mean.shape, generator=generator, device=self.mean.device)
        return (self.mean.float() + torch.exp(0.5 * self.logvar.float()) * noise).to(self.mean.dtype)

    def kl(self) -> Tensor:
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


class LatentPadding(nn.Module):
    def __init__(self, channels: int, kind: str) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.zeros(1, channels, 1, 1, 1)) if kind == "token" else None

    def forward(self, latent: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
        batch, channels, _, height, width = latent.shape
        shape = (batch, channels, steps, height, width)
        if self.token is None:
            tail = torch.randn(shape, generator=generator, device=latent.device).to(latent.dtype)
        else:
            tail = self.token.to(latent.dtype).expand(shape)
        return torch.cat([latent, tail], dim=2)


def _middle(width: int, config: PVVAEConfig) -> nn.Sequential:
    blocks: list[nn.Module] = [ResBlock(width, config.activation_checkpointing) for _ in range(2)]
    if config.attention:
        blocks.insert(1, SpatialAttention(width))
    return nn.Sequential(*blocks)


def _head(width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(ChannelRMSNorm(width), nn.SiLU(), CausalConv3d(width, channels))


def _encoder(config: PVVAEConfig) -> nn.Sequential:
    widths = [config.encoder_width * m for m in config.multipliers]
    stages: list[nn.Module] = []
    for i, width in enumerate(widths):
        stages += [ResBlock(width, config.activation_checkpointing) for _ in range(config.encoder_blocks)]
        if i + 1 < len(widths):
            stages.append(Downsample(width, widths[i + 1], time=2 if i < config.temporal_downs else 1))
    return nn.Sequential(
        OrderedDict(
            conv_in=CausalConv3d(3 * config.patch**2, widths[0]),
            stages=nn.Sequential(*stages),
            middle=_middle(widths[-1], config),
            head=_head(widths[-1], 2 * config.latent_channels),
        )
    )


def _decoder(config: PVVAEConfig) -> nn.Sequential:
    widths = [config.decoder_width * m for m in config.multipliers]
    stages: list[nn.Module] = []
    for i, width in reversed(list(enumerate(widths))):
        stages += [ResBlock(width, config.activation_checkpointing) for _ in range(config.decoder_blocks)]
        if i > 0:
            stages.append(Upsample(width, widths[i - 1], time=2 if i <= config.temporal_downs else 1))
    return nn.Sequential(
        OrderedDict(
            conv_in=CausalConv3d(config.latent_channels, widths[-1]),
            middle=_middle(widths[-1], config),
            stages=nn.Sequential(*stages),
            head=_head(widths[0], 3 * config.patch**2),
        )
    )


class PVVAE(nn.Module):
    def __init__(self, config: PVVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.padding = LatentPadding(config.latent_channels, config.padding)

    def encode(self, video: Tensor) -> Posterior:
        patches = fold(video.to(self.dtype), 1, self.config.patch)
        mean, logvar = self.encoder(patches).chunk(2, dim=1)
        return Posterior(mean, logvar.clamp(-30, 20))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def pad(self, latent: Tensor, steps: int, generator: torch.Generator | None = None) -> Tensor:
        return self.padding(latent, steps, generator)

    def decode(self, latent: Tensor) -> Tensor:
        return unfold(self.decoder(latent.to(self.dtype)), 1, self.config.patch)

    def forward(self, video, visible=None, generator=None):
        groups = latent_groups(video.shape[2])
        visible = groups if visible is None else visible
        posterior = self.encode(video[:, :, : frames_of(visible)])
        latent = self.pad(posterior.sample(generator), groups - visible, generator)
        return self.decode(latent), posterior

    @torch.no_grad()
    def reconstruct(self, video: Tensor, visible_frames: int | None = None) -> Tensor:
        groups = latent_groups(video.shape[2])
        visible = groups if visible_frames is None else latent_groups(visible_frames)
        latent = self.encode(video[:, :, : frames_of(visible)]).mode()
        return self.decode(self.pad(latent, groups - visible)).float().clamp(-1, 1)
