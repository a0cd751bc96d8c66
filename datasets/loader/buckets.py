"""The shape of each clip's window, and buckets: the samples of one shape, which share batches."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa

from longtake.datasets import clip
from longtake.datasets.errors import UserError
from longtake.datasets.loader import order
from longtake.datasets.loader.window import Window


@dataclass(frozen=True)
class Shapes:
    """The shapes of the windows of a split's N clips; for clips of no window the shape of a shorter or smaller one."""

    size: tuple[int, int] | int  # as it was asked for
    shapes: list[tuple[int, int, int]]  # (T, H, W); several are equal where other columns differ
    numbers: np.ndarray  # (N,) each clip's place in `shapes`
    short: np.ndarray  # (N,) bool: clips shorter than all windows
    small: np.ndarray  # (N,) bool: clips smaller than `size`
    latents: list[tuple[int, int]]  # of each shape (h, w) in the first column of latents or tokens; (0, 0) without one


@dataclass(frozen=True)
class Bucket:
    """The samples of one shape."""

    window: Window
    batch: int  # samples in a global batch
    rows: np.ndarray  # their row numbers in the split, rising
    weights: np.ndarray | None  # how often each row comes; None: once an epoch
    samples: int  # in an epoch; as many as rows where there are no weights
    latent: tuple[int, int] = (0, 0)  # (h, w) in the first column of latents or tokens


def window_shapes(
    facts: pa.Table,
    lengths: list[int],
    stride: int,
    size: tuple[int, int] | int,
    multiple: int,
    cropped: bool,
    codes: Sequence[pa.Table],
) -> Shapes:
    """The shape of each clip's window: the longest of `lengths` (falling) that it fills, at `size`.

    Clips of one window shape are told apart where the shapes of their latents or tokens differ, or with `cropped` those of the parts
    that a crop takes of them.
    """
    counts, heights, widths = (facts[name].to_numpy() for name in ("frame_count", "height", "width"))
    spans = np.array([(t - 1) * stride + 1 for t in lengths])
    length = np.zeros(len(counts), np.int16)
    for span in spans[:-1]:
        length += counts < span
    short = counts < spans[-1]

    sides = [heights, widths, *(table[name].to_numpy() for table in codes for name in ("height", "width"))]
    numbers, combinations = _combined(sides)
    sizes = [size if isinstance(size, tuple) else _scaled(c[0], c[1], size, multiple) for c in combinations]
    parts = [_cropped(c[:2], scaled) if cropped else () for c, scaled in zip(combinations, sizes, strict=True)]
    # clips of several sizes may have the same shape
    kinds = [(scaled, (part, c[:1:-1])) for scaled, part, c in zip(sizes, parts, combinations, strict=True)]
    distinct = sorted(set(kinds))
    number_of = {kind: number for number, kind in enumerate(distinct)}
    # images of arbitrary sizes have many shapes; few take half the memory of a row
    dtype = np.int16 if len(distinct) * len(lengths) <= np.iinfo(np.int16).max else np.int32
    kind_numbers = np.array([number_of[kind] for kind in kinds], dtype)

    small = (heights < size[0]) | (widths < size[1]) if isinstance(size, tuple) else np.minimum(heights, widths) < size
    shapes = [(t, *scaled) for t in lengths for scaled, _ in distinct]
    latents = [(sides[-1], sides[-2]) if codes else (0, 0) for _, (_, sides) in distinct] * len(lengths)
    return Shapes(size, shapes, length * dtype(len(distinct)) + kind_numbers[numbers], short, small, latents)


