"""Footage whose motion is known, since it was made so."""

from __future__ import annotations

import cv2
import numpy as np


def scene(size: int = 1024, seed: int = 0) -> np.ndarray:
    """(size, size, 3) uint8 RGB with detail of every size."""
    rng = np.random.default_rng(seed)
    total = np.zeros((size, size, 3), np.float32)
    for cells in (8, 24, 72, 216):
        detail = rng.standard_normal((cells, cells, 3)).astype(np.float32)
        total += cv2.resize(detail, (size, size), interpolation=cv2.INTER_CUBIC) * (8 / cells) ** 0.5
    return np.clip(128 + 55 * total, 0, 255).astype(np.uint8)


def film(
    picture: np.ndarray,
    seconds: np.ndarray,
    height: int,
    width: int,
    pan: float | np.ndarray = 0.0,
    tilt: float | np.ndarray = 0.0,
    zoom: float = 0.0,
    roll: float = 0.0,
) -> np.ndarray:
    """What a camera sees of a picture at some times: (T, height, width, 3) uint8.

    Where `pan` to the right and `tilt` upwards are numbers they are speeds, else the camera's places at those times, all in the
    shorter side of what it sees; `zoom` is the growth a second (natural logarithm), `roll` the turn of what it sees, clockwise,
    in degrees a second.
    """
    side = min(height, width)
    right, up = (part * seconds if isinstance(part, float) else part for part in (pan, tilt))
    frames = []
    for second, x, y in zip(seconds, right * side, -up * side, strict=True):
        turn, scale = np.radians(roll * second), np.exp(-zoom * second) * len(picture) / 3 / side
        # a point of the frame, seen from its middle, is this point of the picture
        linear = scale * np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
        middle, target = np.array([width, height]) / 2 - 0.5, np.array([len(picture) / 2 - 0.5] * 2)
        offset = target + len(picture) / 3 / side * np.array([x, y]) - linear @ middle
        matrix = np.concatenate([linear, offset[:, None]], 1)
        flags = cv2.INTER_AREA | cv2.WARP_INVERSE_MAP
        frames.append(cv2.warpAffine(picture, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_WRAP))
    return np.stack(frames)
