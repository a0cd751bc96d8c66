"""Memories of a history (arXiv 2512.23851): latents of some past seconds, as a few tokens of a diffusion transformer.

A rate `HxWxT` divides the transformer's token grid: one token stands for H rows, W columns and T steps of tokens. `Encoder`
is the paper's φ; `Patchify` and `FramePack` are what it is compared with. All of them are causal in time: pieces of a
history encoded one after the other, each with the `Past` of those before it, give the tokens of the whole.

Histories are `(B, C, T, H, W)` latents, normalised. Sides that a rate does not divide are cut at the bottom and right;
`FramePack` fills them up, as its authors do.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longtake.training.models.common.causal import CausalConv3d, fold
from longtake.training.models.common.dit import attention
from longtake.training.models.common.streaming import Past

Rate = tuple[int, int, int]  # height, width, time
Branches = Literal["both", "high", "low"]
Project = Callable[[Tensor], Tensor]  # a transformer's patch projection, (..., C p p) -> (..., D)

FRAMEPACK = ((1, 1, 1, 1), (2, 2, 2, 2), (16, 4, 4, 4))  # latest steps, and the cell of tokens (t, h, w) that is one
_SILU_GAIN = 1.68  # keeps the variance of what SiLU makes of a normal variable


class Memory(NamedTuple):
    """What a transformer sees of a history.

    tokens      `(B, N, D)`, of the transformer's width
    positions   `(N, 3)` fp32: time in steps, row and column in the transformer's token grid, of the cells' centres
    hidden      `(B, N, D_hidden)`, last hidden states of φ for cross-attention; D_hidden is 0 where there are none
    seen        `(B, N)` bool, False for tokens of steps that a sample does not have; None: all are seen
    """

    tokens: Tensor
    positions: Tensor
    hidden: Tensor
    seen: Tensor | None = None


def joined(memories: Iterable[Memory]) -> Memory:
    """One memory of all tokens, such as of pieces of a history or of several encoders."""
    every = list(memories)
    seen = [m.seen for m in every if m.seen is not None]
    assert len(seen) in (0, len(every))
    return Memory(
        torch.cat([m.tokens for m in every], dim=1),
        torch.cat([m.positions for m in every]),
        torch.cat([m.hidden for m in every], dim=1),
        torch.cat(seen, dim=1) if seen else None,
    )


def cropped(memory: Memory, since: float) -> Memory:
    """Only the tokens whose time is `since` or later."""
    keep = memory.positions[:, 0] >= since
    seen = None if memory.seen is None else memory.seen[:, keep]
    return Memory(memory.tokens[:, keep], memory.positions[keep], memory.hidden[:, keep], seen)


def repeated(memory: Memory, times: int) -> Memory:
    """For a batch of so many times as many videos, one batch after the other."""
    tokens, hidden = (part.repeat(times, 1, 1) for part in (memory.tokens, memory.hidden))
    return Memory(tokens, memory.positions, hidden, None if memory.seen is None else memory.seen.repeat(times, 1))


def begun(x: Tensor, skip: Tensor | None) -> Tensor:
    """`(B, C, T, ...)` whose first `skip` `(B,)` steps are copies of the one after them: what causal layers put in front."""
    if skip is None:
        return x
    steps = torch.arange(x.shape[2], device=x.device)
    index = torch.maximum(steps, skip[:, None]).clamp(max=x.shape[2] - 1)
    return x.gather(2, index.view(len(x), 1, -1, *[1] * (x.ndim - 3)).expand_as(x))


def _seen(skip: Tensor | None, firsts: Tensor, cells: int) -> Tensor | None:
    """Of `cells` tokens for each of the cells in time whose first steps are `firsts` `(T',)`: those without a skipped one."""
    if skip is None:
        return None
    return (skip[:, None] <= firsts.to(skip.device)).repeat_interleave(cells, dim=1)


def parse_rate(rate: str) -> Rate:
    """`"4x4x2"` -> (4, 4, 2): height, width, time. ValueError unless these are three powers of two."""
    parts = rate.split("x")
    sides = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 5]
    if len(parts) != 3 or len(sides) != 3 or any(side < 1 or side & (side - 1) for side in sides):
        raise ValueError(f"rate {rate!r}: needs height x width x time in powers of two, such as 4x4x2")
    return sides[0], sides[1], sides[2]


def tokens_of(rate: Rate | str, patch: int, shape: tuple[int, int, int]) -> int:
    """How many tokens a rate makes of latents of `shape` (T, H, W): floor, per axis."""
    rows, columns, time = parse_rate(rate) if isinstance(rate, str) else rate
    return (shape[0] // time) * (shape[1] // (patch * rows)) * (shape[2] // (patch * columns))


def _centres(start: float, counts: Sequence[int], steps: Sequence[int], device: torch.device) -> Tensor:
    """Positions `(N, 3)` of cells of `steps` units an axis: `counts` of them, in time from `start`, else from 0."""
    axes = [(torch.arange(n, device=device) + 0.5) * s - 0.5 for n, s in zip(counts, steps, strict=True)]
    axes[0] = axes[0] + start
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _packed_centres(start: float, shape: Sequence[int], cell: Sequence[int], device: torch.device) -> Tensor:
    """Positions `(N, 3)` of the cells of a grid of `shape` tokens, of which the last one an axis repeats its last token."""
    axes = [
        torch.arange(-(-n // k) * k, device=device).clamp(max=n - 1).view(-1, k).float().mean(1)
        for n, k in zip(shape, cell, strict=True)
    ]
    axes[0] = axes[0] + start
    return torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)


def _whole(latents: Tensor, name: str, kernel: tuple[int, int, int]) -> Tensor:
    """`latents` cut to multiples of the kernel's rows and columns. ValueError for other multiples in time, or none."""
    if latents.shape[2] % kernel[0] or not latents.shape[2]:
        raise ValueError(f"{name} has {latents.shape[2]} steps; give a multiple of {kernel[0]}, one at least")
    height, width = (side // k * k for side, k in zip(latents.shape[3:], kernel[1:], strict=True))
    if not height or not width:
        has, needs = (f"{h}x{w}" for h, w in (latents.shape[3:], kernel[1:]))
        raise ValueError(
            f"{name} is {has}; a token stands for {needs} of its positions: take larger frames or a lower rate"
        )
    return latents[..., :height, :width]


def _filled(latents: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """`latents` with the last row and column repeated, up to multiples of the kernel's."""
    below, right = (-side % k for side, k in zip(latents.shape[3:], kernel[1:], strict=True))
    return F.pad(latents, (0, right, 0, below, 0, 0), mode="replicate")


def remembered(
    encoders: Sequence[nn.Module],
    project: Project,
    high: Tensor,
    low: Tensor | None = None,
    start: int = 0,
    pasts: Sequence[Past] | None = None,
    skip: Tensor | None = None,
) -> Memory:
    """What `encoders`, one at least, make of a history or a piece of it, concatenated: see `Encoder.forward`.

    ValueError if there is not one past for each of them.
    """
    if pasts is not None and len(pasts) != len(encoders):
        raise ValueError(f"pasts are {len(pasts)}; this model has {len(encoders)} encoders, which need one each")
    each = [None] * len(encoders) if pasts is None else pasts
    return joined(m(high, low, start, past, project, skip) for m, past in zip(encoders, each, strict=True))


class _Among(nn.Module):
    """Attention among the positions of each step of `(B, C, T, H, W)`, residual; starts as the identity."""

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
    """φ at one rate: a convolutional branch over all latents, and one that lets the transformer see a small video.

    The high branch: a convolution, then strided ones, in time first, with SiLU and without norms; then attention among
    the positions of a step, and a linear map. The low branch: the video scaled down by the rate and encoded by the same
    autoencoder; of its latents every r_t-th step, the last of its group, through the transformer's own projection.

    Both are added up. At the start the high branch adds nothing to the low one, so that a transformer sees what it knows.

    Assumptions: causality, the kernels' sizes (3, or 1x4x4 where the stride is in space), no norms, which widths a rate
    with few strides leaves out, attention within a step (which keeps going on exact and bounded), and that start.
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
        checkpointing: bool = False,
    ) -> None:
        """
        Args:
            patch: latents a side of the transformer's tokens, a power of two.
            width: of the transformer.
            shrink: what the video of the low branch was scaled down by (height, width), a divisor of the rate, which
                is the default; where it is less, neighbouring patches are averaged.
            checkpointing: training recomputes the convolutions in the backward pass.
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
        self.among = _Among(sizes[-1], heads)
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
        """The memory of a history, or of the piece of it that begins at step `start` and goes on from `past`.

        high        `(B, C, T, H, W)`; not read with `branches="low"`
        low         `(B, C, T, h, w)`, normalised with the statistics of its own column; not read with "high"
        past        of what came before; goes on to the end of this piece. Not together with gradients through pieces
        project     the transformer's patch projection, for the low branch
        skip        `(B,)`, so many steps in front of each sample, whole groups, are no part of its history

        Raises:
            ValueError: T is no multiple of the rate's; the grid is smaller than the rate; a branch has no input.
        """
        made: list[Tensor] = []  # (B, T', h, w, D) of each branch
        hidden = None
        if self.branches != "low":
            if high is None:
                raise ValueError(f"high: is missing; an encoder with branches {self.branches!r} reads it")
            hidden = self._high(high, past, skip)
            made.append(self.out(hidden))
        if self.branches != "high":
            if low is None or project is None:
                raise ValueError(f"low: is missing; an encoder with branches {self.branches!r} reads it")
            made.append(self._low(low, project))
        if len(made) == 2:
            made[1] = _cut(made[1], made[0])
        if past is not None:
            past.begun = True
        tokens = sum(made[1:], made[0])
        rows, columns, time = self.rate
        centres = _centres(start, tokens.shape[1:4], (time, rows, columns), tokens.device)
        seen = _seen(skip, time * torch.arange(tokens.shape[1]), tokens.shape[2] * tokens.shape[3])
        tokens = tokens.flatten(1, 3)
        return Memory(tokens, centres, tokens[..., :0] if hidden is None else hidden.flatten(1, 3), seen)

    def _high(self, x: Tensor, past: Past | None, skip: Tensor | None) -> Tensor:
        """Last hidden states `(B, T', h, w, D_hidden)`."""
        rows, columns, time = self.rate
        x = _whole(x, "high", (time, self.patch * rows, self.patch * columns))
        x, each = begun(x.to(self.stem.weight.dtype), skip), 1
        for layer in [self.stem, *self.down]:
            if self.checkpointing and self.training and past is None:
                x = checkpoint(_activated, layer, x, past, use_reentrant=False)
            else:
                x = _activated(layer, x, past)
            each *= layer.stride[0]
            x = begun(x, None if skip is None else skip // each)
        return self.among(x).movedim(1, -1)

    def _low(self, low: Tensor, project: Project) -> Tensor:
        each = (self.rate[0] // self.shrink[0], self.rate[1] // self.shrink[1])  # its patches that make one token
        low = _whole(low, "low", (self.rate[2], self.patch * each[0], self.patch * each[1]))
        patches = fold(low[:, :, self.rate[2] - 1 :: self.rate[2]], 1, self.patch).movedim(1, -1)
        if each != (1, 1):
            patches = patches.unflatten(3, (-1, each[1])).unflatten(2, (-1, each[0])).mean((3, 5))
        return project(patches)


def _cut(low: Tensor, high: Tensor) -> Tensor:
    """Tokens of the low branch on the grid of the high one. ValueError where they do not cover it."""
    (time, rows, columns), (t, h, w) = high.shape[1:4], low.shape[1:4]
    if t != time or h < rows or w < columns:
        raise ValueError(f"low makes {t}x{h}x{w} tokens (time, rows, columns), high {time}x{rows}x{columns}")
    return low[:, :, :rows, :columns]


def _conv(inside: int, outside: int, stride: tuple[int, int, int], gain: float) -> CausalConv3d:
    """Sees its cells and their neighbours, in time or where it strides in space in space alone; keeps the variance."""
    time = 3 if stride[1:] == (1, 1) else 1
    gain *= math.sqrt(max(1.0, outside / (inside * math.prod(stride))))
    return CausalConv3d(inside, outside, (time, 2 + stride[1], 2 + stride[2]), gain, stride)


def _activated(layer: nn.Module, x: Tensor, past: Past | None) -> Tensor:
    return F.silu(layer(x, past))


def _strides(rate: Rate, patch: int) -> list[tuple[int, int, int]]:
    """Of the convolutions, (time, height, width): in time first, then in space; of a rate that divides nothing, one of 1."""
    rows, columns, time = (n.bit_length() - 1 for n in (patch * rate[0], patch * rate[1], rate[2]))
    strides = [(2, 1, 1)] * time + [(1, 1 + (i < rows), 1 + (i < columns)) for i in range(max(rows, columns))]
    return strides or [(1, 1, 1)]


def _widths(widths: tuple[int, ...], strided: int) -> list[int]:
    """Of the stem and so many convolutions, which end with the last: with fewer of them those in between are left out.

    A convolution that divides little then keeps most of what it sees, which is worth more than depth: a map of latents
    at 2x2x1 and back has an error of 0.09 after 250 steps, with the others before it 0.12, after it 0.17.
    """
    later = widths[1:][-strided:]
    return [widths[0], *later, *[widths[-1]] * (strided - len(later))]


class _Kernel(nn.Module):
    """A linear map of cells of a transformer's tokens (time, height, width), of `patch` latents a side each, to one token.

    `(B, C, T, H, W)` -> `(B, t, h, w, D)`.
    """

    def __init__(self, cell: tuple[int, int, int], patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.cell, self.patch = cell, patch
        self.kernel = (cell[0], patch * cell[1], patch * cell[2])  # latents
        self.linear = nn.Linear(channels * math.prod(self.kernel), width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def start_from(self, embedding: nn.Linear) -> None:
        """Become the transformer's patch embedding of a smaller video, whose latents are the means over those of a cell.

        Each weight is repeated over the cell and divided by its size (FramePack's `initialize_weight_from_another_conv3d`).
        With a patch of 1 a token is thus the mean of the tokens that it stands for.
        """
        weight = embedding.weight.unflatten(1, (-1, 1, self.patch, self.patch))
        for axis, times in enumerate(self.cell, 2):
            weight = weight.repeat_interleave(times, axis)
        self.linear.weight.copy_(weight.flatten(1) / math.prod(self.cell))
        self.linear.bias.copy_(embedding.bias)

    def forward(self, x: Tensor) -> Tensor:
        time, rows, columns = self.kernel
        x = x.to(self.linear.weight.dtype)
        x = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, time))  # B C T t H h W w
        return self.linear(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4))


class Patchify(nn.Module):
    """A large patchifier: one linear map of all latents of a token, at the rate of an encoder. Reads `high` alone."""

    def __init__(self, rate: Rate, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.rate, self.patch = rate, patch
        self.kernel = _Kernel((rate[2], *rate[:2]), patch, channels, width)

    def start_from(self, embedding: nn.Linear) -> None:
        """Begin as a transformer's patch embedding, scaled up; else it begins as noise."""
        self.kernel.start_from(embedding)

    def forward(
        self,
        high: Tensor | None,
        low: Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
        project: Project | None = None,
        skip: Tensor | None = None,
    ) -> Memory:
        """As `Encoder.forward`; no token knows of another, so that a past is not needed."""
        if high is None:
            raise ValueError("high: is missing; a patchifier reads it")
        made = self.kernel(_whole(high, "high", self.kernel.kernel))
        rows, columns, time = self.rate
        centres = _centres(start, made.shape[1:4], (time, rows, columns), made.device)
        seen = _seen(skip, time * torch.arange(made.shape[1]), made.shape[2] * made.shape[3])
        tokens = made.flatten(1, 3)
        return Memory(tokens, centres, tokens[..., :0], seen)


class FramePack(nn.Module):
    """FramePack's (arXiv 2504.12626): the older a step, the larger the kernel that it is seen through (`FRAMEPACK`).

    The latest step has the transformer's own tokens. Where a kernel does not divide the frame, its last rows and columns
    are repeated. Steps older than the last kernel reaches are dropped, and so are the oldest that do not fill a kernel
    [assumptions].
    What a step's tokens are thus changes as the history goes on: with a `past`, which keeps the latest steps, the result
    is the memory of all that was seen, the last `reach` steps of it, and replaces the one before. Reads `high` alone.
    """

    def __init__(self, patch: int, channels: int, width: int, reach: int | None = None) -> None:
        super().__init__()
        most = sum(steps for steps, *_ in FRAMEPACK)
        self.patch, self.reach = patch, most if reach is None else min(most, reach)
        self.kernels = nn.ModuleList(_Kernel((t, h, w), patch, channels, width) for _, t, h, w in FRAMEPACK)

    def start_from(self, embedding: nn.Linear) -> None:
        """Begin as a transformer's patch embedding, scaled up; else it begins as noise."""
        for kernel in self.kernels:
            kernel.start_from(embedding)  # type: ignore[operator]

    def forward(
        self,
        high: Tensor | None,
        low: Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
        project: Project | None = None,
        skip: Tensor | None = None,
    ) -> Memory:
        """As `Encoder.forward`, but for what a past means."""
        if high is None:
            raise ValueError("high: is missing; a packed memory reads it")
        if past is not None:
            if past.begun:
                start -= past.inputs[self].shape[2]
                high = torch.cat([past.inputs[self], high], dim=2)
            start += max(0, high.shape[2] - self.reach)
            high = high[:, :, -self.reach :]
            past.inputs[self] = high.clone()
            past.begun = True
        parts, end = [], high.shape[2]
        grid = [-(-side // self.patch) for side in high.shape[3:]]
        for kernel, (steps, *cell) in zip(self.kernels, FRAMEPACK, strict=True):
            begin = end - min(steps, end) // cell[0] * cell[0]
            if begin == end:
                break
            made = kernel(_filled(high[:, :, begin:end], kernel.kernel))  # type: ignore[arg-type]
            centres = _packed_centres(start + begin, (end - begin, *grid), cell, made.device)
            seen = _seen(skip, begin + cell[0] * torch.arange(made.shape[1]), made.shape[2] * made.shape[3])
            tokens = made.flatten(1, 3)
            parts.append(Memory(tokens, centres, tokens[..., :0], seen))
            end = begin
        if not parts:
            raise ValueError("high has 0 steps; give one at least")
        return joined(reversed(parts))
