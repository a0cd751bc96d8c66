"""Worlds: generated footage with ground truth, each made for one question, so that small models can answer it.

A world is a file here and a line in `WORLDS`. It has `WORLD`: what its videos show and what is held out.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

WORLDS: dict[str, str] = {  # name -> module
    "actions": "longtake.infra.worlds.actions",
    "endless": "longtake.infra.worlds.endless",
    "physics": "longtake.infra.worlds.physics",
    "return": "longtake.infra.worlds.returning",
    "sound": "longtake.infra.worlds.sound",
}


class Video(NamedTuple):
    """A video of a world, a pure function of its seed.

    frames    uint8 RGB (T, H, W, 3), drawn as they are read
    length    how many
    fps       of them
    caption   what is to be seen, in words
    label     its class
    heldout   whether it is of a combination that no training may see
    truth     what readers are compared with, as plain data: per video and per frame
    sound     samples (n,) in [-1, 1] and their rate, or None
    """

    frames: Iterator[npt.NDArray[np.uint8]]
    length: int
    fps: int
    caption: str
    label: str
    heldout: bool
    truth: Mapping[str, Any]
    sound: tuple[npt.NDArray[np.float32], int] | None = None


class World(NamedTuple):
    """A world.

    what     a line for people: the question that it is for
    render   `render(seed, heldout, **options)`: a video; `heldout` chooses among the combinations
    options  names of options and their defaults, such as the seconds that something is out of sight
    read     `read(frames, truth, fps)`: figures of a video (T, H, W, 3) uint8 by a reader that knows the truth and no model,
             such as whether a colour is right, how far a position is off, or how well a law is followed
    """

    what: str
    render: Callable[..., Video]
    options: Mapping[str, Any]
    read: Callable[[npt.NDArray[np.uint8], Mapping[str, Any], float], dict[str, float]]


def load(name: str) -> World:
    """The world of this name."""
    world: World = importlib.import_module(WORLDS[name]).WORLD
    return world
