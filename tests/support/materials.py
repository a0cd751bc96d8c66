"""What a measure is given, without a dataset or a disk: clips, and what models have made, as the test says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.training import registry
from longtake.training.evaluation.material import Clip, Filled, Generated, Retrieved
from longtake.training.evaluation.subject import Subject
from longtake.training.evaluation.suite import Suite, Videos
from longtake.training.models import kind_of

FPS = 8.0


@dataclass
class Fixed:
    """A `Material` of given things."""

    suite: Suite
    held: Sequence[Clip] = ()
    copies: Sequence[Tensor] = ()
    videos: Sequence[Generated] = ()
    fills: Sequence[Filled] = ()
    recalls: Sequence[Retrieved] = ()
    networks: dict[str, Any] = field(default_factory=dict)

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


def clip(video: Tensor, unit: str = "a", number: int = 0, caption: str | None = None) -> Clip:
    """A held-out clip of pixels in [-1, 1]."""
    return Clip(unit, f"{unit}-{number}", bytes_of(video), FPS, caption)


def noise(frames: int = 17, size: tuple[int, int] = (32, 32), seed: int = 0) -> Tensor:
    """Pixels (1, 3, T, H, W) in [-1, 1], all of their own."""
    return torch.rand(1, 3, frames, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def bytes_of(video: Tensor) -> Tensor:
    return ((video + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)


def subject(module: Any, facts: dict[str, Any]) -> Subject:
    """A model that is no file."""
    return Subject("models:/x@best", "models:/x/1", "0" * 64, facts, kind_of(facts), module)


def loaded(folder: Path) -> Subject:
    """The model of a folder."""
    module, facts = registry.load_with_facts(str(folder))
    return Subject(str(folder), str(folder), "0" * 64, facts, kind_of(facts), module.eval())