def make_buckets(
    keep: np.ndarray,
    weights: np.ndarray | None,
    shapes: Shapes,
    window: Window,
    batch: int,
    pixels: int | None,
    ranks: int,
    positions: int | None = None,
    factor: int = 1,
) -> list[Bucket]:
    """A bucket for each shape of the rows that take part.

    Args:
        keep: (N,) bool, the rows that take part; `weights` (N,) say how often each comes.
        window: what the windows of all shapes have in common.
        batch: samples in a global batch, without `pixels`.
        pixels: the most T * H * W pixels in a global batch, whose samples are a multiple of `ranks`.
        positions: the most positions of latents in a global batch of `batch` samples at most, a multiple of `ranks`; a
            window of T frames has 1 + (T - 1) / `factor` latents.

    Raises:
        UserError: `pixels` or `positions` hold no batch of some shape.
    """
    numbers = np.flatnonzero(np.bincount(shapes.numbers[keep])).tolist()
    rows_of = [np.flatnonzero(keep & (shapes.numbers == number)).astype(np.int32) for number in numbers]
    # a shape's part of the epoch is that of its clips' weights
    parts = [len(rows) if weights is None else float(weights[rows].sum()) for rows in rows_of]
    buckets = []
    for number, rows, samples in zip(numbers, rows_of, order.shares(parts, int(keep.sum())).tolist(), strict=True):
        t, h, w = shapes.shapes[number]
        if pixels is not None and not (batch := pixels // (t * h * w) // ranks * ranks):
            raise UserError(f"pixels: {pixels} hold no {ranks} windows of {t}x{h}x{w}; raise it")
        own, latent = replace(window, frames=t, size=(h, w)), shapes.latents[number]
        each = math.prod(latent) * (1 + (t - 1) // factor)
        share = batch if positions is None else _share(batch, positions, each, ranks)
        buckets.append(Bucket(own, share, rows, None if weights is None else weights[rows], samples, latent))
    return buckets


def _share(batch: int, positions: int, each: int, ranks: int) -> int:
    """The most windows of `each` positions in a global batch. Raises UserError where a rank would have none."""
    if not (fitting := positions // each // ranks * ranks):
        raise UserError(
            f"positions: {positions // ranks} a process hold no window of {each} positions of latents; raise it, or lower"
            " `frames` or the size of the latents"
        )
    return min(batch, fitting)


def batch_counts(buckets: list[Bucket], world: int, last: order.Last, where: str) -> list[int]:
    """The batches of each bucket in an epoch. Raises UserError where there are none in all."""
    counts = [order.batch_count(b.samples, b.batch, last) for b in buckets]
    if not sum(counts):
        fullest = max(buckets, key=lambda b: b.samples / b.batch)
        order.check_batch(fullest.samples, fullest.batch, world, last, where)
    return counts


def _combined(sides: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """For each row the number of its combination of sides, which are below 65536, and the combinations."""
    # hashed: sorting ten million rows takes as long as everything else in opening them
    coded = _coded(sides[:4])
    numbers = coded.indices.to_numpy()
    combinations = [_unpacked(code, len(sides[:4])) for code in coded.dictionary.to_pylist()]
    for n in range(4, len(sides), 2):
        coded = _coded(sides[n : n + 2], numbers)
        numbers = coded.indices.to_numpy()
        combinations = [(*combinations[code >> 32], *_unpacked(code, 2)) for code in coded.dictionary.to_pylist()]
    return numbers, combinations


def _coded(sides: Sequence[np.ndarray], above: np.ndarray | None = None) -> pa.DictionaryArray:
    """Sides of each row in 16 bits each, lowest first, and a number above two of them."""
    # two sides, the common case, in half the memory and time
    kind = np.dtype(np.uint32 if above is None and len(sides) <= 2 else np.uint64)
    code = sides[0].astype(kind)
    shifted = np.empty_like(code)
    shifts = [(16 * n, side) for n, side in enumerate(sides[1:], 1)]
    for bits, side in shifts if above is None else [*shifts, (32, above)]:
        # in place: each array more is as large as all that is made here
        np.left_shift(side, bits, out=shifted, dtype=kind, casting="unsafe")
        code |= shifted
    return pa.array(code).dictionary_encode()


def _unpacked(code: int, sides: int) -> tuple[int, ...]:
    return tuple(code >> 16 * n & 0xFFFF for n in range(sides))


def _scaled(height: int, width: int, short: int, multiple: int) -> tuple[int, int]:
    """The shape of a clip with this short side, the other one rounded to `multiple`."""
    longer = max(short, round(max(height, width) * short / min(height, width) / multiple) * multiple)
    return (short, longer) if height <= width else (longer, short)


def _cropped(height_width: tuple[int, ...], size: tuple[int, int]) -> tuple[int, ...]:
    return clip.crop(np.empty((1, *height_width, 0)), size).shape[1:3]
