"""A body that does one thing and then another: who it is can be seen at all times, and when it turns only in the middle.

So a model that fills a gap in the middle must bring the one action over into the other and keep the body as it was. With
`actions: 1` the body goes straight on, and the caption says all that there is: whether a prompt steers can be read off.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import product
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.infra.worlds import Video, World
from longtake.infra.worlds.seen import Floats, Pixels, moments, nearest, share

COLOURS = {"red": (220, 40, 40), "yellow": (230, 220, 50), "white": (235, 235, 235), "cyan": (60, 210, 220)}
GROUNDS = {"black": (16, 16, 16), "blue": (30, 40, 130), "green": (25, 95, 45)}
SHAPES = {"square": (1.0, 1.0), "tall bar": (1.0, 0.5), "wide bar": (0.5, 1.0)}  # height and width, as shares
ACTIONS = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
OPPOSITE = {"left": "right", "right": "left", "up": "down", "down": "up"}


class Look(NamedTuple):
    """What is to be seen in a video: the body, what it does first, and the ground."""

    shape: str
    colour: str
    action: str
    ground: str

    def caption(self, then: str | None = None) -> str:
        """In words; `then` is what it does later."""
        later = f", then {then}," if then else ""
        return f"a {self.colour} {self.shape} moves {self.action}{later} on a {self.ground} background"


LOOKS = [Look(*values) for values in product(SHAPES, COLOURS, ACTIONS, GROUNDS)]


def heldout(look: Look) -> bool:
    """Whether a combination is in no training video. Each of its attributes is, and so is each pair of them."""
    names = list(SHAPES), list(COLOURS), list(ACTIONS), list(GROUNDS)
    return sum(some.index(value) for some, value in zip(names, look, strict=True)) % 5 == 0


def render(
    seed: int,
    heldout: bool,
    *,
    size: int = 32,
    frames: int = 20,
    fps: int = 8,
    actions: int = 2,
) -> Video:
    """A video of this world.

    Args:
        size: pixels of a side.
        actions: 2: another one begins in the middle fifth of the video; 1: there is only one.

    Raises:
        UserError: there is no such number of actions, or the frames are too small or too few.
    """
    if actions not in (1, 2):
        raise UserError(f"actions must be 1 or 2, got {actions}")
    if size < 16 or frames < 5:
        raise UserError(f"the world of actions needs 5 frames of 16 pixels or more, got {frames} of {size}")
    rng = np.random.default_rng([seed, heldout])
    some = [each for each in LOOKS if _heldout(each) == heldout]
    look = some[int(rng.integers(len(some)))]
    then, turn = None, frames
    if actions == 2:
        then = str(rng.choice([action for action in ACTIONS if action != look.action]))
        turn = int(rng.integers(-(-frames * 2 // 5), frames * 3 // 5))
    doing = [look.action if frame < turn else then or look.action for frame in range(frames)]

    radius = rng.uniform(0.19, 0.235) * size
    longest = max(turn - 1, frames - turn) if then else frames - 1
    pace = min(rng.uniform(0.031, 0.039) * size, (size - 2 * radius - 3) / longest)
    steps = pace * np.array([ACTIONS[each] for each in doing[1:]], float)
    way = np.concatenate([np.zeros((1, 2)), np.cumsum(steps, axis=0)])
    low, high = radius + 1 - way.min(0), size - radius - 2 - way.max(0)
    places = rng.uniform(low, np.maximum(low, high)) + way  # of the centre; it stays inside
    sides = radius * np.array(SHAPES[look.shape])
    truth = {
        **look._asdict(), "then": then, "turn": turn, "fps": fps, "doing": doing,
        "places": (places / size).tolist(), "area": float(np.prod(2 * sides)) / size**2,
    }  # fmt: skip
    label = f"{look.action} {then}" if then else look.action
    return Video(_drawn(look, places, sides, size), frames, fps, look.caption(then), label, _heldout(look), truth)


_heldout = heldout  # which an argument of `render` hides


def _drawn(look: Look, places: Floats, sides: Floats, size: int) -> Iterator[Pixels]:
    """Frames of a box, with edges finer than pixels."""
    grid = np.arange(4 * size) / 4 + 1 / 8
    for place in places:
        rows, columns = ((np.abs(grid - place[n]) <= sides[n]).reshape(size, 4).mean(1) for n in range(2))
        cover = (rows[:, None] * columns)[..., None]
        picture = cover * np.array(COLOURS[look.colour]) + (1 - cover) * np.array(GROUNDS[look.ground])
        yield picture.round().astype(np.uint8)


class Seen(NamedTuple):
    """What a reader makes of a video. Attributes of the body are None where some frame has none.

    cover    how much of each pixel is of the body (T, H, W), 0..1
    places   centres of the body (T, 2), as shares of the sides; NaN where there is none
    """

    shape: str | None
    colour: str | None
    action: str | None
    ground: str
    cover: Floats
    places: Floats


def look_at(frames: Pixels) -> Seen:
    """What is to be seen in a video (T, H, W, 3), without knowing what should be: `action` is where it goes on the whole.

    The ground is the median colour, and the body what differs from it. Pixels at its edges are mixed with the ground, so its
    colour is that of those which differ most, and its sides are measured by how much of that colour each pixel has.
    """
    pixels, side = frames.astype(float), np.array(frames.shape[1:3])
    ground = np.median(pixels.reshape(-1, 3), axis=0)
    difference = np.linalg.norm(pixels - ground, axis=-1)
    differs = difference > 60
    cover, places = np.zeros(frames.shape[:3]), np.full((len(frames), 2), np.nan)
    name = nearest(ground, GROUNDS)
    if not differs.any():
        return Seen(None, None, None, name, cover, places)
    colour = nearest(np.median(pixels[difference > 0.8 * difference.max()], axis=0), COLOURS)
    towards = np.array(COLOURS[colour]) - ground
    cover = np.clip((pixels - ground) @ towards / (towards @ towards), 0, 1)
    cover[cover < 0.15] = 0
    grid = np.stack([axis + 0.5 for axis in np.indices(frames.shape[1:3])], axis=-1)
    for frame in np.flatnonzero(differs.sum((1, 2)) >= 4):
        places[frame] = np.average(grid.reshape(-1, 2), axis=0, weights=differs[frame].ravel()) / side
    if np.isnan(places).any():
        return Seen(None, None, None, name, cover, places)
    moved = places[-1] - places[0]
    action = max(ACTIONS, key=lambda each: float(moved @ ACTIONS[each])) if moved.any() else None
    ratio = np.median([np.log(max(each.max(1).sum(), 1e-3) / max(each.max(0).sum(), 1e-3)) for each in cover])
    shape = min(SHAPES, key=lambda each: abs(np.log(np.divide(*SHAPES[each])) - ratio))
    return Seen(shape, colour, action, name, cover, places)


def read(frames: Pixels, truth: Mapping[str, Any], fps: float) -> dict[str, float]:
    """Figures of a video (T, H, W, 3) uint8, of its beginning or with `part` of any stretch.

    shape, colour, ground   whether each is right, 1 or 0
    action    the share of what it does, by actions, that goes the right way
    identity  the share of frames with one body as large as it should be and right in shape and colour
    off       how far its centre is from where it should be, as a share of a side; half a side where there is no body
    all       whether all attributes and actions are right
    """
    index = moments(len(frames), fps, len(truth["doing"]), truth["fps"])
    seen = look_at(frames[: len(index)])
    doing = np.array(truth["doing"])[index]
    ways = []
    for action in dict.fromkeys(doing.tolist()):
        places = seen.places[doing == action]
        if len(places) > 1:
            moved = places[-1] - places[0]  # NaN, and so wrong, where there is no body
            ways.append(bool(np.isfinite(moved).all()) and _way(moved) == action)
    off = np.linalg.norm(seen.places - np.array(truth["places"])[index], axis=1)
    areas = (seen.cover > 0.7).mean((1, 2)) / truth["area"]
    right = {
        "shape": seen.shape == truth["shape"],
        "colour": seen.colour == truth["colour"],
        "ground": seen.ground == truth["ground"],
    }
    each = [_alike(cover, str(truth["shape"])) for cover in seen.cover]
    figures = {name: float(value) for name, value in right.items()}
    figures["action"] = share(ways)
    figures["identity"] = share((areas > 0.5) & (areas < 1.6) & np.array(each)) * figures["colour"]
    figures["off"] = float(np.where(np.isfinite(off), np.minimum(off, 0.5), 0.5).mean())
    return figures | {"all": float(all(right.values()) and all(ways))}


def _way(moved: Floats) -> str | None:
    return max(ACTIONS, key=lambda each: float(moved @ ACTIONS[each])) if moved.any() else None


def _alike(cover: Floats, shape: str) -> bool:
    """Whether what a frame is covered by (H, W) is nearer to this shape than to the others."""
    if not cover.any():
        return False
    ratio = np.log(cover.max(1).sum() / cover.max(0).sum())
    return min(SHAPES, key=lambda each: abs(np.log(np.divide(*SHAPES[each])) - ratio)) == shape


def part(truth: Mapping[str, Any], first: int, last: int) -> dict[str, Any]:
    """The truth of frames first <= t < last."""
    return {**truth, "doing": truth["doing"][first:last], "places": truth["places"][first:last]}


WORLD = World(
    "a body that does one thing and then another: is it the same body throughout, and does it do both?",
    render,
    {"size": 32, "frames": 20, "fps": 8, "actions": 2},
    read,
)
