"""What sets the video autoencoders of diffusers apart, a row for each class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtake.training.foreign import codec_ltx, codec_wan
from longtake.training.foreign.ways import Ahead, AtOnce, Causal, Way, Windows
from longtake.training.models.common.streaming import Past

Settings = Mapping[str, Any]


class Statistics(NamedTuple):
    """Latents z of the class are (z - mean) * scale / std for the transformer of its pipeline; `(C,)` each, or numbers."""

    mean: Tensor | float
    std: Tensor | float
    scale: float


class Row(NamedTuple):
    """How a class is used.

    strides      frames in a latent after the first, pixels of a position, and channels of a latent, from its config.json
    statistics   of its latents, of the module
    ways         (encode, decode) of the module
    """

    strides: Callable[[Settings], tuple[int, int, int]]
    statistics: Callable[[Any], Statistics]
    ways: Callable[[Any], tuple[Way, Way]]


def _wan_strides(settings: Settings) -> tuple[int, int, int]:
    halvings = len(settings.get("dim_mult", (1, 2, 4, 4))) - 1
    times = settings.get("temperal_downsample", (False, True, True))[:halvings]
    return 2 ** sum(times), 2**halvings * (settings.get("patch_size") or 1), settings.get("z_dim", 16)


def _wan_statistics(net: Any) -> Statistics:
    return Statistics(torch.tensor(net.config.latents_mean), torch.tensor(net.config.latents_std), 1.0)


def _wan_ways(net: Any) -> tuple[Way, Way]:
    return Causal(partial(codec_wan.moments, net)), Causal(partial(codec_wan.frames, net))


def _ltx_strides(settings: Settings) -> tuple[int, int, int]:
    halvings = sum(settings.get("spatio_temporal_scaling", (True, True, True, False)))
    time = settings.get("temporal_compression_ratio") or settings.get("patch_size_t", 1) * 2**halvings
    space = settings.get("spatial_compression_ratio") or settings.get("patch_size", 4) * 2**halvings
    return time, space, settings.get("latent_channels", 128)


def _ltx_statistics(net: Any) -> Statistics:
    return Statistics(net.latents_mean, net.latents_std, net.config.scaling_factor)


def _ltx_ways(net: Any) -> tuple[Way, Way]:
    encode = partial(codec_ltx.moments, net)
    decode = Ahead(partial(codec_ltx.frames, net), partial(codec_ltx.known_frames, net))
    return (Causal if net.config.encoder_causal else AtOnce)(encode), decode


def _hunyuan_strides(settings: Settings) -> tuple[int, int, int]:
    ratios = settings.get("temporal_compression_ratio", 4), settings.get("spatial_compression_ratio", 8)
    return *ratios, settings.get("latent_channels", 16)


def _hunyuan_ways(net: Any) -> tuple[Way, Way]:
    """In the windows that the class takes for clips longer than one; a shorter clip is one window in any case."""
    time, size, step = net.temporal_compression_ratio, net.tile_sample_min_num_frames, net.tile_sample_stride_num_frames
    latents, kept = size // time, step // time

    def moments(video: Tensor, past: Past | None) -> Tensor:
        out: Tensor = net.quant_conv(net.encoder(video))
        return out

    def frames(latent: Tensor, past: Past | None) -> Tensor:
        out: Tensor = net.decoder(net.post_quant_conv(latent))
        return out

    return Windows(moments, size + 1, step, kept, latents - kept), Windows(frames, latents + 1, kept, step, size - step)


def _scaled(net: Any) -> Statistics:
    return Statistics(0.0, 1.0, net.config.scaling_factor)


def _image_strides(settings: Settings) -> tuple[int, int, int]:
    return 1, 2 ** (len(settings.get("block_out_channels", (64,))) - 1), settings.get("latent_channels", 4)


def _image_statistics(net: Any) -> Statistics:
    config = net.config
    if config.latents_mean is not None and config.latents_std is not None:
        return Statistics(torch.tensor(config.latents_mean), torch.tensor(config.latents_std), config.scaling_factor)
    return Statistics(config.shift_factor or 0.0, 1.0, config.scaling_factor)


def _image_ways(net: Any) -> tuple[Way, Way]:

    def moments(video: Tensor, past: Past | None) -> Tensor:
        h = net.encoder(video.transpose(1, 2).flatten(0, 1))
        return _as_video(h if net.quant_conv is None else net.quant_conv(h), len(video))

    def frames(latent: Tensor, past: Past | None) -> Tensor:
        z = latent.transpose(1, 2).flatten(0, 1)
        return _as_video(net.decoder(z if net.post_quant_conv is None else net.post_quant_conv(z)), len(latent))

    return Causal(moments), Causal(frames)


def _as_video(images: Tensor, batch: int) -> Tensor:
    return images.unflatten(0, (batch, -1)).transpose(1, 2)


ROWS = {
    "AutoencoderKLWan": Row(_wan_strides, _wan_statistics, _wan_ways),
    "AutoencoderKLLTXVideo": Row(_ltx_strides, _ltx_statistics, _ltx_ways),
    "AutoencoderKLHunyuanVideo": Row(_hunyuan_strides, _scaled, _hunyuan_ways),
    "AutoencoderKL": Row(_image_strides, _image_statistics, _image_ways),
}

# res blocks, and attentions that are no part of one: a network is mostly made of them
BLOCKS = {
    "WanResidualBlock",
    "WanAttentionBlock",
    "LTXVideoResnetBlock3d",
    "HunyuanVideoResnetBlockCausal3D",
    "ResnetBlock2D",
}


def is_block(module: nn.Module) -> bool:
    """Whether a module is a res block or an attention."""
    return type(module).__name__ in BLOCKS
