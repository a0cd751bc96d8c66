"""The orientation of a picture: the display matrix of a container or codec as one of eight ways to show it, as ffmpeg does."""

import math
from collections.abc import Sequence
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np

# How to show a picture upright: whether it is transposed, and then mirrored left to right and top to bottom.
Orientation = tuple[bool, bool, bool]
UPRIGHT: Orientation = (False, False, False)

_SHEAR = 0.05  # a matrix means nothing where the cosine of the angle between its axes is larger


def orientation_of(image: Any) -> Orientation:
    """The orientation of an av.VideoFrame, whose `rotation` knows no mirrors, and reads zeros as a turn."""
    try:
        matrix = image.side_data.get("DISPLAYMATRIX")
    except ValueError:
        # PyAV lists no side data at all where one is of a kind that it does not know, such as EXIF
        return turned(image.rotation)
    return UPRIGHT if matrix is None else oriented(np.frombuffer(matrix, np.int32).tolist())


def oriented(matrix: Sequence[int]) -> Orientation:
    """The orientation nearest to nine numbers (a b u, c d v, x y w), where x' = ax + cy and y' = bx + dy.

    A matrix of zeros, or whose axes are at no right angle, is upright.
    """
    a, b, c, d = matrix[0], matrix[1], matrix[3], matrix[4]
    lengths = math.hypot(a, b) * math.hypot(c, d)
    if not lengths or abs(a * c + b * d) > _SHEAR * lengths:
        return UPRIGHT
    transposed = abs(b) > abs(a)
    return transposed, (c if transposed else a) < 0, (b if transposed else d) < 0


def turned(degrees: int) -> Orientation:
    """The orientation of a picture turned by `degrees` counter-clockwise; upright beyond 180, which FFmpeg never gives."""
    quarters = round(degrees / 90) % 4 if abs(degrees) <= 180 else 0
    return [UPRIGHT, (True, False, True), (False, True, True), (True, True, False)][quarters]


def between(before: Orientation, after: Orientation) -> Orientation:
    """The orientation that takes a picture shown by `before` to the picture shown by `after`."""
    plane, either = np.arange(6).reshape(2, 3), (False, True)
    start, goal = upright(plane, before), upright(plane, after)
    orientations = product(either, either, either)
    return next(o for o in orientations if np.array_equal(upright(start, o), goal))


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
