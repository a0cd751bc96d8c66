"""AutoencoderKLWan of diffusers (Wan 2.1 and 2.2) layer by layer, for a whole clip or a piece of a stream.

Its own `encode` and `decode` keep the past of one clip in the module, cut the clip into pieces of 4 frames, and have no
activation checkpointing. Here a whole clip is one pass over the class's own layers, to learn from; a stream keeps its past
in a `Past`, so that several may alternate. Both give what the class gives, but for roundings and for its clamp to [-1, 1].
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.foreign.patches import patches_of, video_of
from longtake.training.models.common.causal import starts
from longtake.training.models.common.recompute import called_as_marked
from longtake.training.models.common.streaming import Past

_LOOKS_BACK = 2  # frames that a convolution of 3 in time keeps


def moments(net: Any, video: Tensor, past: Past | None) -> Tensor:
    """Video `(B, 3, T, H, W)` -> mean and log-variance `(B, 2C, t, h, w)`, not normalised.

    Args:
        past: of a stream; None for a whole clip, whose res blocks are recomputed as they are marked.
    """
    encoder = net.encoder
    x = _convolve(encoder.conv_in, patches_of(video, 1, net.config.patch_size or 1), past)
    for layer in encoder.down_blocks:
        x = _down(layer, x, past)
    x = _middle(encoder.mid_block, x, past)
    x = encoder.nonlinearity(encoder.norm_out(x))
    x = _convolve(encoder.conv_out, x, past)
    out: Tensor = net.quant_conv(x)
    return out


def frames(net: Any, latent: Tensor, past: Past | None) -> Tensor:
    """Latents as the class's `decode` takes them `(B, C, t, h, w)` -> video `(B, 3, T, H, W)`, not clamped."""
    decoder = net.decoder
    x = _convolve(decoder.conv_in, net.post_quant_conv(latent), past)
    x = _middle(decoder.mid_block, x, past)
    for block in decoder.up_blocks:
        x = _up(block, x, past)
    x = decoder.nonlinearity(decoder.norm_out(x))
    x = _convolve(decoder.conv_out, x, past)
    return video_of(x, 1, net.config.patch_size or 1)


def _convolve(conv: nn.Module, x: Tensor, past: Past | None) -> Tensor:
    """A causal convolution of 3 frames, which pads the start of a clip with zeros."""
    if past is None:
        whole: Tensor = conv(x)
        return whole
    before = past.inputs.get(conv)
    seen = x[:, :, -_LOOKS_BACK:]
    if before is not None and seen.shape[2] < _LOOKS_BACK:
        seen = torch.cat([before[:, :, -1:], seen], dim=2)
    past.inputs[conv] = seen.clone()  # a view would keep all of x
    out: Tensor = conv(x, before)
    return out


def _res(block: Any, x: Tensor, past: Past | None) -> Tensor:
    if past is None:
        out: Tensor = called_as_marked(block, x) if torch.is_grad_enabled() else block(x)
        return out
    # one name for all: none of them is kept longer than it is needed
    branch = block.nonlinearity(block.norm1(x))
    branch = _convolve(block.conv1, branch, past)
    branch = block.nonlinearity(block.norm2(branch))
    branch = _convolve(block.conv2, block.dropout(branch), past)
    added: Tensor = branch + block.conv_shortcut(x)
    return added


def _middle(block: Any, x: Tensor, past: Past | None) -> Tensor:
    x = _res(block.resnets[0], x, past)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        x = _res(resnet, attention(x), past)
    return x


def _down(layer: Any, x: Tensor, past: Past | None) -> Tensor:
    """A res block, an attention, a sampler, or with Wan 2.2 a stage of blocks and a sampler beside a shortcut."""
    if hasattr(layer, "avg_shortcut"):
        inside = [*layer.resnets, *([] if layer.downsampler is None else [layer.downsampler])]
        shortcut = layer.avg_shortcut(x)  # a first frame alone gets the zeros that a whole clip gets
        for part in inside:
            x = _down(part, x, past)
        return x + shortcut
    if hasattr(layer, "conv1"):
        return _res(layer, x, past)
    if hasattr(layer, "resample"):
        return _halved(layer, x, past)
    out: Tensor = layer(x)
    return out


def _up(block: Any, x: Tensor, past: Past | None) -> Tensor:
    first = starts(past)
    start = x
    for resnet in block.resnets:
        x = _res(resnet, x, past)
    # Wan 2.1 has a list of at most one sampler, Wan 2.2 a sampler and a shortcut
    sampler = block.upsamplers[0] if getattr(block, "upsamplers", None) else getattr(block, "upsampler", None)
    if sampler is not None:
        x = _doubled(sampler, x, past)
    shortcut = getattr(block, "avg_shortcut", None)
    return x if shortcut is None else x + shortcut(start, first_chunk=first)


def _by_frame(layer: nn.Module, x: Tensor) -> Tensor:
    """A layer of images on every frame."""
    out: Tensor = layer(x.transpose(1, 2).flatten(0, 1))
    return out.unflatten(0, (x.shape[0], -1)).transpose(1, 2)


def _halved(sampler: Any, x: Tensor, past: Past | None) -> Tensor:
    """Half of the height and width; where it has a `time_conv`, the first frame alone and half of the others."""
    x = _by_frame(sampler.resample, x)
    if not hasattr(sampler, "time_conv"):
        return x
    if past is not None and past.begun:
        halved: Tensor = sampler.time_conv(torch.cat([past.inputs[sampler.time_conv], x], dim=2))
    else:
        halved = x if x.shape[2] == 1 else torch.cat([x[:, :, :1], sampler.time_conv(x)], dim=2)
    if past is not None:
        past.inputs[sampler.time_conv] = x[:, :, -1:].clone()
    return halved


def _doubled(sampler: Any, x: Tensor, past: Past | None) -> Tensor:
    """Twice the height and width; where it has a `time_conv`, one frame of the first and two of each other."""
    if hasattr(sampler, "time_conv"):
        # the convolution begins with the second frame: the first is no part of its past
        if not starts(past):
            x = _pairs(sampler.time_conv, x, past)
        elif x.shape[2] > 1:
            x = torch.cat([x[:, :, :1], _pairs(sampler.time_conv, x[:, :, 1:], past)], dim=2)
    return _by_frame(sampler.resample, x)


def _pairs(conv: nn.Module, x: Tensor, past: Past | None) -> Tensor:
    """Two frames of each: a convolution to twice the channels."""
    return _convolve(conv, x, past).unflatten(1, (2, -1)).permute(0, 2, 3, 1, 4, 5).flatten(2, 3)
