"""A texture that goes by for ever and never repeats: videos may be made longer than any clip of a training.

It is a sum of waves whose lengths have no common measure, seen by a camera that goes one way at an even pace. What comes in
at the border is of the same kind as what goes out, so a model can go on without end, and any joint or decay shows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.infra.worlds import Video, World
from longtake.infra.worlds.seen import Colour, Floats, Pixels, share, shifts

PALETTES: dict[str, tuple[Colour, Colour]] = {
    "fire": ((70, 10, 30), (250, 190, 60)),
    "sea": ((10, 30, 90), (120, 230, 220)),
    "moss": ((20, 50, 20), (200, 220, 90)),
    "dusk": ((50, 20, 80), (240, 150, 170)),
}
# waves as (turns a side down, right): golden ratio and square roots, so that no shift brings all of them back
PATTERNS: dict[str, tuple[tuple[float, float], ...]] = {
    "waves": ((1.618, 0.414), (0.732, -1.303), (-0.445, 1.118), (2.236, 0.303)),
    "stripes": ((0.302, 1.931), (-0.193, 1.236), (0.414, 1.618), (0.113, 0.707)),
    "spots": ((1.732, 0.193), (0.236, 1.684), (1.303, 1.193), (-1.265, 1.118)),
}
WAYS = {
    "right": (0, 1), "down right": (1, 1), "down": (1, 0), "down left": (1, -1),
    "left": (0, -1), "up left": (-1, -1), "up": (-1, 0), "up right": (-1, 1),
}  # fmt: skip


class Look(NamedTuple):
    """What is to be seen in a video: the texture, and the way that it moves."""

    pattern: str
    palette: str
    way: str

    @property
    def caption(self) -> str:
        """In words."""
        return f"{self.pattern} in the colours of {self.palette} move {self.way}"


LOOKS = [Look(*values) for values in product(PATTERNS, PALETTES, WAYS)]


def heldout(look: Look) -> bool:
    """Whether a combination is in no training video. Each of its attributes is, and so is each pair of them."""
    numbers = list(PATTERNS).index(look.pattern), list(PALETTES).index(look.palette), list(WAYS).index(look.way)
    return sum(numbers) % 5 == 0


def render(seed: int, heldout: bool, *, size: int = 32, frames: int = 64, fps: int = 12, pace: float = 0.02) -> Video:
    """A video of this world.

    Args:
        size: pixels of a side.
        pace: how far the texture moves from frame to frame, as a share of a side, a third more or less by the seed.

    Raises:
        UserError: the pace is not above 0 and at most 0.06, where waves could no longer be told from their own way back.
    """
    if not 0 < pace <= 0.06:
        raise UserError(f"pace must be above 0 and at most 0.06 of a side, got {pace}")
    rng = np.random.default_rng([seed, heldout])
    some = [each for each in LOOKS if _heldout(each) == heldout]
    look = some[int(rng.integers(len(some)))]
    phases = 2 * np.pi * rng.random(4)
    step = _unit(look.way) * pace * rng.uniform(0.67, 1.33)
    truth = {**look._asdict(), "fps": fps, "frames": frames, "step": step.tolist()}
    truth["contrast"] = float(np.std(next(_drawn(look, phases, step, size, 1)).mean(-1)))
    return Video(
        _drawn(look, phases, step, size, frames), frames, fps, look.caption, look.pattern, _heldout(look), truth
    )


_heldout = heldout  # which an argument of `render` hides


def _unit(way: str) -> Floats:
    return np.array(WAYS[way]) / np.linalg.norm(WAYS[way])


def _drawn(look: Look, phases: Floats, step: Floats, size: int, frames: int) -> Iterator[Pixels]:
    waves = np.array(PATTERNS[look.pattern])
    grid = (np.moveaxis(np.indices((size, size)), 0, -1) + 0.5) / size
    dark, bright = (np.array(colour, float) for colour in PALETTES[look.palette])
    for frame in range(frames):
        turns = (grid - frame * step) @ waves.T
        height = np.cos(2 * np.pi * turns + phases).sum(-1) / 2
        light = (1 + np.tanh(height)[..., None]) / 2
        yield (dark + light * (bright - dark)).round().astype(np.uint8)


class Seen(NamedTuple):
    """What a reader makes of a video: the palette and the way that are nearest, the latter None where nothing moves.

    stains   how far colours are from those between the two of each palette, as shares of the way from black to white
    moved    how far the picture moves from each frame to the next (T - 1, 2), as shares of the sides
    """

    palette: str
    way: str | None
    stains: Mapping[str, float]
    moved: Floats


def look_at(frames: Pixels) -> Seen:
    """What is to be seen in a video (T, H, W, 3), without knowing what should be."""
    pixels = frames.astype(float)
    stains = {name: _stain(pixels, *palette) for name, palette in PALETTES.items()}
    moved = shifts(frames) / np.array(frames.shape[1:3]) if len(frames) > 1 else np.zeros((0, 2))
    way = _ways(moved.mean(0)[None])[0] if len(moved) else None
    return Seen(min(stains, key=stains.__getitem__), way, stains, moved)


def read(frames: Pixels, truth: Mapping[str, Any], fps: float) -> dict[str, float]:
    """Figures of a video (T, H, W, 3) uint8, of its beginning or any stretch.

    palette   whether the colours are nearer to the right palette than to the others, 1 or 0
    stained   how far colours are from those between the two of the palette, 0..1
    way       whether it moves the right way on the whole, of 8: 1 or 0
    steady    the share of frames from which it goes on the right way
    pace      how fast it moves, beside how fast it should
    contrast  how far its brightness spreads, beside how far it should
    """
    seen, step = look_at(frames), np.array(truth["step"]) * truth["fps"] / fps
    whole = seen.moved.mean(0) if len(seen.moved) else np.zeros(2)
    spread = frames.astype(float).mean(-1).std((1, 2)).mean()
    return {
        "palette": float(seen.palette == truth["palette"]),
        "stained": seen.stains[truth["palette"]],
        "way": float(seen.way == truth["way"]),
        "steady": share([way == truth["way"] for way in _ways(seen.moved)]),
        "pace": float(whole @ step / (step @ step)),
        "contrast": float(spread / truth["contrast"]),
    }


def _stain(pixels: Floats, dark: Colour, bright: Colour) -> float:
    """The mean distance of pixels from the colours between two, as a share of the way from black to white."""
    low, way = np.array(dark, float), np.subtract(bright, dark).astype(float)
    light = np.clip((pixels - low) @ way / (way @ way), 0, 1)
    return float(np.linalg.norm(pixels - low - light[..., None] * way, axis=-1).mean() / (255 * np.sqrt(3)))


def _ways(moved: Floats) -> list[str | None]:
    """The nearest of the 8 ways of each step (N, 2); None where there is none."""
    names = list(WAYS)
    nearest = (moved @ np.stack([_unit(name) for name in names]).T).argmax(1)
    return [names[n] if step.any() else None for n, step in zip(nearest, moved, strict=True)]


WORLD = World(
    "a texture that goes by for ever and never repeats: does a video go on as it began, without joints and decay?",
    render,
    {"size": 32, "frames": 64, "fps": 12, "pace": 0.02},
    read,
)
