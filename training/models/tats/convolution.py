"""Convolutions that pad by replication, what each output depends on, and exact passes in chunks and tiles.

A convolution of kernel k and stride s pads k - s positions along an axis: ceil((k - s) / 2) before, the rest after. Only an
even kernel with stride 1 is lopsided. With replicated borders and a norm within a position, a token does not know where
in its video it is but by what it sees; and a window computes its inner positions exactly as the whole does. `margins` says
how many positions at the border of a window are not such.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import product
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.training.models.common.causal import convolve
from longtake.training.models.common.streaming import regroup

Padding = Literal["replicate", "zeros", "reflect", "circular"]
Triple = tuple[int, int, int]  # of time, height, width
Margins = tuple[int, int]  # positions before and after
Run = Callable[[Tensor], Tensor]

_MODES = {"replicate": "replicate", "zeros": "constant", "reflect": "reflect", "circular": "circular"}


class Layer(NamedTuple):
    """A convolution along one axis."""

    kernel: int
    stride: int
    transposed: bool = False

    @property
    def before(self) -> int:
        """Positions that are padded before the first."""
        return -((self.stride - self.kernel) // 2)

    @property
    def after(self) -> int:
        """Positions that are padded after the last."""
        return (self.kernel - self.stride) // 2

    def needed(self, first: int, last: int) -> tuple[int, int]:
        """The first and last input that the outputs `first` to `last` depend on, in a video without ends."""
        if self.transposed:
            return -(-first // self.stride) - self.before, (last + self.kernel - 1) // self.stride - self.before
        return first * self.stride - self.before, last * self.stride - self.before + self.kernel - 1


def needed(layers: Sequence[Layer], first: int, last: int) -> tuple[int, int]:
    """The first and last input of a stack of layers that its outputs `first` to `last` depend on."""
    for layer in reversed(layers):
        first, last = layer.needed(first, last)
    return first, last


def margins(layers: Sequence[Layer]) -> Margins:
    """The latents before and after a latent that decide its value, or that of its frames, for an encoder or a decoder."""
    scale = 1
    for layer in layers:
        scale *= layer.stride
    if any(layer.transposed for layer in layers):
        first, last = needed(layers, 0, scale - 1)
        return -first, last
    first, last = needed(layers, 0, 0)
    return -(first // scale), last // scale


def layers_of(module: nn.Module, axis: int) -> list[Layer]:
    """The convolutions of a module along time (0), height (1) or width (2), in the order in which they are computed."""
    return [
        Layer(part.kernel_size[axis], part.stride[axis], isinstance(part, SameTransposed3d))
        for part in module.modules()
        if isinstance(part, SameConv3d | SameTransposed3d)
    ]


def pad(x: Tensor, kernel: Triple, stride: Triple, padding: Padding = "replicate") -> Tensor:
    """Pad `(B, C, T, H, W)` for a convolution that divides its sides by `stride`, or multiplies them."""
    sides: list[int] = []
    for layer in reversed([Layer(k, s) for k, s in zip(kernel, stride, strict=True)]):
        sides += [layer.before, layer.after]
    return F.pad(x, sides, mode=_MODES[padding]) if any(sides) else x


class SameConv3d(nn.Conv3d):
    """A 3D convolution whose output has 1 / stride of the input's sides, which are multiples of it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel: int = 3,
        stride: Triple = (1, 1, 1),
        padding: Padding = "replicate",
    ) -> None:
        super().__init__(in_channels, out_channels, kernel, stride)
        self.border: Padding = padding

    def forward(self, x: Tensor) -> Tensor:
        k, s = self.kernel_size, self.stride
        return convolve(self, pad(x, (k[0], k[1], k[2]), (s[0], s[1], s[2]), self.border))


class SameTransposed3d(nn.ConvTranspose3d):
    """A transposed 3D convolution whose output has `stride` times the input's sides; its borders are replicated."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, stride: Triple) -> None:
        super().__init__(in_channels, out_channels, kernel, stride, padding=kernel - 1)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        k, s = self.kernel_size, self.stride
        return super().forward(pad(x, (k[0], k[1], k[2]), (s[0], s[1], s[2])), output_size)


class Window(NamedTuple):
    """Positions `start` to `end` of an axis, and the wider `low` to `high` that they are computed from."""

    start: int
    end: int
    low: int
    high: int


def windows(size: int, most: int | None, around: Margins, pixels: int = 1) -> list[Window]:
    """Windows of at most `most` positions whose inner parts cover `size` without overlap.

    Raises:
        ValueError: `most` leaves no inner part; a position has so many pixels.
    """
    if most is None or size <= most:
        return [Window(0, size, 0, size)]
    inner = most - sum(around)
    if inner < 1:
        raise ValueError(f"tile {most * pixels}; needs {(sum(around) + 1) * pixels} pixels a side or more")
    starts = range(0, size, inner)
    return [Window(n, min(n + inner, size), max(0, n - around[0]), min(size, n + inner + around[1])) for n in starts]


def tiles(run: Run, x: Tensor, most: int | None, around: Sequence[Margins], scales: tuple[int, int]) -> Tensor:
    """`run(x)` by tiles of at most `most` positions a side, to rounding: `(B, C, T, h*a, w*a)` -> `(B, C', T', h*b, w*b)`.

    Args:
        around: the margins along height and width.
        scales: a and b.
    """
    a, b = scales
    rows, columns = (windows(x.shape[3 + n] // a, most, around[n], a * b) for n in range(2))
    out: Tensor | None = None
    for row, column in product(rows, columns):
        part = run(x[..., row.low * a : row.high * a, column.low * a : column.high * a])
        if len(rows) == len(columns) == 1:
            return part
        if out is None:
            out = part.new_empty((*part.shape[:3], rows[-1].end * b, columns[-1].end * b))
        inner = part[..., (row.start - row.low) * b : (row.end - row.low) * b, :]
        inner = inner[..., (column.start - column.low) * b : (column.end - column.low) * b]
        out[..., row.start * b : row.end * b, column.start * b : column.end * b] = inner
    assert out is not None
    return out


def stream(
    run: Run, chunks: Iterable[Tensor], chunk: int, around: Margins, scales: tuple[int, int]
) -> Iterator[Tensor]:
    """`run` of the chunks' concatenation along time, `chunk` latents at once, to rounding; memory does not grow with it.

    Args:
        chunks: `(B, C, any, H, W)`, together whole latents.
        around: the margins along time: so many latents around a chunk are computed with it.
        scales: positions in time of a latent in the input and in the output.
    """
    (before, after), (a, b) = around, scales
    held: Tensor | None = None
    low = done = high = 0  # latents: the first that is held, those that are out, those that have come
    for piece in _with_end(regroup(chunks, chunk * a, chunk * a)):
        if piece is not None:
            held = piece if held is None else torch.cat([held, piece], dim=2)
            high += piece.shape[2] // a
        while held is not None and done < high and (piece is None or done + chunk + after <= high):
            end, last = min(done + chunk, high), min(done + chunk + after, high)
            with torch.no_grad():
                part = run(held[:, :, : (last - low) * a])
            yield part[:, :, (done - low) * b : (end - low) * b]
            done = end
            held = held[:, :, max(0, done - before - low) * a :]
            low = max(low, done - before)


def _with_end(pieces: Iterable[Tensor]) -> Iterator[Tensor | None]:
    yield from pieces
    yield None
