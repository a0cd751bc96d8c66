"""AutoencoderKLLTXVideo of diffusers: whole clips by the class, pieces of a stream layer by layer.

The encoder is causal in time. The decoder sees the future, but each of its layers one frame of it: in a stream a layer gives
what it can, and the rest with the next piece or at the end. So both take constant memory, and give what the class gives.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from longtake.training.foreign.patches import patches_of, video_of
from longtake.training.models.common.causal import fold, starts, unfold
from longtake.training.models.common.streaming import Past


def moments(net: Any, video: Tensor, past: Past | None) -> Tensor:
    """Video `(B, 3, T, H, W)` -> mean and log-variance `(B, 2C, t, h, w)`, not normalised; pieces with a causal encoder only."""
    encoder = net.encoder
    if past is None:
        whole: Tensor = encoder(video)
        return whole
    x = patches_of(video, encoder.patch_size_t, encoder.patch_size)
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
    """Latents of a whole clip as the class's `decode` takes them `(B, C, t, h, w)` -> video `(B, 3, T, H, W)`.

    A decoder that is conditioned on a time gets 0, and latents without noise: the defaults of its pipelines. Noise that
    some versions add inside comes from torch's generator; in evaluation mode it is the same in every call.
    """
    with _same_noise(net, latent):
        video: Tensor = net.decoder(latent, _time(net, latent))
    return video


def known_frames(net: Any, latent: Tensor, past: Past, last: bool) -> Tensor:
    """`frames` of a stream: those that are known with this piece of it; with the `last` piece all that are left."""
    decoder, time = net.decoder, _time(net, latent)
    with _same_noise(net, latent):
        if time is not None:
            time = time * decoder.timestep_scale_multiplier
        x = _convolve(decoder.conv_in, latent, past, last)
        for block in (decoder.mid_block, *decoder.up_blocks):
            if getattr(block, "conv_in", None) is not None:
                x = _res(block.conv_in, x, past, last, time)
            embedded = _embedded(block.time_embedder, time, x)
            for sampler in getattr(block, "upsamplers", None) or ():
                x = _doubled(sampler, x, past, last)
            for resnet in block.resnets:
                x = _res(resnet, x, past, last, embedded)
        x = _normed(decoder.norm_out, x)
        if (embedded := _embedded(decoder.time_embedder, time, x)) is not None:
            shift, scale = _modulation(embedded, decoder.scale_shift_table)
            x = x * (1 + scale) + shift
        x = _convolve(decoder.conv_out, decoder.conv_act(x), past, last)
    return video_of(x, decoder.patch_size_t, decoder.patch_size)


def _time(net: Any, latent: Tensor) -> Tensor | None:
    return latent.new_zeros(len(latent)) if net.config.timestep_conditioning else None


@contextmanager
def _same_noise(net: Any, latent: Tensor) -> Iterator[None]:
    if net.training or not any(net.config.decoder_inject_noise):
        yield
        return
    with torch.random.fork_rng([latent.device] if latent.device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _embedded(embedder: Any, time: Tensor | None, x: Tensor) -> Tensor | None:
    if embedder is None or time is None:
        return None
    out: Tensor = embedder(timestep=time, resolution=None, aspect_ratio=None, batch_size=len(x), hidden_dtype=x.dtype)
    return out.view(len(x), -1, 1, 1, 1)


def _modulation(embedded: Tensor, table: Tensor) -> tuple[Tensor, ...]:
    """Shifts and scales `(B, C, 1, 1, 1)`, as many as the table `(n, C)` has."""
    return (embedded.unflatten(1, (len(table), -1)) + table[None, ..., None, None, None]).unbind(1)


def _convolve(conv: Any, x: Tensor, past: Past, last: bool = False) -> Tensor:
    """A convolution in time that repeats the first frame before a clip, and where it looks ahead the last one after it.

    Gives the outputs whose inputs are known, and keeps what it needs for the next ones.
    """
    size, stride = conv.kernel_size[0], conv.conv.stride[0]
    ahead = 0 if conv.is_causal else size // 2
    if x.shape[2] and conv not in past.inputs:
        x = torch.cat([x[:, :, :1]] * (size - 1 - ahead) + [x], dim=2)
    elif conv in past.inputs:
        x = torch.cat([past.inputs[conv], x], dim=2)
    if last:
        x = torch.cat([x] + [x[:, :, -1:]] * ahead, dim=2)
    count = max(0, (x.shape[2] - size) // stride + 1)
    if x.shape[2]:
        past.inputs[conv] = x[:, :, count * stride :].clone()  # a view would keep all of x
    if count:
        out: Tensor = conv.conv(x)
        return out
    height, width = (-(-side // by) for side, by in zip(x.shape[3:], conv.conv.stride[1:], strict=True))
    return x.new_zeros(len(x), conv.conv.out_channels, 0, height, width)


def _held(layer: Any, x: Tensor, past: Past, count: int) -> Tensor:
    """The first `count` of the frames that have come to a layer and were not asked for before."""
    waiting = torch.cat([past.inputs[layer], x], dim=2) if layer in past.inputs else x
    past.inputs[layer] = waiting[:, :, count:].clone()
    return waiting[:, :, :count]


def _normed(norm: Any, x: Tensor) -> Tensor:
    out: Tensor = norm(x.movedim(1, -1)).movedim(-1, 1)
    return out


def _res(block: Any, x: Tensor, past: Past, last: bool = False, embedded: Tensor | None = None) -> Tensor:
    shift_1 = scale_1 = shift_2 = scale_2 = torch.zeros((), dtype=x.dtype, device=x.device)
    if block.scale_shift_table is not None and embedded is not None:
        shift_1, scale_1, shift_2, scale_2 = _modulation(embedded, block.scale_shift_table)
    branch = block.nonlinearity(_normed(block.norm1, x) * (1 + scale_1) + shift_1)
    branch = _noisy(_convolve(block.conv1, branch, past, last), block.per_channel_scale1)
    branch = block.nonlinearity(_normed(block.norm2, branch) * (1 + scale_2) + shift_2)
    branch = _noisy(_convolve(block.conv2, block.dropout(branch), past, last), block.per_channel_scale2)
    x = _held(block, x, past, branch.shape[2])
    if block.norm3 is not None:
        x = _convolve(block.conv_shortcut, _normed(block.norm3, x), past)
    return x + branch


def _noisy(x: Tensor, scale: Tensor | None) -> Tensor:
    """The same noise for all frames. It is drawn for a piece without one too, so that the next layer draws its own."""
    if scale is None:
        return x
    noise = torch.randn(x.shape[-2:], device=x.device, dtype=x.dtype)[None]
    return x + (noise * scale)[None, :, None]


def _halved(sampler: Any, x: Tensor, past: Past) -> Tensor:
    if not hasattr(sampler, "group_size"):
        return _convolve(sampler, x, past)
    time, space, _ = sampler.stride
    if starts(past):
        x = torch.cat([x[:, :, :1]] * (time - 1) + [x], dim=2)
    shortcut = fold(x, time, space).unflatten(1, (-1, sampler.group_size)).mean(2)
    return fold(_convolve(sampler.conv, x, past), time, space) + shortcut


def _doubled(sampler: Any, x: Tensor, past: Past, last: bool) -> Tensor:
    """Each frame as several; of the first of a clip only the last one."""
    time, space, _ = sampler.stride
    out = _convolve(sampler.conv, x, past, last)
    x = _held(sampler, x, past, out.shape[2])
    out = unfold(out, time, space)
    if sampler.residual:
        copies = time * space * space // sampler.upscale_factor
        out = out + unfold(x, time, space).repeat(1, copies, 1, 1, 1)
    if out.shape[2] and sampler.conv.conv not in past.inputs:
        past.inputs[sampler.conv.conv] = out[:, :, :0].clone()  # a sign that the first has come
        out = out[:, :, time - 1 :]
    return out
