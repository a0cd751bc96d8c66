"""Layers shared by the video models: causal in time, free in space.

Every tensor is `(B, C, T, H, W)`. Output frame t of any layer depends only on input frames up to t. The first frame
stands alone, so that an image is a clip of one frame. The past enters through `causal_pad` alone: `past` is None for a
whole clip, and the memory of a stream otherwise (`streaming.Past`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.training.models.common.compiling import uncompiled
from longtake.training.models.common.recompute import called
from longtake.training.models.common.streaming import Past

NEIGHBOUR_GAIN = 0.3  # initial weights of a kernel's neighbour taps, relative to torch's default


def starts(past: Past | None) -> bool:
    """Whether a layer's input begins with the first frame of a clip."""
    return past is None or not past.begun


def causal_pad(layer: nn.Module, x: Tensor, count: int, past: Past | None = None) -> Tensor:
    """Put `count` copies of the first frame in front: `(B, C, T, H, W)` -> `(B, C, count + T, H, W)`.

    In a stream, chunks after the first get the last `count` input frames of `layer` instead. Only here does a layer
    look into the past. Repeating the first frame is an assumption (the PV-VAE paper only says "causal"); a still video
    then looks the same at every frame, the first included.
    """
    if not count:
        return x
    if past is None:
        # not `expand`, which would lose the memory format of channels last
        return torch.cat([*[x[:, :, :1]] * count, x], dim=2)
    return _pad_from_past(layer, x, count, past)


@uncompiled  # compiled blocks stay one graph for whole clips; a stream leaves the graph here
def _pad_from_past(layer: nn.Module, x: Tensor, count: int, past: Past) -> Tensor:
    before = past.inputs[layer] if past.begun else x[:, :, :1].expand(-1, -1, count, -1, -1)
    x = torch.cat([before, x], dim=2)
    past.inputs[layer] = x[:, :, -count:].clone()  # a view would keep all of x
    return x


def fold(x: Tensor, time: int, space: int) -> Tensor:
    """Space(-time) to depth: `(B, C, T*time, H*space, W*space)` -> `(B, C*time*space*space, T, H, W)`."""
    x = x.unflatten(4, (-1, space)).unflatten(3, (-1, space)).unflatten(2, (-1, time))  # B C T t H s W s
    return x.permute(0, 1, 3, 5, 7, 2, 4, 6).flatten(1, 4)


def unfold(x: Tensor, time: int, space: int) -> Tensor:
    """Depth to space(-time), the inverse of `fold`."""
    x = x.unflatten(1, (-1, time, space, space))  # B C t s s T H W
    return x.permute(0, 1, 5, 2, 6, 3, 7, 4).flatten(6, 7).flatten(4, 5).flatten(2, 3)


class CausalConv3d(nn.Conv3d):
    """A 3D convolution, causal in time, zero padding in space.

    Divides T, H and W, multiples of `stride` (time, height, width), by it. Each output stands for a cell of `stride` inputs.
    It sees no frame after its cell, and as much above and left of the cell as below and right. So along height and width
    `kernel` (one for all axes, or one each) must be odd where the stride is odd, and even where it is even.

    Starts close to an orthogonal map of each cell, times `gain`, with small noise for its neighbours. On the tiny model
    that is worth 1 dB of PSNR after 300 steps against torch's default. `gain=0` starts at zero.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int | tuple[int, int, int] = 3,
        gain: float = 1.0,
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        self.gain = gain  # before the parent's constructor, which calls reset_parameters
        sizes = kernel if isinstance(kernel, tuple) else (kernel, kernel, kernel)
        self.around = (0, (sizes[1] - stride[1]) // 2, (sizes[2] - stride[2]) // 2)
        super().__init__(in_channels, out_channels, sizes, stride, padding=self.around)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            cell = self.weight[:, :, -self.stride[0] :]
            for axis in (1, 2):
                cell = cell.narrow(2 + axis, self.around[axis], self.stride[axis])
            orthogonal = nn.init.orthogonal_(torch.empty_like(cell))
            self.weight.mul_(NEIGHBOUR_GAIN)
            cell += orthogonal
            self.weight.mul_(self.gain)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return convolve(self, causal_pad(self, x, self.kernel_size[0] - self.stride[0], past), self.around)


def convolve(layer: nn.Conv3d, x: Tensor, around: tuple[int, int, int] = (0, 0, 0)) -> Tensor:
    """The convolution of a layer, whose own padding is `around`, of an input that it has padded further."""
    # for small clips on one thread torch would choose im2col in inference, up to 20 times slower
    inference = not (torch.is_grad_enabled() or torch.compiler.is_compiling()) and torch.backends.mkldnn.is_available()
    if inference and x.device.type == "cpu" and x.dtype == torch.float32:
        return torch.mkldnn_convolution(x, layer.weight, layer.bias, around, layer.stride, (1, 1, 1), 1)
    return nn.Conv3d.forward(layer, x)


class Chain(nn.Sequential):
    """Layers in sequence, each of which gets the stream's past."""

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        for layer in self:
            x = layer(x, past)
        return x


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    return torch.rsqrt(x.square().mean(1, keepdim=True) + eps)


