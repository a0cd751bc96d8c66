"""What readers of worlds share: colours by name, frames at another rate, and how pictures move."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

Colour = tuple[int, int, int]
Pixels = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float64]


def nearest(colour: npt.ArrayLike, names: Mapping[str, Colour]) -> str:
    """The name of the colour that is nearest to this one, 0..255."""
    return min(names, key=lambda name: float(np.linalg.norm(np.subtract(colour, names[name]))))


def moments(frames: int, fps: float, true_frames: int, true_fps: float) -> npt.NDArray[np.int64]:
    """For each frame of a video the frame of the truth that is nearest in time; those beyond its end are left out."""
    places = np.round(np.arange(frames) * true_fps / fps).astype(np.int64)
    return places[places < true_frames]


def share(right: npt.ArrayLike) -> float:
    """The share of True; 0 where there is nothing."""
    values = np.asarray(right, float)
    return float(values.mean()) if values.size else 0.0


def shifts(frames: Pixels) -> Floats:
    """How far the picture moves from each frame to the next (T - 1, 2), down and right in pixels, as if all of it moved alike.

    The least squares of the change of brightness beside its slope. It holds for steps of less than a wave of the picture.
    """
    grey = frames.astype(float).mean(-1)
    middle = (grey[1:] + grey[:-1]) / 2
    slopes = np.stack(np.gradient(middle, axis=(1, 2)), axis=-1)[:, 1:-1, 1:-1].reshape(len(middle), -1, 2)
    change = np.diff(grey, axis=0)[:, 1:-1, 1:-1].reshape(len(middle), -1, 1)
    square = slopes.transpose(0, 2, 1) @ slopes + 1e-3 * np.eye(2)
    moved: Floats = -np.linalg.solve(square, slopes.transpose(0, 2, 1) @ change)[..., 0]
    return moved
