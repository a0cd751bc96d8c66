"""Bodies that move by a law: what comes follows from the first frames. For predictive autoencoders and their priors.

A disc of one colour moves over a plain grey ground. It bounces off the walls, falls and bounces, or is pulled to the middle
in proportion to its distance, so that it orbits. Pairs of a colour and a direction, and of a speed and a direction, are held
out: a quarter of them. Lengths are in pixels, y grows downwards.

The reader finds bodies by their colour, as patches that differ from the ground, and takes the law's path that is nearest.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage, optimize

from longtake.datasets.errors import UserError
from longtake.infra.worlds import Video, World

LAWS = ("bounce", "fall", "orbit")
COLOURS = {
    "red": (230, 60, 50),
    "green": (60, 200, 70),
    "blue": (70, 90, 240),
    "yellow": (230, 210, 60),
    "pink": (210, 70, 220),
    "cyan": (60, 210, 220),
}
DIRECTIONS = ("right", "down right", "down", "down left", "left", "up left", "up", "up right")
SPEEDS = ((0.02, 0.03), (0.03, 0.04), (0.04, 0.05), (0.05, 0.06))  # sides of the picture in a frame
WORDS = ("slowly", "at a walk", "quickly", "very quickly")
DEFAULTS: dict[str, Any] = {"law": "bounce", "size": 32, "frames": 17, "fps": 8, "radius": 0.11}
GRAVITY, PULL = 0.004, 0.03  # sides a frame^2; of the distance a frame^2
SEEN = 40.0  # in grey levels: how far a body's colour is from the ground
SHARE = 0.25  # of a body's pixels: less is a speck
NEAR = 0.05  # sides: how near a law's path counts as following it
LEAST = SPEEDS[0][0] / 2  # sides a frame, over a video: what moves less stands still, which no law forbids

Floats = npt.NDArray[np.float64]


class Found(NamedTuple):
    """What the reader finds: the number of bodies in each frame (T,), and the largest's place (T, 2) as x, y; NaN without."""

    bodies: npt.NDArray[np.int64]
    places: Floats


def path(law: str, place: Floats, velocity: Floats, frames: int, radius: float) -> Floats:
    """Places (frames, 2) of a body's middle, in sides of the picture, from its first place and its velocity a frame."""
    t = np.arange(frames)[:, None]
    if law == "orbit":
        rate = math.sqrt(PULL)
        return 0.5 + (place - 0.5) * np.cos(rate * t) + velocity / rate * np.sin(rate * t)
    straight = _folded(place + velocity * t, radius)
    if law == "bounce":
        return straight
    return np.stack([straight[:, 0], _fallen(place[1], velocity[1], frames, 1 - radius)], 1)


def _folded(line: Floats, radius: float) -> Floats:
    """Places on a line as walls reflect them that a body touches at so many sides from its middle."""
    span = 1 - 2 * radius
    return radius + span - np.abs((line - radius) % (2 * span) - span)


def _fallen(height: float, speed: float, frames: int, floor: float) -> Floats:
    """y (frames,) of a body that falls and loses nothing where it hits the floor; there is no ceiling."""
    # time since the bounce before the first frame, and the speed that each bounce has
    bounce = math.sqrt(max(speed**2 + 2 * GRAVITY * max(floor - height, 0.0), 1e-12))
    since = (bounce + speed) / GRAVITY
    t = (since + np.arange(frames)) % (2 * bounce / GRAVITY)
    return floor - bounce * t + GRAVITY * t**2 / 2


def render(seed: int, heldout: bool, **options: Any) -> Video:
    """A body. Its first place is drawn until it stays in the picture.

    Options: law; size, pixels a side, even; frames; fps; radius, in sides.
    """
    asked = DEFAULTS | options
    law, size, frames, radius = asked["law"], asked["size"], asked["frames"], asked["radius"]
    fits = size >= 16 and not size % 2 and frames >= 1 and asked["fps"] >= 1 and 0.05 <= radius <= 0.2
    if law not in LAWS or not fits:
        rules = f"law is one of {', '.join(LAWS)}, size even and >= 16, frames and fps >= 1, radius 0.05 to 0.2"
        raise UserError(f"physics: {rules}; got {asked}")
    rng = np.random.default_rng([seed, heldout])
    while True:
        colour, direction, speed = (int(rng.integers(len(table))) for table in (COLOURS, DIRECTIONS, SPEEDS))
        apart = (colour + direction) % 4 == 0 or (speed + direction) % 4 == 1
        angle = 2 * math.pi * (direction + rng.uniform(-0.5, 0.5)) / len(DIRECTIONS)
        velocity = rng.uniform(*SPEEDS[speed]) * np.array([math.cos(angle), math.sin(angle)])
        places = path(law, rng.uniform(radius, 1 - radius, 2), velocity, frames, radius)
        if apart == heldout and places.min() >= radius - 1e-9 and places.max() <= 1 - radius + 1e-9:
            break
    name, ground = list(COLOURS)[colour], float(rng.uniform(30, 80))
    moves = {"bounce": "bounces off the walls", "fall": "falls and bounces", "orbit": "orbits the middle"}[law]
    caption = f"a {name} disc {moves}; at first it moves {DIRECTIONS[direction]}, {WORDS[speed]}"
    truth = {
        "law": law,
        "radius": radius,
        "colour": name,
        "direction": DIRECTIONS[direction],
        "speed": speed,
        "ground": ground,
        "places": (places * size).round(3).tolist(),
        "velocities": (np.gradient(places, axis=0) * size).round(3).tolist() if frames > 1 else [[0.0, 0.0]],
    }
    stream = drawn(places * size, np.array(COLOURS[name], float), ground, size, radius * size)
    return Video(stream, frames, asked["fps"], caption, law, heldout, truth)