class ChannelRMSNorm(nn.Module):
    """Root-mean-square norm over the channels of each position, computed in fp32, with a learned gain."""

    def __init__(self, channels: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        wide = _wide(x)
        return (wide * _inverse_rms(wide, self.eps)).to(x.dtype) * self.weight


class NormSiLU(torch.autograd.Function):
    """`silu(ChannelRMSNorm(x))` in fp32 that keeps only `x` for the backward pass, not the intermediate results."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gain: Tensor, eps: float) -> Tensor:
        wide = _wide(x)
        inverse = _inverse_rms(wide, eps)
        ctx.save_for_backward(x, gain, inverse)
        return F.silu(wide * inverse * gain).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
        x, gain, inverse = ctx.saved_tensors
        normed = _wide(x) * inverse
        down = torch.ops.aten.silu_backward(gradient.to(normed.dtype), normed * gain)
        product = down * normed
        to_gain = product.sum((0, 2, 3, 4), keepdim=True)[0]
        along = (product * gain).mean(1, keepdim=True)
        to_x = inverse * torch.addcmul(down * gain, normed, along, value=-1)
        return to_x.to(x.dtype), to_gain.to(gain.dtype), None


class NormSiLUConv(CausalConv3d):
    """`conv(silu(norm(x)))` at constant width. One module, so that ZeRO-3 gathers gain and weight together."""

    def __init__(self, width: int, gain: float = 1.0, eps: float = 1e-6) -> None:
        super().__init__(width, width, gain=gain)
        self.eps = eps
        self.norm = nn.Parameter(torch.ones(width, 1, 1, 1))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        return super().forward(NormSiLU.apply(x, self.norm, self.eps), past)


class ResBlock(nn.Module):
    """`x + conv(silu(norm(conv(silu(norm(x))))))` at constant width; starts as the identity.

    With `checkpointing`, training keeps only the block's input and recomputes the rest in the backward pass.
    """

    def __init__(self, width: int, checkpointing: bool = False) -> None:
        super().__init__()
        self.checkpointing = checkpointing
        self.branch = Chain(NormSiLUConv(width), NormSiLUConv(width, gain=0.0))

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        again = self.checkpointing and self.training and past is None
        out: Tensor = x + called(again, self.branch, x, past)
        return out


class SpatialAttention(nn.Module):
    """Single-head self-attention among the positions of each frame, with a residual; starts as the identity."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = ChannelRMSNorm(width)
        self.qkv = CausalConv3d(width, 3 * width, kernel=1)
        self.out = CausalConv3d(width, width, kernel=1, gain=0.0)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        qkv = self.qkv(self.norm(x)).permute(0, 2, 3, 4, 1).flatten(2, 3)  # (B, T, H*W, 3C): frames act as heads
        mixed = F.scaled_dot_product_attention(*qkv.chunk(3, dim=-1))
        return x + self.out(mixed.unflatten(2, x.shape[3:]).permute(0, 4, 1, 2, 3))


class Downsample(nn.Module):
    """Halve H and W, and with `time=2` also T: 1 + 2m frames -> 1 + m, the first alone.

    A linear map of the cells that `fold` gathers, plus a shortcut without parameters that averages groups of channels;
    so `in_channels * time * 4` must be a multiple of `out_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, time: int) -> None:
        super().__init__()
        self.time = time
        self.conv = CausalConv3d(in_channels * time * 4, out_channels, kernel=1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = fold(causal_pad(self, x, self.time - 1 if starts(past) else 0), self.time, 2)
        return self.conv(x) + x.unflatten(1, (self.conv.out_channels, -1)).mean(2)


class Upsample(nn.Module):
    """Double H and W, and with `time=2` also T: 1 + m frames -> 1 + 2m, one from the first.

    The mirror of `Downsample`: a linear map and a shortcut that duplicates channels, both spread out by `unfold`;
    so `out_channels * time * 4` must be a multiple of `in_channels`.
    """

    def __init__(self, in_channels: int, out_channels: int, time: int) -> None:
        super().__init__()
        self.time = time
        self.copies = out_channels * time * 4 // in_channels
        self.conv = CausalConv3d(in_channels, out_channels * time * 4, kernel=1)

    def forward(self, x: Tensor, past: Past | None = None) -> Tensor:
        x = unfold(self.conv(x) + x.repeat_interleave(self.copies, dim=1), self.time, 2)
        return x[:, :, self.time - 1 :] if starts(past) else x
