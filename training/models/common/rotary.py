"""Rotary positions in time, row and column (RoPE, arXiv 2104.09864): attention depends only on their differences."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_BASE = 10_000.0  # base of the rotations' frequencies

Rotation = tuple[Tensor, Tensor]  # cosines and sines, each (B or 1, 1, N, d / 2) fp32, for heads of width d


def rotation(positions: Tensor, width: int) -> Rotation:
    """The rotation of heads of `width` d at positions `(B or 1, N, 3)`: a third of the pairs each axis, the rest for time."""
    space = width // 6
    counts = (width // 2 - 2 * space, space, space)
    # fp64, since a late time keeps few fractional digits in fp32
    angles = [
        positions[..., axis, None].double() * _BASE ** (-torch.arange(n, device=positions.device).double() / n)
        for axis, n in enumerate(counts)
    ]
    turns = torch.cat(angles, dim=-1).unsqueeze(1)
    return turns.cos().float(), turns.sin().float()


def rotated(x: Tensor, by: Rotation) -> Tensor:
    """Queries or keys `(B, heads, N, d)`, each pair of channels turned by its angle, in fp32, rounded once."""
    cos, sin = by
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)


def one_after_the_other(first: Rotation, then: Rotation) -> Rotation:
    """The rotation of tokens at one set of positions followed by tokens at another."""
    cos, sin = (torch.cat([a.expand(len(b), -1, -1, -1), b], dim=2) for a, b in zip(first, then, strict=True))
    return cos, sin


def grid_positions(times: Tensor, rows: int, columns: int, device: torch.device) -> Tensor:
    """The positions of a token grid at `times` `(T,)` or `(B, T)`: `(B or 1, T rows columns, 3)` fp32."""
    times = times.to(device, torch.float32).reshape(-1, times.shape[-1])
    shape = (*times.shape, rows, columns)
    row, column = (torch.arange(n, device=device, dtype=torch.float32) for n in (rows, columns))
    axes = (times[..., None, None], row[:, None], column)
    return torch.stack([axis.expand(shape) for axis in axes], dim=-1).flatten(1, 3)


class CrossAttention(nn.Module):
    """Attention from tokens `(B, N, D)` to hidden states `(B, M, D_hidden)`, each with their own positions: `(B, N, D)`.

    `seen` `(B, M)` bool is False for states that a sample does not have. The output map starts at zero.
    """

    def __init__(self, width: int, hidden: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(hidden, 2 * width)
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, x: Tensor, hidden: Tensor, here: Rotation, there: Rotation, seen: Tensor | None = None) -> Tensor:
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype)
        query = self.query(normed).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        key, value = self.key_value(hidden).unflatten(-1, (2, self.heads, -1)).permute(2, 0, 3, 1, 4)
        sees_any = None if seen is None else seen.any(1, keepdim=True)
        # a softmax over nothing is NaN: a sample without states sees all of them, and then gets zero
        mask = None if seen is None or sees_any is None else (seen | ~sees_any)[:, None, None]
        mixed = F.scaled_dot_product_attention(rotated(query, here), rotated(key, there), value, mask)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out if sees_any is None else torch.where(sees_any[..., None], out, 0.0)
