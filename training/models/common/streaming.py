"""Long videos and large frames in bounded memory: streams in time and blended tiles in space.

In time. To continue after a chunk, a causal model only needs the last inputs of its layers: the last k - 1 frames of each
convolution. `Past` holds them. It belongs to one stream and is passed from layer to layer as an argument, so modules have
no state: streams and training steps of one model may alternate or run in several threads. It is for inference only: a
recomputed block (activation checkpointing) would update it twice.

In space. Frames are cut into overlapping tiles, each goes through the model alone, and overlapping results are mixed with
weights that fall linearly from one tile to the other. Near a tile's border results differ from those of the whole frame
(convolutions see zeros beyond it, attention only sees the tile); the overlap hides that. In a stream every tile has its
own past.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise

import torch
from torch import Tensor, nn

Box = tuple[int, int, int, int]  # top, bottom, left, right
Span = tuple[int, int]  # start, end


class Past:
    """The memory of one stream between two chunks: `inputs`, the last input frames of each layer that looks back.

    `begun` is False until the first chunk is through. Layers use both in `causal.causal_pad`. Besides, `stream` and
    encoders of a history set `begun`, one that packs it keeps whole latents here, and up- and downsampling ask whether
    a chunk holds the first frame.
    """

    def __init__(self) -> None:
        self.begun = False
        self.inputs: dict[nn.Module, Tensor] = {}


def regroup(chunks: Iterable[Tensor], first: int, then: int) -> Iterator[Tensor]:
    """Cut chunks `(B, C, any, H, W)` anew into pieces of `first` and then of `then` frames; the last may be shorter.

    A piece is yielded as soon as it is full. ValueError if a chunk has other B, C, H or W than the first.
    """
    length, parts, count, began = first, list[Tensor](), 0, None
    for chunk in chunks:
        shape = (*chunk.shape[:2], *chunk.shape[3:])
        began = began or shape
        if shape != began:
            raise ValueError(f"a chunk has B, C, H, W = {shape}; the stream began with {began}")
        rest = chunk
        while rest.shape[2]:
            parts.append(rest[:, :, : length - count])
            rest = rest[:, :, length - count :]
            count += parts[-1].shape[2]
            if count == length:
                yield torch.cat(parts, dim=2)
                length, parts, count = then, [], 0
    if parts:
        yield torch.cat(parts, dim=2)


def spans(size: int, tile: int, overlap: int) -> list[Span]:
    """Evenly spread `[start, end)` of length `tile` that cover `size`, neighbours sharing at least `overlap`."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    return [(start, start + tile) for start in (i * (size - tile) // (count - 1) for i in range(count))]


def ramps(cut: list[Span], scale: int) -> list[Tensor]:
    """Weights of the positions of each span, `scale` to a unit: linear across overlaps, and with a sum of 1."""
    centres = torch.arange(cut[-1][1] * scale) + 0.5
    rises = [torch.ones_like(centres)]
    for (_, end), (start, _) in pairwise(cut):
        rises.append(((centres - start * scale) / ((end - start) * scale)).clamp(0, 1))
    falls = [1 - rise for rise in rises[1:]] + [torch.ones_like(centres)]
    weights = torch.stack([rise * fall for rise, fall in zip(rises, falls, strict=True)])
    weights /= weights.sum(0)  # where three tiles meet on one axis
    return [row[start * scale : end * scale] for row, (start, end) in zip(weights, cut, strict=True)]


def tiled(
    run: Callable[[Tensor, Box], Tensor], x: Tensor, tile: int | None, overlap: int, scales: tuple[int, int]
) -> Tensor:
    """Blend `run` over tiles of `x`: `(B, C, T, h*a, w*a)` -> `(B, C', T', h*b, w*b)` with `scales` (a, b).

    `tile` and `overlap` are in the units of h and w. For a frame that fits into a tile, or a tile of None, the result is
    exactly `run(x)`. Peak memory is that of `run` on one tile plus the whole input and output.
    """
    a, b = scales
    height, width = x.shape[3] // a, x.shape[4] // a
    rows, columns = (spans(size, tile or size, overlap) for size in (height, width))
    if len(rows) == len(columns) == 1:
        return run(x, (0, height, 0, width))
    out: Tensor | None = None
    dtype = torch.float32
    for (top, bottom), down in zip(rows, ramps(rows, b), strict=True):
        for (left, right), across in zip(columns, ramps(columns, b), strict=True):
            part = run(x[..., top * a : bottom * a, left * a : right * a], (top, bottom, left, right))
            if out is None:
                dtype = part.dtype
                out = part.new_zeros((*part.shape[:3], height * b, width * b), dtype=torch.float32)
            weights = (down[:, None] * across).to(part.device)
            out[..., top * b : bottom * b, left * b : right * b] += part * weights
    assert out is not None
    return out.to(dtype)


def stream(
    run: Callable[[Tensor, Past], Tensor],
    pieces: Iterable[Tensor],
    tile: int | None,
    overlap: int,
    scales: tuple[int, int],
) -> Iterator[Tensor]:
    """Yield `tiled(run, piece)` of each piece, every tile continuing from its own past; without gradients."""
    pasts: defaultdict[Box, Past] = defaultdict(Past)
    for piece in pieces:
        with torch.no_grad():
            out = tiled(lambda x, box: run(x, pasts[box]), piece, tile, overlap, scales)
        for past in pasts.values():
            past.begun = True
        yield out
