"""A ball that bounces and rings: when it falls back to the floor, and what colour it has, can be heard.

How high it is thrown and which tone rings at the floor are drawn anew each time, so neither is to be guessed from the frames
before. A video that fits its sound has the ball on the floor when it rings, in the colour of the tone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from longtake.datasets.errors import UserError
from longtake.infra.worlds import Video, World
from longtake.infra.worlds.seen import Floats, Pixels, moments, nearest, share

COLOURS = {"red": (220, 40, 40), "green": (20, 150, 50), "blue": (50, 70, 230)}
TONES = {"red": 300.0, "green": 900.0, "blue": 2700.0}  # Hz
RATE = 16_000  # samples a second
LEAST, MOST = 6, 14  # frames of a flight, at 12 a second
FLOOR, RISE, RADIUS = 0.78, 0.56, 0.2  # of the ball's centre on the floor, its highest above that, and its radius
NEAR = 2  # frames around a bounce in which colours are not read


def render(seed: int, heldout: bool, *, size: int = 32, frames: int = 36, fps: int = 12) -> Video:
    """A video of this world with its sound. Held out is a place of the ball and a light of the ground that go together.

    Raises:
        UserError: the frames are too small, or fewer than a flight has.
    """
    if size < 16 or frames < MOST:
        raise UserError(f"the world of sound needs {MOST} frames of 16 pixels or more, got {frames} of {size}")
    rng = np.random.default_rng([seed, heldout])
    bounces, names = [-int(rng.integers(0, LEAST))], [str(rng.choice(list(COLOURS)))]
    while bounces[-1] < frames:
        bounces.append(bounces[-1] + int(rng.integers(LEAST, MOST + 1)))
        names.append(str(rng.choice([name for name in COLOURS if name != names[-1]])))
    flight = np.searchsorted(bounces, np.arange(frames), side="right") - 1
    starts, ends = np.array(bounces)[flight], np.array(bounces)[flight + 1]
    along = (np.arange(frames) - starts) / (ends - starts)
    heights = (
        4 * along * (1 - along) * ((ends - starts) / MOST) ** 2
    )  # all fall alike: twice as long is four times as high
    # both halves of the places, and of the lights, are learned; only together they are held out
    half = int(rng.integers(2))
    place = rng.uniform(0.3, 0.5) + 0.2 * half
    # brighter than any ball, or a change of its colour would look like a cut
    light = int(rng.integers(170, 195)) + 25 * (half if heldout else 1 - half)
    tones = [names[each] for each in flight]
    truth = {
        "fps": fps, "tones": tones, "heights": heights.tolist(), "place": place,
        "bounces": [each for each in bounces if 0 <= each < frames],
    }  # fmt: skip
    caption = "a ball bounces and rings, and changes its colour at each bounce"
    samples = _rung(bounces, names, frames, fps, rng)
    drawn = _drawn(heights, tones, place, light, size)
    return Video(drawn, frames, fps, caption, "bounces", heldout, truth, (samples, RATE))


def _rung(
    bounces: list[int], names: list[str], frames: int, fps: int, rng: np.random.Generator
) -> npt.NDArray[np.float32]:
    """A click at each bounce, with a tone that fades until the next one."""
    samples = np.zeros(frames * RATE // fps)
    loud = rng.uniform(0.4, 0.7)
    for begin, end, name in zip(bounces, bounces[1:], names, strict=False):
        first, last = begin * RATE // fps, min(end * RATE // fps, len(samples))
        time = (np.arange(max(first, 0), last) - first) / RATE
        tone = np.sin(2 * np.pi * TONES[name] * time) * np.exp(-time / 0.7)
        click = rng.normal(0, 0.5, len(time)) * np.exp(-time / 0.01)
        samples[max(first, 0) : last] = loud * np.clip(tone + click, -1.3, 1.3)
    return samples.astype(np.float32)


def _drawn(heights: Floats, tones: list[str], place: float, light: int, size: int) -> Iterator[Pixels]:
    grid = (np.moveaxis(np.indices((4 * size, 4 * size)), 0, -1) + 0.5) / (4 * size)
    for height, tone in zip(heights, tones, strict=True):
        centre = (FLOOR - RISE * height, place)
        cover = (np.linalg.norm(grid - centre, axis=-1) < RADIUS).reshape(size, 4, size, 4).mean((1, 3))[..., None]
        yield (cover * np.array(COLOURS[tone]) + (1 - cover) * light).round().astype(np.uint8)


def read(frames: Pixels, truth: Mapping[str, Any], fps: float) -> dict[str, float]:
    """Figures of a video (T, H, W, 3) uint8 beside the sound that it should fit.

    colour   the share of frames whose ball has the colour of the tone, of those `NEAR` frames or more from a bounce
    bounce   the share of bounces that are heard at which, give or take a frame, the ball is lowest of 9 frames
    height   how well its height goes with the true one, as their correlation; 0 where it does not move
    """
    index = moments(len(frames), fps, len(truth["tones"]), truth["fps"])
    pixels = frames[: len(index)].astype(float)
    colourful = np.clip(pixels.max(-1) - pixels.min(-1) - 40, 0, None)
    weights = colourful + 1e-9
    rows = (np.arange(pixels.shape[1]) + 0.5) / pixels.shape[1]
    heights = (FLOOR - (weights.sum(2) * rows).sum(1) / weights.sum((1, 2))) / RISE
    means = (pixels * weights[..., None]).sum((1, 2)) / weights.sum((1, 2))[:, None]
    there = colourful.max((1, 2)) > 0
    true = np.array(truth["heights"])[index]
    bounces = np.array(truth["bounces"]) * fps / truth["fps"]
    away = np.array([np.abs(bounces - n).min(initial=np.inf) > NEAR for n in range(len(index))])
    right = [
        bool(ball) and nearest(mean, COLOURS) == truth["tones"][n]
        for ball, mean, n in zip(there, means, index, strict=True)
    ]
    low = []
    for bounce in np.round(bounces).astype(int):
        around = heights[max(bounce - 4, 0) : bounce + 5]
        if 4 <= bounce < len(heights) - 4:
            low.append(abs(int(around.argmin()) - 4) <= 1 and around.max() - around.min() > 0.1)
    moved = heights.std() > 1e-6 and true.std() > 0
    return {
        "colour": share(np.array(right)[away]),
        "bounce": share(low),
        "height": float(np.corrcoef(heights, true)[0, 1]) if moved else 0.0,
    }


WORLD = World(
    "a ball that bounces and rings: is it on the floor when it rings, and in the colour of the tone?",
    render,
    {"size": 32, "frames": 36, "fps": 12},
    read,
)
