"""φ, the memory encoder of arXiv 2512.23851: it turns the latents of past seconds into a few tokens of a transformer.

It is causal in time: chunks of a history, encoded in order and each with the `Past` of those before it, give the tokens
of the whole. Histories are `(B, C, T, H, W)` latents, normalised. Sides that a rate does not divide are cut at the bottom
and right.
"""

from __future__ import annotations

import math
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from longtake.training.models.common.causal import CausalConv3d, fold
from longtake.training.models.common.dit import attention
from longtake.training.models.common.recompute import called, chosen
from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.tokens import (
    Memory,
    Project,
    Rate,
    fill_front,
    grid_memory,
    whole_cells,
)

Branches = Literal["both", "high", "low"]

_SILU_GAIN = 1.68  # keeps the variance of SiLU of a normal variable


class _SpatialAttention(nn.Module):
    """Residual attention among the positions of each latent of `(B, C, T, H, W)`; starts as the identity."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor) -> Tensor:
        rows = x.movedim(1, -1).flatten(2, 3).flatten(0, 1)  # (B T, H W, C)
        mixed = attention(*self.qkv(rows).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4))
        rows = self.out(mixed.transpose(1, 2).flatten(2))
        return x + rows.unflatten(1, x.shape[3:]).unflatten(0, (x.shape[0], -1)).movedim(-1, 1)


class Encoder(nn.Module):
    """φ at one rate: the sum of a convolutional branch over all latents and of a low-res view of the video.

    The high branch: a convolution, then strided ones, in time first, with SiLU and without norms; then attention among
    the positions of a latent, and a linear map. The low branch: the video scaled down by the rate and encoded by the same
    autoencoder; the last latent of each group goes through the transformer's own projection.

    At the start the high branch adds nothing to the low one, so that a pretrained transformer sees familiar tokens.

    Assumptions: causality, the kernels' sizes (3, or 1x4x4 where the stride is in space), no norms, which widths a rate
    with few strides leaves out, attention within a latent (so that encoding by chunks is exact and bounded), and that
    start.
    """

    def __init__(
        self,
        rate: Rate,
        patch: int,
        channels: int,
        width: int,
        branches: Branches = "both",
        widths: tuple[int, ...] = (64, 128, 256, 512),
        heads: int = 8,
        shrink: tuple[int, int] | None = None,
        checkpointing: bool | float = False,
    ) -> None:
        """
        Args:
            patch: latents a side of the transformer's tokens, a power of two.
            width: of the transformer.
            shrink: the factors (height, width) that the low branch's video was scaled down by, divisors of the rate,
                which is the default; where they are smaller, neighbouring patches are averaged.
            checkpointing: share of the convolutions that training recomputes in the backward pass.
        """
        super().__init__()
        self.rate, self.patch, self.branches, self.checkpointing = rate, patch, branches, checkpointing
        self.shrink = shrink or rate[:2]
        self.width = width
        self.hidden = 0 if branches == "low" else widths[-1]
        if branches == "low":
            return
        strides = _strides(rate, patch)
        sizes = _widths(widths, len(strides))
        self.stem = _conv(channels, sizes[0], (1, 1, 1), 1.0)
        shapes = zip(sizes[:-1], sizes[1:], strides, strict=True)
        self.down = nn.ModuleList(_conv(*shape, _SILU_GAIN) for shape in shapes)
        self.among = _SpatialAttention(sizes[-1], heads)
        self.out = nn.Linear(sizes[-1], width)
        if branches == "both":
            nn.init.zeros_(self.out.weight)
            nn.init.zeros_(self.out.bias)

    def forward(
        self,
        high: Tensor | None,
        low: Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
        project: Project | None = None,
        skip: Tensor | None = None,
    ) -> Memory:
        """The memory of a history, or of its chunk that begins at latent `start`, after `past`.

        high        `(B, C, T, H, W)`; not read with `branches="low"`
        low         `(B, C, T, h, w)`, normalised with the statistics of its own column; not read with "high"
        past        state after the chunks before; advances to the end of this one. Not with gradients through chunks
        project     the transformer's patch projection, for the low branch
        skip        `(B,)` leading latents of each sample, in whole groups, that are no part of its history

        Raises:
            ValueError: T is no multiple of the rate's; the grid is smaller than the rate; a branch has no input.
        """
        branches: list[Tensor] = []  # (B, T', h, w, D) of each
        hidden = None
        if self.branches != "low":
            if high is None:
                raise ValueError(f"high: is missing; an encoder with branches {self.branches!r} reads it")
            hidden = self._hidden_states(high, past, skip)
            branches.append(self.out(hidden))
        if self.branches != "high":
            if low is None or project is None:
                raise ValueError(f"low: is missing; an encoder with branches {self.branches!r} reads it")
            branches.append(self._low_tokens(low, project))
        if len(branches) == 2:
            branches[1] = _crop(branches[1], branches[0])
        if past is not None:
            past.begun = True
        grid = sum(branches[1:], branches[0])
        rows, columns, time = self.rate
        return grid_memory(grid, (time, rows, columns), start, skip=skip, hidden=hidden)

    def _hidden_states(self, x: Tensor, past: Past | None, skip: Tensor | None) -> Tensor:
        """Last hidden states `(B, T', h, w, D_hidden)`."""
        rows, columns, time = self.rate
        x = whole_cells(x, "high", (time, self.patch * rows, self.patch * columns))
        x, stride = fill_front(x.to(self.stem.weight.dtype), skip), 1
        share = self.checkpointing if self.training and past is None else 0.0
        layers = [self.stem, *self.down]
        for number, layer in enumerate(layers):
            x = called(chosen(share, number, len(layers)), _activated, layer, x, past)
            stride *= layer.stride[0]
            x = fill_front(x, None if skip is None else skip // stride)
        return self.among(x).movedim(1, -1)

    def _low_tokens(self, low: Tensor, project: Project) -> Tensor:
        cell = (self.rate[0] // self.shrink[0], self.rate[1] // self.shrink[1])  # patches that make one token
        low = whole_cells(low, "low", (self.rate[2], self.patch * cell[0], self.patch * cell[1]))
        patches = fold(low[:, :, self.rate[2] - 1 :: self.rate[2]], 1, self.patch).movedim(1, -1)
        if cell != (1, 1):
            patches = patches.unflatten(3, (-1, cell[1])).unflatten(2, (-1, cell[0])).mean((3, 5))
        return project(patches)


def _crop(low: Tensor, high: Tensor) -> Tensor:
    """Crop the low branch's tokens to the grid of the high one. ValueError where they do not cover it."""
    (time, rows, columns), (t, h, w) = high.shape[1:4], low.shape[1:4]
    if t != time or h < rows or w < columns:
        raise ValueError(f"low makes {t}x{h}x{w} tokens (time, rows, columns), high {time}x{rows}x{columns}")
    return low[:, :, :rows, :columns]


