"""Long videos and large frames in bounded memory: cut in time and remember, cut in space and blend.

In time. A model that is causal needs, to go on where a piece of video ended, only what its layers saw last: of each
convolution the last k - 1 steps of its input. `Past` holds them. It belongs to one stream and is handed down from
layer to layer as an argument, so no module has a state: streams and training steps of one model may take turns or run
in several threads. It is for inference: a recomputed block (activation checkpointing) would remember twice.

In space. Frames are cut into overlapping tiles, each goes through the model by itself, and where tiles share positions
their results are mixed with weights that fall linearly from one to the other. Near a tile's border results differ from
those of the whole frame (the convolutions see zeros beyond it, attention only sees the tile); that is what the overlap
hides. In a stream every tile has a past of its own.
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
    """What one stream remembers between two pieces: `inputs`, the last input steps of each layer that looks back.

    `begun` is False until the first piece is through; the one place that reads and writes both is `layers.causal_pad`,
    but for `stream` and the encoders of `memory`, which set `begun`, `memory.FramePack`, which keeps whole steps, and the
    samplers, which treat the first step apart.
    """

    def __init__(self) -> None:
        self.begun = False
        self.inputs: dict[nn.Module, Tensor] = {}


def regroup(chunks: Iterable[Tensor], first: int, then: int) -> Iterator[Tensor]:
    """Chunks `(B, C, any, H, W)` as pieces of `first` steps in time, then of `then`; the last may be shorter.

    A piece comes as soon as its last step has come. ValueError if a chunk has other B, C, H or W than the first.
    """
    need, held, have, began = first, list[Tensor](), 0, None
    for chunk in chunks:
        shape = (*chunk.shape[:2], *chunk.shape[3:])
        began = began or shape
        if shape != began:
            raise ValueError(f"a chunk has B, C, H, W = {shape}; the stream began with {began}")
        rest = chunk
        while rest.shape[2]:
            held.append(rest[:, :, : need - have])
            rest = rest[:, :, need - have :]
            have += held[-1].shape[2]
            if have == need:
                yield torch.cat(held, dim=2)
                need, held, have = then, [], 0
    if held:
        yield torch.cat(held, dim=2)


def spans(size: int, tile: int, overlap: int) -> list[Span]:
    """Evenly spread `[start, end)` of length `tile` that cover `size`, neighbours sharing at least `overlap`."""
    if size <= tile:
        return [(0, size)]
    count = -(-(size - overlap) // (tile - overlap))
    return [(start, start + tile) for start in (i * (size - tile) // (count - 1) for i in range(count))]


def ramps(cut: list[Span], scale: int) -> list[Tensor]:
    """For each span the weights of its positions, `scale` to a unit: linear across what neighbours share, sums of 1."""
    at = torch.arange(cut[-1][1] * scale) + 0.5
    rises = [torch.ones_like(at)]
    for (_, end), (start, _) in pairwise(cut):
        rises.append(((at - start * scale) / ((end - start) * scale)).clamp(0, 1))
    falls = [1 - rise for rise in rises[1:]] + [torch.ones_like(at)]
    weights = torch.stack([rise * fall for rise, fall in zip(rises, falls, strict=True)])
    weights /= weights.sum(0)  # where three tiles meet on one axis
    return [row[start * scale : end * scale] for row, (start, end) in zip(weights, cut, strict=True)]


def tiled(
    run: Callable[[Tensor, Box], Tensor], x: Tensor, tile: int | None, overlap: int, scales: tuple[int, int]
) -> Tensor:
    """`run` over tiles of `x`, blended: `(B, C, T, h*a, w*a)` -> `(B, C', T', h*b, w*b)` with `scales` (a, b).

    `tile` and `overlap` count units, of which a side of `x` has h and w. A frame that fits into a tile, or a tile of
    None, is exactly `run(x)`. Peak memory is that of `run` on one tile, and input and output whole.
    """
    a, b = scales
    height, width = x.shape[3] // a, x.shape[4] // a
    rows, columns = (spans(size, tile or size, overlap) for size in (height, width))
    if len(rows) == len(columns) == 1:
        return run(x, (0, height, 0, width))
    whole: Tensor | None = None
    kind = torch.float32
    for (top, bottom), down in zip(rows, ramps(rows, b), strict=True):
        for (left, right), across in zip(columns, ramps(columns, b), strict=True):
            made = run(x[..., top * a : bottom * a, left * a : right * a], (top, bottom, left, right))
            if whole is None:
                kind = made.dtype
                whole = made.new_zeros((*made.shape[:3], height * b, width * b), dtype=torch.float32)
            weights = (down[:, None] * across).to(made.device)
            whole[..., top * b : bottom * b, left * b : right * b] += made * weights
    assert whole is not None
    return whole.to(kind)


def stream(
    run: Callable[[Tensor, Past], Tensor],
    pieces: Iterable[Tensor],
    tile: int | None,
    overlap: int,
    scales: tuple[int, int],
) -> Iterator[Tensor]:
    """`tiled(run, piece)` of each piece, where a tile goes on from its own past; without gradients."""
    pasts: defaultdict[Box, Past] = defaultdict(Past)
    for piece in pieces:
        with torch.no_grad():
            made = tiled(lambda x, box: run(x, pasts[box]), piece, tile, overlap, scales)
        for past in pasts.values():
            past.begun = True
        yield made
