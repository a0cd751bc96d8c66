"""Tiny video autoencoders of diffusers as codecs, and clips for them."""

from __future__ import annotations

from typing import Any

import tiny_foreign
import torch
from torch import Tensor

from longtake.training.foreign.codec import CodecConfig, ForeignCodec

KL = {
    "block_out_channels": [8, 8],
    "down_block_types": ["DownEncoderBlock2D"] * 2,
    "up_block_types": ["UpDecoderBlock2D"] * 2,
    "norm_num_groups": 4,
    "scaling_factor": 0.36,
    "shift_factor": 0.12,
}
LTX_095 = {  # the layout of versions from 0.9.5 on: 32 x 32 x 8 by samplers that move pixels to channels
    "block_out_channels": [8, 16, 16, 16, 16],
    "down_block_types": ["LTXVideo095DownBlock3D"] * 4,
    "layers_per_block": [1, 1, 1, 1, 1],
    "spatio_temporal_scaling": [True, True, True, True],
    "downsample_type": ["spatial", "temporal", "spatiotemporal", "spatiotemporal"],
    "decoder_block_out_channels": [8, 16, 32],
    "decoder_layers_per_block": [1, 1, 1, 1],
    "decoder_spatio_temporal_scaling": [True, True, True],
    "decoder_inject_noise": [False, True, False, False],
    "upsample_residual": [True, True, True],
    "upsample_factor": [2, 2, 2],
    "timestep_conditioning": True,
    "spatial_compression_ratio": 32,
    "temporal_compression_ratio": 8,
}
# name -> autoencoder of diffusers, frames of a clip that is longer than its windows, and its side
CODECS: dict[str, tuple[Any, int, int]] = {
    "wan21": (tiny_foreign.tiny_wan_vae, 13, 32),
    "wan22": (tiny_foreign.tiny_wan22_vae, 13, 32),
    "ltx": (tiny_foreign.tiny_ltx_vae, 25, 64),
    "ltx095": (lambda seed=0: tiny_foreign.tiny_ltx_vae(seed, **LTX_095), 25, 64),
    "hunyuan": (tiny_foreign.tiny_hunyuan_vae, 33, 32),
    "kl": (lambda seed=0: tiny_foreign._vae("AutoencoderKL", KL, seed), 5, 16),
}


def adopted(net: Any, **fields: Any) -> ForeignCodec:
    """A codec with the weights of a model of diffusers, in evaluation mode."""
    settings = {name: value for name, value in net.config.items() if not name.startswith("_")}
    codec = ForeignCodec(CodecConfig(class_name=type(net).__name__, settings=settings, **fields))
    codec.net.load_state_dict(net.state_dict())
    return codec.eval()


def codec(name: str, seed: int = 0, **fields: Any) -> ForeignCodec:
    return adopted(CODECS[name][0](seed), **fields)


def clip(name: str, frames: int | None = None, seed: int = 1, count: int = 1) -> Tensor:
    """Random video `(count, 3, T, H, W)` in [-1, 1], smooth enough to differ from place to place."""
    _, length, side = CODECS[name]
    rng = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, frames or length, side // 4, side // 4, generator=rng) * 2 - 1
    return torch.nn.functional.interpolate(coarse, (coarse.shape[2], side, side), mode="trilinear")