def _conv(inputs: int, outputs: int, stride: tuple[int, int, int], gain: float) -> CausalConv3d:
    """A convolution of cells and their neighbours, in time and space or, with a stride in space, in space; keeps the variance."""
    time = 3 if stride[1:] == (1, 1) else 1
    gain *= math.sqrt(max(1.0, outputs / (inputs * math.prod(stride))))
    return CausalConv3d(inputs, outputs, (time, 2 + stride[1], 2 + stride[2]), gain, stride)


def _activated(layer: nn.Module, x: Tensor, past: Past | None) -> Tensor:
    return F.silu(layer(x, past))


def _strides(rate: Rate, patch: int) -> list[tuple[int, int, int]]:
    """The strides (time, height, width) of the convolutions: in time first, then in space; at least one, of 1."""
    rows, columns, time = (n.bit_length() - 1 for n in (patch * rate[0], patch * rate[1], rate[2]))
    strides = [(2, 1, 1)] * time + [(1, 1 + (i < rows), 1 + (i < columns)) for i in range(max(rows, columns))]
    return strides or [(1, 1, 1)]


def _widths(widths: tuple[int, ...], strided: int) -> list[int]:
    """Widths of the stem and of `strided` convolutions. The last is always used; with few convolutions the middle ones are not.

    A convolution with a small stride then keeps most of its input, which is worth more than depth: a map of latents at
    2x2x1 and back has an error of 0.09 after 250 steps, with the other convolutions before it 0.12, after it 0.17.
    """
    later = widths[1:][-strided:]
    return [widths[0], *later, *[widths[-1]] * (strided - len(later))]
