"""The world `return`: the camera looks at coloured squares, turns away, and comes back to what must still be there.

Three squares of different colours stand in the four corners of a view, one corner is empty. The camera looks at them,
turns at an even speed along a wall, and turns back. Its path is the same in all videos that are out of sight equally
long, and the wall gets lighter away from the squares: so how the camera moves is seen in the last frames, and what it
comes back to is nowhere but in the first ones. One in five arrangements of colours is held out. With `wall: squares`
others stand along the wall too, at random: there is always something in sight that is to be remembered.
"""

from collections.abc import Iterator, Mapping
from itertools import permutations, product
from typing import Any

import numpy as np
import numpy.typing as npt

from longtake.datasets.errors import UserError
from longtake.infra.worlds import Video, World

Frames = npt.NDArray[np.uint8]
Arrangement = tuple[int | None, ...]  # by corner: the number of a colour, or None

COLOURS = {
    "red": (230, 40, 40),
    "green": (40, 190, 60),
    "blue": (50, 80, 240),
    "yellow": (240, 220, 50),
    "violet": (200, 60, 220),
    "cyan": (50, 210, 220),
}
CORNERS = ("top left", "top right", "bottom left", "bottom right")
GROUND, LIGHT = 70, 210  # grey behind the squares, and at the end of the wall
OPTIONS: Mapping[str, Any] = {"away": 6.0, "look": 2.0, "turn": 2.0, "size": 32, "fps": 4, "wall": "grey"}
_PALETTE = np.array([*COLOURS.values()], float)


def arrangements(heldout: bool) -> list[Arrangement]:
    """What stands in the corners, of all videos that are held out or of all others."""
    found = []
    for empty, colours in product(range(4), permutations(range(len(COLOURS)), 3)):
        corners: Arrangement = (*colours[:empty], None, *colours[empty:])
        code = sum((n + 1) * (0 if colour is None else colour + 1) for n, colour in enumerate(corners))
        if (code % 5 == 0) == heldout:
            found.append(corners)
    return found


