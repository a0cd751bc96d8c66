"""The pieces of EncGAN3: G3AN's three-stream block and factorised attention, and the trunks that see frames and clips.

The block and the attention are G3AN's (arXiv 1912.05523); tensors are `(B, C, T, H, W)`. Normalisation is by groups of
channels within a sample, and of movement there is none, where G3AN has spectral norm with batch statistics: those differ
between ranks [assumption].
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from longtake.training.models.common.recompute import called

Norm = Literal["group", "spectral"]


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """Normalisation in `groups` groups, or fewer where they do not divide the channels."""
    return nn.GroupNorm(math.gcd(groups, channels), channels)


class Growth(nn.Module):
    """A transposed convolution, norm and ReLU: time, space or both are multiplied, or grown by 3 from one position.

    Args:
        kernel: of time and space; 1 leaves the axis as it is.
        stride: 1 adds 3 positions, 2 doubles them, where the kernel is 4.
        groups: of channels that are normalised together; None normalises nothing, and the convolution has a bias.
    """

    def __init__(
        self, in_width: int, width: int, kernel: tuple[int, int], stride: tuple[int, int], groups: int | None
    ) -> None:
        super().__init__()
        k, s, p = ((time, space, space) for time, space in (kernel, stride, [int(each == 2) for each in stride]))
        self.convolution = nn.ConvTranspose3d(in_width, width, k, s, p, bias=groups is None)
        self.norm = nn.Identity() if groups is None else group_norm(groups, width)
        if groups is None:
            # as many taps meet at each position; a stride of 1 begins from one position
            taps = math.prod(a // b for a, b in zip(k, s, strict=True) if b > 1)
            nn.init.normal_(self.convolution.weight, std=math.sqrt(2 / (in_width * taps)))
            nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.convolution(x)))


class ThreeStreams(nn.Module):
    """Content, movement and video -> the same, larger; the video has then seen the other two.

    Content `(B, c, 1, H, W)` grows in space, movement `(B, c, T, 1, 1)` in time, and the video in time and then in space
    (a factorised convolution). Fusion adds the movement to the video and puts the content in front of its channels.
    With `checkpointing`, training keeps only the block's inputs and recomputes the rest in the backward pass.

    Args:
        in_widths: channels of content, movement and video before.
        width: of each stream after; the fused video has twice as many.
        time: how time grows: from T to T + 3 ("begin"), doubled, or not at all.
        begin: whether space grows from 1 to 4; else it is doubled.
    """

    def __init__(
        self,
        in_widths: tuple[int, int, int],
        width: int,
        time: Literal["begin", "double", "keep"],
        begin: bool,
        groups: int,
    ) -> None:
        super().__init__()
        self.checkpointing = False
        kernel, stride = {"begin": (4, 1), "double": (4, 2), "keep": (1, 1)}[time]
        step = 1 if begin else 2
        self.content = Growth(in_widths[0], width, (1, 4), (1, step), groups)
        # a norm within a sample would make the same of a strong movement and a weak one, and of what all have in common
        # more than of what tells them apart [assumption; G3AN: norm over the batch, which does the opposite]
        self.movement = Growth(in_widths[1], width, (kernel, 1), (stride, 1), None)
        self.video_time = Growth(in_widths[2], width, (kernel, 1), (stride, 1), groups)
        self.video_space = Growth(width, width, (1, 4), (1, step), groups)

    def forward(
        self, content: Tensor, movement: Tensor, video: Tensor, reference: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`reference`, a map of the reference frame as large as the content after, is added to what the video sees of it."""
        again = self.checkpointing and self.training
        grown: tuple[Tensor, Tensor, Tensor] = called(again, self._grown, content, movement, video, reference)
        return grown

    def _grown(
        self, content: Tensor, movement: Tensor, video: Tensor, reference: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        content, movement = self.content(content), self.movement(movement)
        video = self.video_space(self.video_time(video)) + movement
        shown = content if reference is None else content + reference
        return content, movement, torch.cat([shown.expand_as(video), video], dim=1)


class Attention(nn.Module):
    """Self-attention over the tokens `(N, L, C)` of each sample, added to them with a weight that begins at 0.

    Queries and keys have C / 8 channels, and their products are not scaled [G3AN's code].
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        inner = max(1, channels // 8)
        self.query, self.key = nn.Linear(channels, inner), nn.Linear(channels, inner)
        self.value = nn.Linear(channels, channels)
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, tokens: Tensor) -> Tensor:
        query, key, value = (layer(tokens).unsqueeze(1) for layer in (self.query, self.key, self.value))
        # on a CPU only heads of one width are attended to without writing all weights down
        missing = value.shape[-1] - query.shape[-1] if tokens.device.type == "cpu" else 0
        query, key = F.pad(query, (0, missing)), F.pad(key, (0, missing))
        return tokens + self.weight * F.scaled_dot_product_attention(query, key, value, scale=1.0).squeeze(1)


class FactorisedAttention(nn.Module):
    """`(B, C, T, H, W)` -> the same: attention over time at each position, then over the positions of each frame."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.time, self.space = Attention(channels), Attention(channels)

    def forward(self, x: Tensor) -> Tensor:
        count, channels, frames, height, width = x.shape
        x = x.permute(0, 3, 4, 2, 1)  # (B, H, W, T, C)
        x = self.time(x.reshape(-1, frames, channels)).view(count, height, width, frames, channels)
        x = x.permute(0, 3, 1, 2, 4)  # (B, T, H, W, C)
        x = self.space(x.reshape(-1, height * width, channels)).view(count, frames, height, width, channels)
        return x.permute(0, 4, 1, 2, 3)


def _begin(convolution: nn.Conv3d) -> None:
    """He's weights and no bias: of differences, which are mostly 0, torch's defaults pass on little but the biases."""
    nn.init.kaiming_normal_(convolution.weight, a=0.2)
    assert convolution.bias is not None
    nn.init.zeros_(convolution.bias)


TIME_STEPS = 4  # at most so many convolutions over time in a trunk, each of which takes 3 frames
LEAST_FRAMES = 3 * TIME_STEPS + 4  # of a clip that a trunk of any size sees


def trunk_widths(size: int, width: int) -> list[int]:
    """Channels after each halving of a frame of `size` pixels down to 4 [G3AN's code: 64 to 512 at 64 pixels]."""
    return [width * min(8, 2**n) for n in range(int(math.log2(size // 4)))]


class Mean(nn.Module):
    """The mean over time, height and width."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3, 4), keepdim=True)


class _InSingle(nn.Module):
    """A parametrisation whose own numbers stay float32, of a weight of any precision."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self.norm.float()
        return self

    def forward(self, weight: Tensor) -> Tensor:
        normed: Tensor = self.norm(weight.float())
        return normed.to(weight.dtype)


def _spectral(convolution: nn.Conv3d) -> nn.Conv3d:
    """Its weight divided by its largest singular value, which torch estimates by vectors that stay float32."""
    spectral_norm(convolution)
    steps: Any = convolution.parametrizations
    steps.weight[0] = _InSingle(steps.weight[0])
    return convolution


class Trunk(nn.Module):
    """Clips `(B, 3, T, H, W)` -> `(B, out, T')` numbers, as G3AN's discriminators see them.

    Each step halves the frame, and in a trunk over time takes 3 frames; a last convolution sees all that is left of the
    frame, and in time slides over it: T' = 1 for 16 frames of 64 pixels, more for longer clips and smaller frames. Without
    time each frame is seen alone and T' = T. With `checkpointing`, training keeps only the clips and recomputes the rest in the
    backward pass.

    Args:
        norm: group: of the outputs but the first; spectral: of the weights, by a power iteration that changes a buffer in
            each forward of a training.
        pooled: the last convolution sees the mean over what is left of frames and time, T' = 1: not where things are.
    """

    def __init__(
        self, size: int, width: int, out: int, time: bool, norm: Norm, groups: int, pooled: bool = False
    ) -> None:
        super().__init__()
        self.checkpointing = False
        widths, steps, before = trunk_widths(size, width), list[nn.Module](), 3
        for number, after in enumerate(widths):
            steps += self._step(nn.Conv3d(before, after, (1, 4, 4), (1, 2, 2), (0, 1, 1)), norm, groups, bool(number))
            if time and number < TIME_STEPS:
                steps += self._step(nn.Conv3d(after, after, (4, 1, 1)), norm, groups, True)
            before = after
        if pooled:
            steps.append(Mean())
        elif time:
            steps += self._step(nn.Conv3d(before, before, (1, 4, 4)), norm, groups, True)
        last = nn.Conv3d(before, out, 1 if pooled else (4, 1, 1) if time else (1, 4, 4))
        _begin(last)
        steps.append(_spectral(last) if norm == "spectral" else last)
        self.steps = nn.Sequential(*steps)

    @staticmethod
    def _step(convolution: nn.Conv3d, norm: Norm, groups: int, normed: bool) -> list[nn.Module]:
        _begin(convolution)
        if norm == "spectral":
            return [_spectral(convolution), nn.LeakyReLU(0.2)]
        return [convolution, *([group_norm(groups, convolution.out_channels)] if normed else []), nn.LeakyReLU(0.2)]

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(next(self.parameters()).dtype)
        out: Tensor = called(self.checkpointing and self.training, self.steps, x)
        return out[..., 0, 0]

    def maps(self, x: Tensor) -> list[Tensor]:
        """The frames, and what a trunk without time makes of them after each halving: `(B, C, T, H, W)`, down to 4 pixels."""
        x = x.to(next(self.parameters()).dtype)
        maps = [x]
        for step in list(self.steps)[:-1]:
            x = step(x)
            if isinstance(step, nn.LeakyReLU):
                maps.append(x)
        return maps
