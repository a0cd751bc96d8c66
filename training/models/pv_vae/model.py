"""The predictive video VAE of PV-VAE (arXiv 2605.02134): encode a prefix, reconstruct and predict the whole clip.

A clip of 1 + 4n frames becomes 1 + n latents of 64 channels at 1/16 of the size: the first frame stands alone, then
every 4 frames are one latent group. Encoder and decoder are both causal in time: latent i depends on frames up to 4i,
frames up to 4i depend on latents up to i. In training the encoder sees only the first groups;
padding takes the place of the others, and the decoder has to predict their frames.

The paper fixes strides, latent channels and the order of the stages, and publishes no block details. The blocks here
follow the nearest public design (Wan2.2's VAE) with two differences, both assumptions: samplers are linear maps
(only stride-1 convolutions then look into the past), and the two output convolutions come without norm and
activation (with them the tiny model is 1 dB worse after 300 steps).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor, nn

from longtake.training.models.common.autoencoder import LatentPadding, VideoAutoencoder, positive
from longtake.training.models.common.causal import (
    CausalConv3d,
    Chain,
    Downsample,
    ResBlock,
    SpatialAttention,
    Upsample,
    fold,
    unfold,
)
from longtake.training.models.common.codec import Posterior
from longtake.training.models.common.recompute import Share, chosen
from longtake.training.models.common.streaming import Past, regroup, stream, tiled

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "pv_vae":       dict(patch=2, encoder_width=160, decoder_width=256, multipliers=(1, 2, 4, 4), encoder_blocks=2, decoder_blocks=3),
    "pv_vae_small": dict(patch=2, encoder_width=64,  decoder_width=96,  multipliers=(1, 2, 4, 4), encoder_blocks=2, decoder_blocks=3),
    "pv_vae_tiny":  dict(patch=4, encoder_width=24,  decoder_width=32,  multipliers=(1, 2, 4),    encoder_blocks=0, decoder_blocks=0),
}
# fmt: on


class PVVAEConfig(BaseModel):
    """The numbers of one PV-VAE. "Assumption" marks what the paper does not say.

    patch             pixels a side gathered into channels before the first convolution [nearest public design: 2]
    encoder_width     channels of the finest encoder stage [nearest public design: 160]
    decoder_width     channels of the finest decoder stage [nearest public design: 256]
    multipliers       width of each stage, finest first, in units of the above; a halving between any two
    encoder_blocks    res blocks per encoder stage [nearest public design: 2]
    decoder_blocks    res blocks per decoder stage [assumption: 3, which brings `pv_vae` to the paper's 661M]
    latent_channels   channels of the latent [paper: 64]
    temporal_downs    how many of the halvings, finest first, also halve time [paper: 2]
    attention         spatial attention between the two res blocks in the middle [nearest public design: yes]
    padding           replaces unseen latents: a learned `token` [paper; assumption: one (1, C, 1, 1, 1) parameter,
                      from zero] or `noise` from N(0, 1) [paper]
    activation_checkpointing   share of the res blocks that the backward pass recomputes, true is all: less memory, more time
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    patch: PositiveInt
    encoder_width: PositiveInt
    decoder_width: PositiveInt
    multipliers: tuple[PositiveInt, ...]
    encoder_blocks: NonNegativeInt
    decoder_blocks: NonNegativeInt
    latent_channels: PositiveInt = 64
    temporal_downs: NonNegativeInt = 2
    attention: bool = True
    padding: Literal["token", "noise"] = "token"
    activation_checkpointing: Share = False

    @model_validator(mode="after")
    def _stages_fit(self) -> PVVAEConfig:
        if self.temporal_downs >= len(self.multipliers):
            raise ValueError(f"temporal_downs is {self.temporal_downs}; {self.multipliers} has fewer halvings")
        for i, (fine, coarse) in enumerate(zip(self.multipliers, self.multipliers[1:], strict=False)):
            if fine * 4 * self.time_factor(i) % coarse:
                raise ValueError(
                    f"multipliers {fine} -> {coarse}: {coarse} must divide {fine * 4 * self.time_factor(i)}"
                )
        return self

    def time_factor(self, halving: int) -> int:
        """The factor, 2 or 1, by which halving number `halving`, finest first, also shortens time."""
        return 2 if halving < self.temporal_downs else 1

    @property
    def spatial_stride(self) -> int:
        """Pixels along one side of a latent position (16 in the paper)."""
        return self.patch * 2 ** (len(self.multipliers) - 1)

    @property
    def temporal_stride(self) -> int:
        """Frames of one latent group after the first (4 in the paper)."""
        return 2**self.temporal_downs

    @property
    def first_frames(self) -> int:
        """Frames of the first latent group."""
        return 1


def config_from_preset(preset: str, **overrides: Any) -> PVVAEConfig:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return PVVAEConfig(**PRESETS[preset] | overrides)


def _blocks(count: int, width: int, config: PVVAEConfig) -> list[nn.Module]:
    return [ResBlock(width) for _ in range(count)]


def _middle(width: int, config: PVVAEConfig) -> Chain:
    attention = [SpatialAttention(width)] if config.attention else []
    return Chain(*_blocks(1, width, config), *attention, *_blocks(1, width, config))


def _encoder(config: PVVAEConfig) -> Chain:
    """Patches `(B, 3*patch^2, T, H/patch, W/patch)` -> mean and logvar `(B, 2*latent_channels, t, h, w)`."""
    widths = [config.encoder_width * m for m in config.multipliers]
    stages = _blocks(config.encoder_blocks, widths[0], config)
    for i in range(len(widths) - 1):
        stages.append(Downsample(widths[i], widths[i + 1], config.time_factor(i)))
        stages += _blocks(config.encoder_blocks, widths[i + 1], config)
    layers: dict[str, nn.Module] = {
        "conv_in": CausalConv3d(3 * config.patch**2, widths[0]),
        "stages": Chain(*stages),
        "middle": _middle(widths[-1], config),
        "conv_out": CausalConv3d(widths[-1], 2 * config.latent_channels),
    }
    return Chain(OrderedDict(layers))


def _decoder(config: PVVAEConfig) -> Chain:
    """Latent `(B, latent_channels, t, h, w)` -> patches `(B, 3*patch^2, T, H/patch, W/patch)`."""
    widths = [config.decoder_width * m for m in config.multipliers]
    stages = _blocks(config.decoder_blocks, widths[-1], config)
    for i in reversed(range(len(widths) - 1)):
        stages.append(Upsample(widths[i + 1], widths[i], config.time_factor(i)))
        stages += _blocks(config.decoder_blocks, widths[i], config)
    layers: dict[str, nn.Module] = {
        "conv_in": CausalConv3d(config.latent_channels, widths[-1]),
        "middle": _middle(widths[-1], config),
        "stages": Chain(*stages),
        "conv_out": CausalConv3d(widths[0], 3 * config.patch**2, gain=0.3),
    }
    return Chain(OrderedDict(layers))


class PVVAE(VideoAutoencoder):
    """Video `(B, 3, T, H, W)` in [-1, 1], T = 1 + 4n, H and W multiples of 16 <-> latent `(B, 64, 1 + n, H/16, W/16)`.

    Inputs are cast to the dtype of the weights; outputs have it.
    """

    what, kind = "PV-VAE", "pv_vae"

    def __init__(self, config: PVVAEConfig) -> None:
        super().__init__()
        self.config = config
        self.encoder = _encoder(config)
        self.decoder = _decoder(config)
        self.padding = LatentPadding(config.latent_channels, config.padding)
        blocks = [module for module in self.modules() if isinstance(module, ResBlock)]
        for number, block in enumerate(blocks):
            block.checkpointing = chosen(config.activation_checkpointing, number, len(blocks))

    @property
    def dtype(self) -> torch.dtype:
        return next(self.encoder.parameters()).dtype

    def encode(self, video: Tensor, tile: int | None = None, overlap: int = 64) -> Posterior:
        """The posterior of a clip or of any prefix of 1 + 4n frames. ValueError for other shapes.

        `tile` encodes large frames in squares of `tile` pixels a side that share at least `overlap`, both multiples of
        16. That bounds memory; latents are the same away from the squares' borders and blended where they overlap.
        """
        self._check(video)
        return _posterior(tiled(lambda x, _: self._moments(x), video, *self._tiling(tile, overlap), self._down))

    def decode(self, latent: Tensor, tile: int | None = None, overlap: int = 64) -> Tensor:
        """The video of a latent, not clamped to [-1, 1]; `tile` and `overlap` in pixels as in `encode`."""
        return tiled(lambda x, _: self._frames(x), latent, *self._tiling(tile, overlap), self._down[::-1])

    def encode_stream(
        self, chunks: Iterable[Tensor], chunk: int = 4, tile: int | None = None, overlap: int = 64
    ) -> Iterator[Posterior]:
        """`encode` of a video of any length in constant memory, equal to encoding it at once.

        The chunks are `(B, 3, any, H, W)` in [-1, 1] and make 1 + 4n frames. The first posterior has one latent, the
        next ones `chunk`, the last the rest; each comes as soon as its frames have been read. No gradients.
        `vae.decode_stream(p.mode() for p in vae.encode_stream(chunks))` is a reconstruction. ValueError for frames of a
        wrong size and, after all whole groups, for a tail of fewer than 4 frames.
        """
        pieces = self._whole_groups(chunks, chunk)
        for moments in stream(self._moments, pieces, *self._tiling(tile, overlap), self._down):
            yield _posterior(moments)

    def decode_stream(
        self, latents: Iterable[Tensor], chunk: int = 4, tile: int | None = None, overlap: int = 64
    ) -> Iterator[Tensor]:
        """`decode` of latents `(B, 64, any, h, w)` of any length in constant memory, equal to decoding them at once.

        The first chunk is one frame, the next ones 4 times `chunk`, the last the rest. No gradients.
        """
        pieces = regroup(latents, 1, positive("chunk", chunk))
        yield from stream(self._frames, pieces, *self._tiling(tile, overlap), self._down[::-1])

    def freeze_encoder(self) -> None:
        self.encoder.requires_grad_(False)

    def blocks(self) -> Iterator[nn.Module]:
        """Res blocks and attentions, each once: the modules worth compiling in place with `nn.Module.compile`."""
        return (module for module in self.modules() if isinstance(module, ResBlock | SpatialAttention))

    def _moments(self, video: Tensor, past: Past | None = None) -> Tensor:
        return self.encoder(fold(video.to(self.dtype), 1, self.config.patch), past)

    def _frames(self, latent: Tensor, past: Past | None = None) -> Tensor:
        return unfold(self.decoder(latent.to(self.dtype), past), 1, self.config.patch)


def _posterior(moments: Tensor) -> Posterior:
    mean, logvar = moments.chunk(2, dim=1)
    return Posterior(mean, logvar.clamp(-30.0, 20.0))
