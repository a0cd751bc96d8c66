"""Material of an evaluation whose videos are tensors: for tests of measures alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.training.evaluation.material import Clip, Generated
from longtake.training.evaluation.suite import Clips, Suite, Videos
from longtake.training.metrics.classifier import Classifier
from longtake.training.metrics.features import FeatureNetwork

FPS = 8.0


class Material(NamedTuple):
    """The doors of `material.Material` that measures of generated videos use."""

    suite: Suite
    held_out: Sequence[Clip]
    made: Sequence[Generated]
    networks: dict[str, Any]

    def clips(self) -> Iterator[Clip]:
        return iter(self.held_out)

    def generated(self, subject: Any, videos: Videos) -> Iterator[Generated]:
        return iter(self.made)

    def features(self, name: str = "features") -> FeatureNetwork:
        network: FeatureNetwork = self.networks[name]
        return network

    def classifier(self) -> Classifier:
        classifier: Classifier = self.networks["classifier"]
        return classifier

    def perceptual(self) -> Any:
        return self.networks["perceptual"]

    def folder(self, name: str) -> str:
        return str(self.networks[name])


def suite(frames: int = 4, length: int = 4, chunk: int = 4, resamples: int = 100, **fields: Any) -> Suite:
    """Clips of so many frames, and videos of a length."""
    clips = Clips(frames=frames, fps=FPS)
    return Suite(clips=clips, videos=(Videos(frames=length),), chunk=chunk, resamples=resamples, **fields)


def clips(videos: Sequence[Tensor], units: Sequence[str] | None = None) -> list[Clip]:
    """Held-out clips of videos (3, T, H, W) uint8; each is its own source where nothing else is said."""
    names = units or [f"source-{number:03d}" for number in range(len(videos))]
    return [
        Clip(name, f"clip-{n}", video[None], FPS, None)
        for n, (name, video) in enumerate(zip(names, videos, strict=True))
    ]


def generated(
    videos: Sequence[Tensor], prompts: Sequence[str] | None = None, joints: Sequence[int] = (), piece: int | None = None
) -> list[Generated]:
    """Generated videos (3, T, H, W) uint8; `piece` cuts what `frames` gives into other pieces than are asked for."""

    def frames(video: Tensor, chunk: int = 16) -> Iterator[Tensor]:
        return iter(video[None].split(piece or chunk, 2))

    found = []
    for number, video in enumerate(videos):
        key, prompt = f"video-{number:03d}", prompts[number] if prompts else None
        length = video.shape[1]
        found.append(
            Generated(prompt or key, key, number, prompt, length, partial(frames, video), joints, 0.0, f"{key}.mp4")
        )
    return found


def noise(count: int, frames: int = 4, size: int = 8, seed: int = 0, low: int = 0, high: int = 256) -> list[Tensor]:
    """Random videos (3, T, H, W) uint8."""
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randint(low, high, (count, 3, frames, size, size), generator=rng, dtype=torch.uint8))


def network(name: str, videos: Callable[[Tensor], Tensor] | None = None, **fields: Any) -> FeatureNetwork:
    """A network of videos: a function of levels (B, 3, T, H, W) in 0..255."""
    return FeatureNetwork(name, name, "bytes", None, videos=videos, **fields)


def corners(levels: Tensor) -> Tensor:
    """Features of videos: the means of 4 corners of the first and of the last frame, in 0..1, (B, 24)."""
    ends = levels[:, :, [0, -1]] / 255
    return torch.nn.functional.adaptive_avg_pool3d(ends, (2, 2, 2)).flatten(1)


def colours(levels: Tensor) -> Tensor:
    """Logits of three classes: which colour there is most of."""
    return levels.mean((2, 3, 4)) / 16


def judge() -> Classifier:
    """A classifier by `colours`."""
    return Classifier("colours", "colours", 3, "logits", colours)
