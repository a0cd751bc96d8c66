"""Footage whose picture is known: a world that a camera moves over, and what is done to it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from longtake.pipeline.scorers import load
from longtake.pipeline.scorers.scorer import Frames


def world(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W) float32 in 40..215: ground with detail of all sizes, and shapes with sharp edges."""
    rng = np.random.default_rng(seed)
    waves = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    spectrum = rng.standard_normal((height, width // 2 + 1, 2)) @ [1, 1j] / np.maximum(waves, 1 / height) ** 1.5
    ground = np.fft.irfft2(spectrum, (height, width))
    image = Image.fromarray(np.float32(128 + 20 * (ground - ground.mean()) / ground.std()))
    draw = ImageDraw.Draw(image)
    for _ in range(60):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        spots = [(x + a, y + b) for a, b in rng.uniform(-height / 8, height / 8, (4, 2))]
        draw.polygon(spots, fill=float(rng.uniform(50, 205)))
    return np.clip(np.asarray(image), 40, 215)


def pan(count: int, height: int, width: int, seed: int = 0, speed: float = 0.02) -> np.ndarray:
    """(T, H, W, 3) uint8: a camera that moves right and down by `speed` of the height a frame; 0 stands still."""
    step = speed * height
    whole = world(height + int(count * step / 2) + 2, width + int(count * step) + 2, seed)
    places = ((int(n * step / 2), int(n * step)) for n in range(count))
    grey = np.stack([whole[top : top + height, left : left + width] for top, left in places])
    return colour(grey)


def colour(grey: np.ndarray) -> np.ndarray:
    """(T, H, W) luma to (T, H, W, 3) uint8."""
    return np.repeat(np.clip(np.rint(grey), 0, 255).astype(np.uint8)[..., None], 3, axis=-1)


def written(frames: np.ndarray, text: str, left: float, top: float, tall: float, bright: int = 255) -> np.ndarray:
    """Frames with a line of text over them; where it begins and its height are shares of the picture."""
    height, width = frames.shape[1:3]
    mask = Image.new("L", (width, height), 0)
    font = ImageFont.load_default(size=round(tall * height))
    ImageDraw.Draw(mask).text((left * width, top * height), text, fill=255, font=font)
    opacity = np.asarray(mask, np.float32)[None, ..., None] / 255
    return np.asarray(frames * (1 - opacity) + bright * opacity).round().astype(np.uint8)


def looks(scorer: str, frames: np.ndarray, **settings: Any) -> Any:
    """The values of a scorer that looks, of (N, H, W, 3) frames that were never coded."""
    kind = load(scorer)
    return kind.load(kind.config.model_validate(settings), "cpu").look(frames[None])[0]  # type: ignore[union-attr]


def watched(scorer: str, luma: np.ndarray, fps: float = 24, **settings: Any) -> Any:
    """The values of a scorer that watches, of (T, H, W) uint8 luma that was never coded."""
    kind = load(scorer)
    watch = kind.load(kind.config.model_validate(settings), "cpu").begin({})  # type: ignore[union-attr]
    grey = np.full((len(luma), luma.shape[1] // 2, luma.shape[2]), 128, np.uint8)
    for first, piece in pieces(np.concatenate([luma, grey], 1), 32):
        watch.add(Frames(first, fps, piece))
    return watch.values()


def pieces(frames: np.ndarray, size: int) -> Iterator[tuple[int, np.ndarray]]:
    """The number of the first, and the frames, of each piece."""
    for first in range(0, len(frames), size):
        yield first, frames[first : first + size]
