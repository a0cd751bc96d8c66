"""The shapes of the windows that the clips of a split give, and which clip gives which: a batch is of one shape."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from longtake.datasets import clip


def window_shapes(
    facts: pa.Table,
    lengths: list[int],
    stride: int,
    size: tuple[int, int] | int,
    multiple: int,
    cropped: bool,
    latents: Sequence[pa.Table],
) -> tuple[list[tuple[int, int, int]], np.ndarray, np.ndarray, np.ndarray]:
    """The shapes (T, H, W) there are, for each row which it has, whether it is too short for all, and too small.

    Clips of the same shape share none where their latents differ in theirs, or, with `cropped`, the parts of their own.
    """
    counts, heights, widths = (facts[name].to_numpy() for name in ("frame_count", "height", "width"))
    spans = np.array([(t - 1) * stride + 1 for t in lengths])
    longer = sum(((counts < span).astype(np.int16) for span in spans), np.zeros(len(counts), np.int16))
    length = np.minimum(longer, np.int16(len(lengths) - 1))
    short = counts < spans[-1]
    sides = [heights, widths, *(table[name].to_numpy() for table in latents for name in ("height", "width"))]
    numbers, found = _combined(sides)
    scaled = [size if isinstance(size, tuple) else _scaled(own[0], own[1], size, multiple) for own in found]
    owns = [(_cropped(own[:2], s) if cropped else (), own[:1:-1]) for own, s in zip(found, scaled, strict=True)]
    # clips of other sizes may come to the same shape
    kinds = sorted({(s, o) for s, o in zip(scaled, owns, strict=True)})
    of_found = np.array([kinds.index(kind) for kind in zip(scaled, owns, strict=True)], np.int16)
    small = (heights < size[0]) | (widths < size[1]) if isinstance(size, tuple) else np.minimum(heights, widths) < size
    shapes = [(t, *kind) for t in lengths for kind, _ in kinds]
    return shapes, length * np.int16(len(kinds)) + of_found[numbers], short, small


def _combined(sides: Sequence[np.ndarray]) -> tuple[np.ndarray, list[tuple[int, ...]]]:
    """For each row the number of its combination of sides, which are below 65536, and the combinations."""
    # by a hash: sorting ten million takes as long as all else of opening them
    coded = _coded(sides[:4])
    numbers = coded.indices.to_numpy()
    found = [_unpacked(code, len(sides[:4])) for code in coded.dictionary.to_pylist()]
    for n in range(4, len(sides), 2):
        coded = _coded(sides[n : n + 2], numbers)
        numbers = coded.indices.to_numpy()
        found = [(*found[code >> 32], *_unpacked(code, 2)) for code in coded.dictionary.to_pylist()]
    return numbers, found


def _coded(sides: Sequence[np.ndarray], above: np.ndarray | None = None) -> pa.DictionaryArray:
    """Sides of each row in 16 bits each, lowest first, and a number above two of them."""
    code = np.zeros(len(sides[0]), np.uint64) if above is None else above.astype(np.uint64) << 32
    return pa.array(sum((side.astype(np.uint64) << 16 * n for n, side in enumerate(sides)), code)).dictionary_encode()


def _unpacked(code: int, sides: int) -> tuple[int, ...]:
    return tuple(code >> 16 * n & 0xFFFF for n in range(sides))


def _scaled(height: int, width: int, short: int, multiple: int) -> tuple[int, int]:
    """The shape of a clip with this short side, the other one rounded to `multiple`."""
    longer = max(short, round(max(height, width) * short / min(height, width) / multiple) * multiple)
    return (short, longer) if height <= width else (longer, short)


def _cropped(own: tuple[int, ...], size: tuple[int, int]) -> tuple[int, ...]:
    return clip.crop(np.empty((1, *own, 0)), size).shape[1:3]
