"""What claims share that are shown in a world of moving things: its videos in memory, and recipes that learn from its files."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from torch import Tensor
from toys import Batches

from longtake.datasets.loader import to_pixels
from longtake.infra import graph, recipe, runner, runs, worlds
from longtake.infra.worlds import write

RUN = {"workers": 0, "sample_every": 0, "heldout_every": 0, "checkpoint_every": 250, "keep_checkpoints": 1}


class Clips(NamedTuple):
    """Videos of a world, `(N, 3, T, H, W)` uint8, what is to be read in each, and frames a second."""

    video: Tensor
    truths: Sequence[Mapping[str, Any]]
    fps: float


def drawn(world: str, count: int, seed: int, heldout: bool, size: int, **options: Any) -> Clips:
    """Videos of a world, drawn twice as large as `size` and scaled down."""
    render, rows, truths, fps = worlds.load(world).render, [], [], 0.0
    for number in range(count):
        video = render(seed * 1_000_000 + number, heldout, size=2 * size, **options)
        frames = np.stack(list(video.frames)).reshape(-1, size, 2, size, 2, 3).mean((2, 4))
        rows.append(frames.round().astype(np.uint8).transpose(3, 0, 1, 2))
        truths.append(video.truth)
        fps = video.fps
    return Clips(torch.from_numpy(np.stack(rows)), truths, fps)


def frames_of(video: Tensor) -> np.ndarray:
    """A video `(3, T, H, W)` in [-1, 1] as readers take it, (T, H, W, 3) uint8."""
    return to_pixels(video).permute(1, 2, 3, 0).cpu().numpy()


class Stream(Batches):
    """Random batches of windows of so many frames of videos that lie in memory."""

    def __init__(self, video: Tensor, frames: int, batch: int, seed: int) -> None:
        super().__init__(seed)
        self._video, self._frames, self._batch = video, frames, batch

    def batch(self, rng: np.random.Generator) -> dict[str, Any]:
        rows = rng.integers(len(self._video), size=self._batch).tolist()
        first = int(rng.integers(self._video.shape[2] - self._frames + 1))
        return {"video": self._video[rows, :, first : first + self._frames], "key": [str(row) for row in rows]}


def ran(folder: Path, stages: Mapping[str, Any]) -> dict[str, runs.Run]:
    """Run a recipe in a folder, whatever of it is missing, and return its stages' runs."""
    content = {"name": "claim", "workspace": str(folder.absolute() / "runs"), "stages": dict(stages)}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(content))
    resolved = graph.pin(recipe.load(str(folder / "recipe.yaml")))
    runner.run(resolved, runner.Choice(), lambda line: print(line, flush=True))
    store = runs.connect(resolved)
    return {node.name: done for node in graph.build(resolved) if (done := runner.finished(node, store))}


def sharded(folder: Path, world: str, count: int, size: int, seconds: tuple[float, float], **options: Any) -> Any:
    """A world's videos in `folder`, with what it holds out in `val`, and the stage that makes clips of so many seconds of them."""
    write.generate(folder / "footage", world, count, size=size, **options)
    fps = (worlds.load(world).options | options)["fps"]
    rules = {"short_side": size, "fps": fps, "aspects": ["1:1"], "crf": 6}
    rules |= {"min_seconds": seconds[0], "max_seconds": seconds[1]}
    sources = [str(folder.absolute() / "footage" / "captions.jsonl")]
    return {"kind": "shard", "sources": sources, "clip": rules, "val_fraction": 0.2}
