"""What a measure is given, without a dataset or a disk: clips, and what models have made, as the test says."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from longtake.training import registry
from longtake.training.evaluation.material import Clip, Filled, Generated, Retrieved
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite, Videos
from longtake.training.metrics.classifier import Classifier
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.models import kind_of

FPS = 8.0


class Fixed(NamedTuple):
    """A `Material` of given things."""

    suite: Suite
    held: Sequence[Clip] = ()
    videos: Sequence[Generated] = ()
    networks: Mapping[str, Any] = {}
    copies: Sequence[Tensor] = ()
    fills: Sequence[Filled] = ()
    recalls: Sequence[Retrieved] = ()

    def clips(self) -> Iterator[Clip]:
        yield from self.held

    def reconstructed(self, subject: Subject) -> Iterator[tuple[Clip, Tensor]]:
        yield from zip(self.held, self.copies, strict=True)

    def generated(self, subject: Subject, videos: Videos) -> Iterator[Generated]:
        yield from self.videos

    def filled(self, subject: Subject) -> Iterator[Filled]:
        yield from self.fills

    def retrieved(self, subject: Subject) -> Iterator[Retrieved]:
        yield from self.recalls

    def close(self) -> None:
        pass

    def generator(self, subject: Subject) -> Any:
        return self.networks["generator"]

    def infiller(self, subject: Subject) -> Any:
        return self.networks["infiller"]

    def retriever(self, subject: Subject) -> Any:
        return self.networks["retriever"]

    def features(self, name: str = "features") -> Any:
        return self.networks[name]

    def classifier(self) -> Any:
        return self.networks["classifier"]

    def perceptual(self) -> Any:
        return self.networks["perceptual"]

    def embedder(self) -> Any:
        return self.networks["embedder"]

    def folder(self, name: str) -> str:
        return str(self.networks[name])


def suite(**changes: Any) -> Suite:
    """A suite whose rate is known, as a material's is."""
    clips = {"fps": FPS} | changes.pop("clips", {})
    return Suite(**{"clips": clips, "resamples": 100} | changes)


def short(frames: int = 4, length: int = 4, chunk: int = 4, **changes: Any) -> Suite:
    """The same with clips of so many frames, and videos of a length."""
    return suite(clips={"frames": frames}, videos=(Videos(frames=length),), chunk=chunk, **changes)


def clip(video: Tensor, unit: str = "a", number: int = 0, caption: str | None = None) -> Clip:
    """A held-out clip of pixels in [-1, 1]."""
    return Clip(unit, f"{unit}-{number}", bytes_of(video), FPS, caption)


def clips(videos: Sequence[Tensor], units: Sequence[str] | None = None) -> list[Clip]:
    """Held-out clips of videos (3, T, H, W) uint8; each is its own source where nothing else is said."""
    names = units or [f"source-{number:03d}" for number in range(len(videos))]
    return [
        Clip(name, f"clip-{n}", video[None], FPS, None)
        for n, (name, video) in enumerate(zip(names, videos, strict=True))
    ]


def generated(
    videos: Sequence[Tensor],
    prompts: Sequence[str] | None = None,
    joints: Sequence[int] = (),
    piece: int | None = None,
    every: int = 1,
) -> list[Generated]:
    """Generated videos (3, T, H, W) uint8.

    Args:
        piece: cuts what `frames` gives into other pieces than are asked for.
        every: how many frames show one of the model's.
    """

    def frames(video: Tensor, chunk: int = 16) -> Iterator[Tensor]:
        return iter(video[None].split(piece or chunk, 2))

    found = []
    for number, video in enumerate(videos):
        key, prompt = f"video-{number:03d}", prompts[number] if prompts else None
        length = video.shape[1]
        found.append(
            Generated(
                prompt or key,
                key,
                number,
                prompt,
                length,
                partial(frames, video),
                joints,
                range(0, length, every),
                0.0,
                f"{key}.mp4",
            )
        )
    return found


def noise(frames: int = 17, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    """Pixels (1, 3, T, H, W) in [-1, 1], all of their own."""
    return torch.rand(1, 3, frames, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def noisy(count: int, frames: int = 4, size: int = 8, seed: int = 0, low: int = 0, high: int = 256) -> list[Tensor]:
    """Random videos (3, T, H, W) uint8."""
    rng = torch.Generator().manual_seed(seed)
    return list(torch.randint(low, high, (count, 3, frames, size, size), generator=rng, dtype=torch.uint8))


def bytes_of(video: Tensor) -> Tensor:
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


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


def subject(module: Any, facts: dict[str, Any]) -> Subject:
    """A model that is no file."""
    return Subject("models:/x@best", "models:/x/1", "0" * 64, facts, kind_of(facts), module)


def loaded(folder: Path) -> Subject:
    """The model of a folder."""
    module, facts = registry.load_with_facts(str(folder))
    return Subject(str(folder), str(folder), "0" * 64, facts, kind_of(facts), module.eval())
