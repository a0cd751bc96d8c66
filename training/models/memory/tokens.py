"""The tokens that stand for a history in a transformer: a `Memory`, its rate, and the positions of its tokens.

A rate `HxWxT` divides the transformer's token grid: one token stands for H rows, W columns and T latents of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from longtake.training.models.common.streaming import Past

Rate = tuple[int, int, int]  # height, width, time
Project = Callable[[Tensor], Tensor]  # a transformer's patch projection, (..., C p p) -> (..., D)


class Memory(NamedTuple):
    """The tokens of a history for a transformer.

    tokens      `(B, N, D)`, of the transformer's width
    positions   `(N, 3)` fp32: time in latents, row and column in the transformer's token grid, of the cells' centres
    hidden      `(B, N, D_hidden)`, last hidden states of φ for cross-attention; D_hidden is 0 where there are none
    seen        `(B, N)` bool, False for tokens of latents that a sample does not have; None: all are seen
    """

    tokens: Tensor
    positions: Tensor
    hidden: Tensor
    seen: Tensor | None = None


def joined(memories: Iterable[Memory]) -> Memory:
    """One memory of all tokens, for example of chunks of a history or of several encoders."""
    parts = list(memories)
    seen = [m.seen for m in parts if m.seen is not None]
    assert len(seen) in (0, len(parts))
    return Memory(
        torch.cat([m.tokens for m in parts], dim=1),
        torch.cat([m.positions for m in parts]),
        torch.cat([m.hidden for m in parts], dim=1),
        torch.cat(seen, dim=1) if seen else None,
    )


def cropped(memory: Memory, since: float) -> Memory:
    """Only the tokens whose time is `since` or later."""
    keep = memory.positions[:, 0] >= since
    seen = None if memory.seen is None else memory.seen[:, keep]
    return Memory(memory.tokens[:, keep], memory.positions[keep], memory.hidden[:, keep], seen)


def repeated(memory: Memory, times: int) -> Memory:
    """The memory of `times` copies of a batch, one after the other."""
    tokens, hidden = (part.repeat(times, 1, 1) for part in (memory.tokens, memory.hidden))
    return Memory(tokens, memory.positions, hidden, None if memory.seen is None else memory.seen.repeat(times, 1))


def fill_front(x: Tensor, skip: Tensor | None) -> Tensor:
    """Fill the first `skip` `(B,)` latents of `(B, C, T, ...)` with the one after them, as causal layers pad the front."""
    if skip is None:
        return x
    index = torch.maximum(torch.arange(x.shape[2], device=x.device), skip[:, None]).clamp(max=x.shape[2] - 1)
    return x.gather(2, index.view(len(x), 1, -1, *[1] * (x.ndim - 3)).expand_as(x))


def grid_memory(
    grid: Tensor,
    cell: Sequence[int],
    start: int,
    begin: int = 0,
    skip: Tensor | None = None,
    hidden: Tensor | None = None,
    shape: Sequence[int] | None = None,
) -> Memory:
    """The memory of a grid of tokens, each of which stands for a cell of the transformer's tokens.

    grid        `(B, T', h, w, D)`
    cell        time, rows, columns, powers of two
    start       time of the history's first latent
    begin       the history's latent that the grid begins with
    skip        `(B,)`: tokens with any of the history's first `skip` latents are not seen; None: all are
    hidden      `(B, T', h, w, D_hidden)`
    shape       transformer's tokens an axis, where cells reach beyond: these repeat the last token; None: no cell does
    """
    tokens, seen = grid.flatten(1, 3), None
    shape = shape or [count * side for count, side in zip(grid.shape[1:4], cell, strict=True)]
    axes = [
        torch.arange(count * side, device=grid.device).clamp(max=size - 1).view(-1, side).float().mean(1)
        for count, side, size in zip(grid.shape[1:4], cell, shape, strict=True)
    ]
    axes[0] = axes[0] + (start + begin)
    positions = torch.stack(torch.meshgrid(*axes, indexing="ij"), dim=-1).flatten(0, 2)
    if skip is not None:
        firsts = begin + cell[0] * torch.arange(grid.shape[1], device=skip.device)
        seen = (skip[:, None] <= firsts).repeat_interleave(grid.shape[2] * grid.shape[3], dim=1)
    return Memory(tokens, positions, tokens[..., :0] if hidden is None else hidden.flatten(1, 3), seen)


def parse_rate(rate: str) -> Rate:
    """`"4x4x2"` -> (4, 4, 2): height, width, time. ValueError unless these are three powers of two."""
    parts = rate.split("x")
    sides = [int(part) for part in parts if part.isascii() and part.isdigit() and len(part) < 5]
    if len(parts) != 3 or len(sides) != 3 or any(side < 1 or side & (side - 1) for side in sides):
        raise ValueError(f"rate {rate!r}: needs height x width x time in powers of two, such as 4x4x2")
    return sides[0], sides[1], sides[2]


def tokens_of(rate: Rate | str, patch: int, shape: tuple[int, int, int]) -> int:
    """The number of tokens that a rate makes of latents of `shape` (T, H, W): floor, per axis."""
    rows, columns, time = parse_rate(rate) if isinstance(rate, str) else rate
    return (shape[0] // time) * (shape[1] // (patch * rows)) * (shape[2] // (patch * columns))


def whole_cells(latents: Tensor, name: str, kernel: tuple[int, int, int]) -> Tensor:
    """Crop `latents` to multiples of the kernel's rows and columns. ValueError where time is no multiple, or nothing is left."""
    if latents.shape[2] % kernel[0] or not latents.shape[2]:
        raise ValueError(f"{name} has {latents.shape[2]} steps; give a multiple of {kernel[0]}, one at least")
    height, width = (side // k * k for side, k in zip(latents.shape[3:], kernel[1:], strict=True))
    if not height or not width:
        has, needs = (f"{h}x{w}" for h, w in (latents.shape[3:], kernel[1:]))
        raise ValueError(
            f"{name} is {has}; a token stands for {needs} of its positions: take larger frames or a lower rate"
        )
    return latents[..., :height, :width]


def run_encoders(
    encoders: Sequence[nn.Module],
    project: Project,
    high: Tensor,
    low: Tensor | None = None,
    start: int = 0,
    pasts: Sequence[Past] | None = None,
    skip: Tensor | None = None,
) -> Memory:
    """The memories that `encoders`, at least one, make of a history or a chunk of it, joined: see `Encoder.forward`.

    ValueError if there is not one past for each of them.
    """
    if pasts is not None and len(pasts) != len(encoders):
        raise ValueError(f"pasts are {len(pasts)}; this model has {len(encoders)} encoders, which need one each")
    states = [None] * len(encoders) if pasts is None else pasts
    return joined(m(high, low, start, past, project, skip) for m, past in zip(encoders, states, strict=True))