def render(seed: int, heldout: bool, **options: Any) -> Video:
    """A video of the world; see `WORLD.options`.

    away    seconds without any of the corners in sight
    look    seconds that the camera looks at the squares, before and after
    turn    seconds from the squares in full view until they are out of sight
    size    pixels a side of the square picture
    fps     frames a second
    wall    grey; or squares, which stand along it too

    UserError for an option that there is none of, or for too little time or too few pixels.
    """
    if unknown := options.keys() - OPTIONS.keys():
        raise UserError(f"{min(unknown)}: the world `return` has no such option; it has {', '.join(OPTIONS)}")
    made = {**OPTIONS, **options}
    size, fps = int(made["size"]), int(made["fps"])
    if size < 16 or size % 8:
        raise UserError(f"size: is {size}; give a multiple of 8, 16 at least")
    look, turn, away = (round(made[name] * fps) for name in ("look", "turn", "away"))
    if fps < 1 or min(look, turn, away) < 1:
        raise UserError("look, turn, away: each needs one frame at least; raise it, or fps")
    if made["wall"] not in ("grey", "squares"):
        raise UserError(f"wall: is {made['wall']}; choose grey or squares")
    known, rng = arrangements(heldout), np.random.default_rng([seed, heldout])
    corners = known[int(rng.integers(len(known)))]
    path = camera(look, turn, away, size)
    others = np.full((2, 2 * int(path.max()) // size), -1)
    if made["wall"] == "squares":
        others = rng.integers(-1, len(COLOURS), others.shape)
    names = [None if colour is None else list(COLOURS)[colour] for colour in corners]
    truth = {
        "fps": fps,
        "away_seconds": away / fps,
        "corners": names,
        "camera": path.tolist(),
        "away": [look + turn - 1, look + turn - 1 + away],
        "back": len(path) - look,
    }
    squares = [f"a {name} square {corner}" for name, corner in zip(names, CORNERS, strict=True) if name]
    caption = f"{', '.join(squares)}; the camera turns away for {away / fps:g} seconds and comes back"
    empty = CORNERS[corners.index(None)]
    return Video(
        _frames(panorama(corners, others, int(path.max()), size), path),
        len(path),
        fps,
        caption,
        f"empty {empty}",
        heldout,
        truth,
    )


def camera(look: int, turn: int, away: int, size: int) -> npt.NDArray[np.int64]:
    """Pixels that the camera has turned by, a frame each, of so many frames; from `size` on no square is in sight."""
    speed = size / turn
    # `away` frames from the first at `size` or beyond to the last
    out = speed * np.arange(turn + (away + 1) // 2)
    back = out[::-1] if away % 2 == 0 else out[-2::-1]
    path = np.concatenate([np.zeros(look - 1), out, back, np.zeros(look - 1)])
    return path.round().astype(np.int64)


def _frames(scene: Frames, path: npt.NDArray[np.int64]) -> Iterator[Frames]:
    for left in path:
        yield scene[:, left : left + scene.shape[0]].copy()


def panorama(corners: Arrangement, others: npt.NDArray[np.int64], reach: int, size: int) -> Frames:
    """All that the camera can see, `(size, size + reach, 3)`: the squares, and the wall that gets lighter.

    `others` `(2, n)` are the colours of squares along the wall, which begins after the corners; -1 is none.
    """
    shade = np.full(size + reach, float(GROUND))
    shade[size:] = GROUND + (LIGHT - GROUND) * np.arange(1, reach + 1) / reach
    scene = np.broadcast_to(shade[None, :, None], (size, size + reach, 3)).round().astype(np.uint8)
    for corner, colour in enumerate(corners):
        if colour is not None:
            scene[_square(corner, size)] = _PALETTE[colour]
    rows, columns = _square(0, size)
    for (row, column), other in np.ndenumerate(others):
        if other >= 0:
            down, right = row * size // 2, size + column * size // 2
            scene[down + rows.start : down + rows.stop, right + columns.start : right + columns.stop] = _PALETTE[other]
    return scene


def _square(corner: int, size: int, margin: int = 8) -> tuple[slice, slice]:
    """Rows and columns of a corner's square, `size / margin` from the borders of its quarter of the view."""
    row, column = divmod(corner, 2)
    half, edge = size // 2, size // 2 // margin
    return slice(row * half + edge, (row + 1) * half - edge), slice(column * half + edge, (column + 1) * half - edge)


def seen(frame: Frames) -> list[str | None]:
    """By corner, the colour of which a frame `(size, size, 3)` has most there; None for grey."""
    found: list[str | None] = []
    for corner in range(4):
        middle = frame[_square(corner, frame.shape[0], 4)].reshape(-1, 3).astype(float)
        colour = np.median(middle, axis=0)
        # grey is as near to the nearest colour as to itself where half of the colour is lost
        grey = np.linalg.norm(colour - colour.mean())
        nearest = int(np.linalg.norm(_PALETTE - colour, axis=1).argmin())
        whole = np.linalg.norm(_PALETTE[nearest] - _PALETTE[nearest].mean())
        found.append(list(COLOURS)[nearest] if grey > whole / 2 else None)
    return found


def read(frames: Frames, truth: Mapping[str, Any], fps: float) -> dict[str, float]:
    """What is there when the camera is back, means over the frames `(T, size, size, 3)` of its second look.

    right    share of the squares that are in their corners in their colours
    corners  share of the corners that are empty or not as they were

    By chance 1/8 and 5/8. UserError for a video that ends before.
    """
    begin = round(truth["back"] * fps / truth["fps"])
    if len(frames) <= begin:
        raise UserError(f"the video has {len(frames)} frames; the camera is back with frame {begin}")
    rows = [seen(frame) for frame in frames[begin:]]
    right = [[here == true for here, true in zip(row, truth["corners"], strict=True) if true] for row in rows]
    filled = [
        [(here is None) == (true is None) for here, true in zip(row, truth["corners"], strict=True)] for row in rows
    ]
    return {"right": float(np.mean(right)), "corners": float(np.mean(filled))}


WORLD = World(
    "the camera turns away from coloured squares and comes back: are they there again?", render, OPTIONS, read
)