def drawn(places: Floats, colour: Floats, ground: float, size: int, radius: float) -> Iterator[npt.NDArray[np.uint8]]:
    """Frames (size, size, 3) of a disc, soft at its edge."""
    y, x = np.indices((size, size)) + 0.5
    for place in places:
        inside = np.clip(radius - np.hypot(x - place[0], y - place[1]) + 0.5, 0, 1)[..., None]
        yield np.rint(ground + inside * (colour - ground)).astype(np.uint8)


def find(frames: npt.NDArray[np.uint8], radius: float) -> Found:
    """Bodies, of a radius in sides, in frames (T, H, W, 3)."""
    size = frames.shape[1]
    bodies, places = np.zeros(len(frames), int), np.full((len(frames), 2), math.nan)
    least = SHARE * math.pi * (radius * size) ** 2
    for t, frame in enumerate(frames.astype(float)):
        ground = np.median(frame.reshape(-1, 3), 0)
        weight = np.abs(frame - ground).max(-1)
        patches, count = ndimage.label(weight > SEEN)
        areas = ndimage.sum_labels(np.ones_like(weight), patches, range(1, count + 1)) if count else np.zeros(0)
        bodies[t] = int((areas >= least).sum())
        if bodies[t]:
            mine = weight * (patches == 1 + int(np.argmax(areas)))
            y, x = np.indices(mine.shape) + 0.5
            places[t] = (mine * x).sum() / mine.sum(), (mine * y).sum() / mine.sum()
    return Found(bodies, places)


def off_law(law: str, places: Floats, radius: float) -> float:
    """The root mean squared distance, in sides, of found places (T, 2), in sides, to the law's path that is nearest them.

    The first place and velocity of that path are fitted from several guesses. NaN where fewer than three places are found.
    """
    seen = np.isfinite(places).all(1)
    if seen.sum() < 3:
        return math.nan
    t = np.flatnonzero(seen)

    def error(start: Floats) -> Floats:
        return (path(law, start[:2], start[2:], len(places), radius)[seen] - places[seen]).ravel()

    best, limits = math.inf, ([-0.2] * 2 + [-0.15] * 2, [1.2] * 2 + [0.15] * 2)
    for first, last in ((0, 2), (0, min(4, len(t) - 1)), (len(t) // 2, len(t) // 2 + 1)):
        velocity = (places[t[last]] - places[t[first]]) / (t[last] - t[first])
        guess = np.concatenate([places[t[first]] - velocity * t[first], velocity])
        fitted = optimize.least_squares(error, np.clip(guess, *np.array(limits) * 0.999), bounds=limits, loss="linear")
        best = min(best, float(np.sqrt(2 * np.mean(fitted.fun**2))))
    return best


def read(frames: npt.NDArray[np.uint8], truth: Mapping[str, Any], fps: float) -> dict[str, float]:
    """Figures of a video, lengths in sides of the picture. Of a generated one `truth` is law and radius alone.

    one        share of the frames with exactly one body
    moved      mean distance from a place to the next
    off_law    root mean squared distance to the law's nearest path; 1 where there are not three places, or the body stands
    follows    1 where all frames have one body and that distance is at most NEAR, else 0
    off        mean distance to the true places, where `truth` has them; a frame without a body counts 1
    """
    size = frames.shape[1]
    found = find(frames, truth["radius"])
    one = float((found.bodies == 1).mean())
    far = off_law(truth["law"], found.places / size, truth["radius"])
    steps = np.hypot(*np.diff(found.places[np.isfinite(found.places).all(1)] / size, axis=0).T)
    moved = float(steps.mean()) if steps.size else 0.0
    far = 1.0 if math.isnan(far) or moved < LEAST else far
    figures = {"one": one, "moved": moved, "off_law": far, "follows": float(one == 1.0 and far <= NEAR)}
    if "places" in truth:
        true = np.array(truth["places"])[: len(frames)]
        apart = np.hypot(*(found.places[: len(true)] - true).T) / size
        figures["off"] = float(np.where(np.isfinite(apart), apart, 1.0).mean())
    return figures


WORLD = World("does the future follow from the first frames?", render, DEFAULTS, read)
