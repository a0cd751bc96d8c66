"""Baselines of φ: a large patchifier and FramePack. Both are called as `encoder.Encoder` is."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.tokens import Memory, Project, Rate, grid_memory, joined, whole_cells

FRAMEPACK = ((1, 1, 1, 1), (2, 2, 2, 2), (16, 4, 4, 4))  # a number of latents, latest first, and their cells (t, h, w)


def _filled(latents: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """Repeat the last row and column of `latents`, up to multiples of the kernel's."""
    below, right = (-side % k for side, k in zip(latents.shape[3:], kernel[1:], strict=True))
    return F.pad(latents, (0, right, 0, below, 0, 0), mode="replicate")


class CellEmbedding(nn.Module):
    """A linear map to one token from a cell (time, height, width) of a transformer's tokens, each of `patch` latents a side.

    `(B, C, T, H, W)` -> `(B, t, h, w, D)`.
    """

    def __init__(self, cell: tuple[int, int, int], patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.cell, self.patch = cell, patch
        self.size = (cell[0], patch * cell[1], patch * cell[2])  # latents
        self.linear = nn.Linear(channels * math.prod(self.size), width)
        nn.init.xavier_uniform_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    @torch.no_grad()
    def start_from(self, weight: Tensor, bias: Tensor) -> None:
        """Become the transformer's patch embedding of a smaller video, whose latents are the means over a cell's.

        Each weight is repeated over the cell and divided by its size (FramePack's `initialize_weight_from_another_conv3d`).
        With a patch of 1 a token is thus the mean of its cell's tokens.
        """
        weight = weight.unflatten(1, (-1, 1, self.patch, self.patch))
        for axis, times in enumerate(self.cell, 2):
            weight = weight.repeat_interleave(times, axis)
        self.linear.weight.copy_(weight.flatten(1) / math.prod(self.cell))
        self.linear.bias.copy_(bias)

    def forward(self, x: Tensor) -> Tensor:
        time, rows, columns = self.size
        x = x.to(self.linear.weight.dtype)
        x = x.unflatten(4, (-1, columns)).unflatten(3, (-1, rows)).unflatten(2, (-1, time))  # B C T t H h W w
        return self.linear(x.permute(0, 2, 4, 6, 1, 3, 5, 7).flatten(4))


class Patchify(nn.Module):
    """A large patchifier: one linear map of all latents of a token, at the rate of an encoder. Reads only `high`."""

    def __init__(self, rate: Rate, patch: int, channels: int, width: int) -> None:
        super().__init__()
        self.rate, self.patch = rate, patch
        self.kernel = CellEmbedding((rate[2], *rate[:2]), patch, channels, width)

    def forward(
        self,
        high: Tensor | None,
        low: Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
        project: Project | None = None,
        skip: Tensor | None = None,
    ) -> Memory:
        """See `Encoder.forward`. Tokens do not depend on each other, so that no past is needed."""
        if high is None:
            raise ValueError("high: is missing; a patchifier reads it")
        grid = self.kernel(whole_cells(high, "high", self.kernel.size))
        return grid_memory(grid, self.kernel.cell, start, skip=skip)


class FramePack(nn.Module):
    """FramePack's memory (arXiv 2504.12626): the older a latent, the larger the kernel that reads it (`FRAMEPACK`).

    The latest latent has the transformer's own tokens. Where a kernel does not divide the frame, its last rows and columns
    are repeated. Latents older than the last kernel reaches are dropped, and so are the oldest that do not fill a kernel
    [assumptions].
    A latent's tokens thus change as the history grows: with a `past`, which keeps the latest latents, the result is the
    memory of the last `reach` latents of all chunks so far, and replaces the one before. Reads only `high`.
    """

    def __init__(self, patch: int, channels: int, width: int, reach: int | None = None) -> None:
        super().__init__()
        most = sum(latents for latents, *_ in FRAMEPACK)
        self.patch, self.reach = patch, most if reach is None else min(most, reach)
        self.kernels = nn.ModuleList(CellEmbedding((t, h, w), patch, channels, width) for _, t, h, w in FRAMEPACK)

    def forward(
        self,
        high: Tensor | None,
        low: Tensor | None = None,
        start: int = 0,
        past: Past | None = None,
        project: Project | None = None,
        skip: Tensor | None = None,
    ) -> Memory:
        """See `Encoder.forward`; but the result is of all that `past` has seen."""
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
        sides = [-(-side // self.patch) for side in high.shape[3:]]
        for kernel, (latents, *cell) in zip(self.kernels, FRAMEPACK, strict=True):
            begin = end - min(latents, end) // cell[0] * cell[0]
            if begin == end:
                break
            grid = kernel(_filled(high[:, :, begin:end], kernel.size))  # type: ignore[arg-type]
            parts.append(grid_memory(grid, cell, start, begin, skip, shape=(end - begin, *sides)))
            end = begin
        if not parts:
            raise ValueError("high has 0 steps; give one at least")
        return joined(reversed(parts))


def framepack_tokens(patch: int, shape: tuple[int, int, int]) -> int:
    """The number of tokens that `FramePack` makes of latents of `shape` (T, H, W)."""
    tokens, remaining = 0, shape[0]
    for latents, time, rows, columns in FRAMEPACK:
        cells = min(latents, remaining) // time
        if not cells:
            break
        height, width = -(-shape[1] // (patch * rows)), -(-shape[2] // (patch * columns))
        tokens, remaining = tokens + cells * height * width, remaining - cells * time
    return tokens
