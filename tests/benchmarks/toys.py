"""What ablations of video models share: sprites, generated footage, and a stream of batches of both, 16 pixels a side.

Sprites are shapes of a colour that move evenly over a grey ground, and may turn once; they come in again on the other side.
Pairs of shape and colour are held out. Footage is photographs under a moving camera, of which videos are held out whole.
"""

import math
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor

from longtake.datasets.loader import Loader
from longtake.infra import footage, graph, recipe, runner, runs

SIZE, DRAWN = 16, 32  # pixels of frames, and of sprites as they are drawn
FPS, SPAN = 12, 28  # frames of a second, and of windows of footage
SHAPES, COLOURS, DIRECTIONS = 4, 6, 8
HUES = ((230, 60, 50), (60, 200, 70), (70, 90, 240), (230, 210, 60), (210, 70, 220), (60, 210, 220))

Draw = Callable[[int, int, int], Tensor]  # count, frames, seed -> sprites to train on


class Sprites(NamedTuple):
    """Videos `(N, 3, T, 16, 16)` uint8, and the shape, colour and first direction of each, `(N,)`."""

    video: Tensor
    shape: Tensor
    colour: Tensor
    direction: Tensor


def mask_of(shape: int) -> np.ndarray:
    """A shape of about 14 pixels in the middle, 0..1."""
    y, x = np.mgrid[:DRAWN, :DRAWN] - (DRAWN - 1) / 2
    inside = {
        0: np.maximum(abs(x), abs(y)) < 7,
        1: np.hypot(x, y) < 7.5,
        2: (np.minimum(abs(x), abs(y)) < 3) & (np.maximum(abs(x), abs(y)) < 8),
        3: (np.hypot(x, y) < 8) & (np.hypot(x, y) > 4),
    }
    return inside[shape].astype(np.float32)


def sprites(
    count: int,
    frames: int,
    seed: int,
    heldout: bool,
    speeds: tuple[float, float] = (0.5, 0.75),
    turns: tuple[int, int] | None = None,
) -> Sprites:
    """Sprites, drawn twice as large and scaled down. A shape has one colour that is held out.

    Args:
        speeds: least and most pixels a frame, as drawn; half of that is seen.
        turns: the first frame that each may turn at, by a quarter or three eighths of a circle, and one after the last;
            None: they go straight on.
    """
    rng, video, labels = np.random.default_rng(seed), np.empty((count, 3, frames, DRAWN, DRAWN), np.float32), []
    masks = [mask_of(shape) for shape in range(SHAPES)]

    def way(direction: int) -> np.ndarray:
        angle = 2 * math.pi * direction / DIRECTIONS
        return np.array([math.sin(angle), math.cos(angle)])

    for clip in video:
        shape, direction = int(rng.integers(SHAPES)), int(rng.integers(DIRECTIONS))
        colour = shape if heldout else int((shape + rng.integers(1, COLOURS)) % COLOURS)
        speed = rng.uniform(*speeds)
        start, ground = rng.uniform(0, DRAWN, 2), rng.uniform(60, 130)
        slope = np.mgrid[:DRAWN, :DRAWN].transpose(1, 2, 0) @ rng.uniform(-1, 1, 2)
        shade = ground + slope[None]
        turn, later = frames, direction
        if turns:
            turn, later = int(rng.integers(*turns)), direction + int(rng.choice([-3, -2, 2, 3]))
        for frame in range(frames):
            first = min(frame, turn)
            place = start + first * speed * way(direction) + (frame - first) * speed * way(later)
            y, x = place.round().astype(int)
            mask = np.roll(masks[shape], (y, x), (0, 1))
            clip[:, frame] = np.where(mask, np.array(HUES[colour])[:, None, None], shade)
        labels.append((shape, colour, direction))
    small = video.reshape(count, 3, frames, SIZE, 2, SIZE, 2).mean((4, 6))
    return Sprites(torch.from_numpy(small.astype(np.uint8)), *torch.tensor(labels).unbind(1))


def prepare(out: Path, videos: int, name: str, side: int = DRAWN, span: int = SPAN) -> str:
    """Footage and shards of clips of so many pixels a side and at least so many frames, whatever is missing; the dataset."""
    footage.generate(out / "footage", videos, seconds=24, fps=FPS, size=(2 * side, 2 * side))
    rules = {"short_side": side, "fps": FPS, "aspects": ["1:1"], "crf": 8}
    rules |= {"min_seconds": span / FPS, "max_seconds": 10}
    stages = {
        "shards": {"kind": "shard", "sources": [str(out / "footage" / "*.mp4")], "clip": rules, "val_fraction": 0.3}
    }
    content = {"name": name, "workspace": str(out / "runs"), "stages": stages}
    (out / "recipe.yaml").write_text(yaml.safe_dump(content))
    resolved = graph.pin(recipe.load(str(out / "recipe.yaml")))
    runner.run(resolved, runner.Choice(), lambda line: print(line, flush=True))
    (node,) = graph.build(resolved)
    done = runner.finished(node, runs.connect(resolved))
    assert done
    return str(done.uri)


def filmed(dataset: str, split: str, count: int, stride: int = 1) -> Tensor:
    """Random windows of every `stride`-th frame of the footage, `(count, 3, SPAN, 16, 16)` uint8."""
    window: dict[str, Any] = {"columns": ("video",), "frames": SPAN, "size": (SIZE, SIZE), "crop": "random"}
    window |= {"stride": stride}
    loader = Loader(dataset, split, batch=8, last="pad", seed=0, **window)
    return torch.cat([batch["video"] for batch in islice(loader, math.ceil(count / 8))])[:count]


class Batches:
    """A stream of batches, each drawn with random numbers of its own; it can go on where it stopped."""

    def __init__(self, seed: int) -> None:
        self._seed, self._batches = seed, 0

    def batch(self, rng: np.random.Generator) -> dict[str, Any]:
        """One batch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            rng = np.random.default_rng([self._seed, self._batches])
            self._batches += 1
            yield self.batch(rng)

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._batches = state["batches"]


class Mixture(Batches):
    """Batches a quarter of which are windows of footage and the others sprites, of so many frames."""

    def __init__(self, windows: Tensor, draw: Draw, frames: int, batch: int, seed: int) -> None:
        super().__init__(seed)
        self._windows, self._draw, self._frames, self._batch = windows, draw, frames, batch

    def batch(self, rng: np.random.Generator) -> dict[str, Any]:
        rows, first = rng.integers(len(self._windows), size=self._batch // 4), rng.integers(SPAN - self._frames + 1)
        films = self._windows[rows, :, first : first + self._frames]
        moving = self._draw(self._batch - len(rows), self._frames, int(rng.integers(1 << 40)))
        return {"video": torch.cat([moving, films]), "key": [str(n) for n in range(self._batch)]}


class Rows(Batches):
    """Random rows that lie in memory, by the name that they have in a batch."""

    def __init__(self, name: str, rows: Tensor, batch: int, seed: int) -> None:
        super().__init__(seed)
        self._name, self._rows, self._batch = name, rows, batch

    def batch(self, rng: np.random.Generator) -> dict[str, Any]:
        drawn = rng.integers(len(self._rows), size=self._batch)
        return {self._name: self._rows[drawn], "key": [str(row) for row in drawn.tolist()]}
