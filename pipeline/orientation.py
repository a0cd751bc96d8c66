"""How a picture lies: the display matrix of a container or codec as one of the eight ways to show it, as ffmpeg does."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

# Whether the picture is transposed, and then mirrored left to right and top to bottom, to be shown upright.
Orientation = tuple[bool, bool, bool]
UPRIGHT: Orientation = (False, False, False)

_SHEAR = 0.05  # cosine of the angle between the axes, from which on a matrix says nothing


def orientation_of(image: Any) -> Orientation:
    """Of an av.VideoFrame. Its own `rotation` knows no mirrors, and takes zeros for a turn."""
    try:
        said = image.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV lists no side data at all where one is of a kind it does not know, such as EXIF
        return turned(image.rotation)
    return UPRIGHT if said is None else oriented(np.frombuffer(said, np.int32).tolist())


def oriented(matrix: Sequence[int]) -> Orientation:
    """The nearest way for nine numbers (a b u, c d v, x y w), where x' = ax + cy and y' = bx + dy.

    One that says nothing, of zeros or with axes at no right angle, is upright.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    lengths = math.hypot(a, b) * math.hypot(c, d)
    if not lengths or abs(a * c + b * d) > _SHEAR * lengths:
        return UPRIGHT
    transposed = abs(b) > abs(a)
    return transposed, (c if transposed else a) < 0, (b if transposed else d) < 0


def turned(degrees: int) -> Orientation:
    """By so many degrees counter-clockwise; beyond 180 is none that FFmpeg gives for a turn."""
    quarters = round(degrees / 90) % 4 if abs(degrees) <= 180 else 0
    return [UPRIGHT, (True, False, True), (False, True, True), (True, True, False)][quarters]


def between(before: Orientation, after: Orientation) -> Orientation:
    """What is left to do where a picture lies as `before` to show it as `after`."""
    plane, truths = np.arange(6).reshape(2, 3), (False, True)
    there, wanted = upright(plane, before), upright(plane, after)
    each = ((t, x, y) for t in truths for x in truths for y in truths)
    return next(o for o in each if np.array_equal(upright(there, o), wanted))


def upright(plane: np.ndarray, orientation: Orientation) -> np.ndarray:
    """A view of (H, W, ...) as it is shown."""
    transposed, flipped_x, flipped_y = orientation
    plane = plane.swapaxes(0, 1) if transposed else plane
    return plane[:: -1 if flipped_y else 1, :: -1 if flipped_x else 1]


def shown_size(width: int, height: int, sample_aspect: Fraction | None, orientation: Orientation) -> tuple[int, int]:
    """(width, height) after stretching to square pixels and turning upright."""
    if sample_aspect and sample_aspect > 0:
        width = round(width * sample_aspect)
    return (height, width) if orientation[0] else (width, height)
