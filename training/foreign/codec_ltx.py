"""AutoencoderKLLTXVideo of diffusers: its encoder layer by layer for a stream; its decoder, which sees the future, at once."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from longtake.training.models.common.causal import fold, starts
from longtake.training.models.common.streaming import Past


def moments(net: Any, video: Tensor, past: Past | None) -> Tensor:
    """Video `(B, 3, T, H, W)` -> mean and log-variance `(B, 2C, t, h, w)`, not normalised.

    A whole clip goes through the class's own encoder, a piece of a stream through its layers.
    """
    encoder = net.encoder
    if past is None:
        whole: Tensor = encoder(video)
        return whole
    patch, time = encoder.patch_size, encoder.patch_size_t
    x = fold(video, time, patch).unflatten(1, (-1, patch, patch)).transpose(2, 3).flatten(1, 3)
    x = _convolve(encoder.conv_in, x, past)
    for block in encoder.down_blocks:
        for resnet in block.resnets:
            x = _res(resnet, x, past)
        for sampler in block.downsamplers or ():
            x = _halved(sampler, x, past)
        last = getattr(block, "conv_out", None)
        x = x if last is None else _res(last, x, past)
    for resnet in encoder.mid_block.resnets:
        x = _res(resnet, x, past)
    x = _convolve(encoder.conv_out, encoder.conv_act(_normed(encoder.norm_out, x)), past)
    # one log-variance for all channels
    return torch.cat([x, x[:, -1:].expand(-1, x.shape[1] - 2, -1, -1, -1)], dim=1)


def frames(net: Any, latent: Tensor, past: Past | None) -> Tensor:
    """Latents as the class's `decode` takes them `(B, C, t, h, w)` -> video `(B, 3, T, H, W)`.

    A decoder that is conditioned on a time gets 0, and latents without noise: the defaults of its pipelines. Noise that
    some versions add inside comes from torch's generator; in evaluation mode it is the same in every call.
    """
    time = latent.new_zeros(len(latent)) if net.config.timestep_conditioning else None
    if net.training or not any(net.config.decoder_inject_noise):
        free: Tensor = net.decoder(latent, time)
        return free
    with torch.random.fork_rng([latent.device] if latent.device.type == "cuda" else []):
        torch.manual_seed(0)
        fixed: Tensor = net.decoder(latent, time)
    return fixed


def _convolve(conv: Any, x: Tensor, past: Past) -> Tensor:
    """A convolution in time that pads the start of a clip with its first frame; with a stride it keeps less of the past."""
    size, stride = conv.kernel_size[0], conv.conv.stride[0]
    if size > 1:
        before = x[:, :, :1].expand(-1, -1, size - 1, -1, -1) if starts(past) else past.inputs[conv]
        x = torch.cat([before, x], dim=2)
        past.inputs[conv] = x[:, :, x.shape[2] - (size - stride) :].clone()  # a view would keep all of x
    out: Tensor = conv.conv(x)
    return out


def _normed(norm: Any, x: Tensor) -> Tensor:
    out: Tensor = norm(x.movedim(1, -1)).movedim(-1, 1)
    return out


def _res(block: Any, x: Tensor, past: Past) -> Tensor:
    branch = _convolve(block.conv1, block.nonlinearity(_normed(block.norm1, x)), past)
    branch = _convolve(block.conv2, block.dropout(block.nonlinearity(_normed(block.norm2, branch))), past)
    if block.norm3 is not None:
        x = _convolve(block.conv_shortcut, _normed(block.norm3, x), past)
    return x + branch


def _halved(sampler: Any, x: Tensor, past: Past) -> Tensor:
    if not hasattr(sampler, "group_size"):
        return _convolve(sampler, x, past)
    time, space, _ = sampler.stride
    if starts(past):
        x = torch.cat([x[:, :, :1]] * (time - 1) + [x], dim=2)
    shortcut = fold(x, time, space).unflatten(1, (-1, sampler.group_size)).mean(2)
    return fold(_convolve(sampler.conv, x, past), time, space) + shortcut
