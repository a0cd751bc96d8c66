"""What a prior learns to generate: the latents of a column, or pixels."""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from longtake.datasets.latents import Latents
from longtake.datasets.loader import to_model
from longtake.training.engines import device
from longtake.training.metrics import trivial
from longtake.training.metrics.distance import merge, moments
from longtake.training.models.common.codec import Codec, Pixels, Posterior
from longtake.training.objective import Batch


class Target(Protocol):
    """What a prior learns to generate; chosen once, so that no loss asks which it is.

    record    of the column of latents; None for pixels
    channels, shape   of a window, (frames, height, width), as the prior sees it
    fps       frames per second of its videos
    codec     decodes it to videos
    """

    @property
    def record(self) -> Latents | None: ...

    @property
    def channels(self) -> int: ...

    @property
    def shape(self) -> tuple[int, int, int]: ...

    @property
    def fps(self) -> float: ...

    @property
    def codec(self) -> Codec: ...

    @property
    def size(self) -> tuple[int, int]:
        """Pixels of a video, height and width."""

    def columns(self, split: str) -> dict[str, Any]:
        """The options of a loader of its windows."""

    def given(self, model: Any, batch: Batch, rng: torch.Generator | None = None) -> Tensor:
        """The target, normalised by the model, fp32; without `rng` always the same."""

    def start(self, batch: Batch, rng: torch.Generator) -> Tensor:
        """0 for each window that starts its clip, whose first latent is of one frame; else another number."""

    def trivial(self, windows: Iterable[Batch]) -> tuple[trivial.Still, trivial.Gaussian]:
        """Velocities that know the mean, or the mean and variance, alone."""


@dataclass(frozen=True)
class LatentTarget:
    """Latents of a column: draws from the autoencoder's posteriors, or their means. A `Target`."""

    record: Latents
    channels: int
    shape: tuple[int, int, int]
    fps: float
    codec: Codec
    posterior: Literal["sample", "mean"]
    clip_starts: float  # share of training windows that start their clip

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1] * self.record.stride, self.shape[2] * self.record.stride

    def columns(self, split: str) -> dict[str, Any]:
        starts = {"clip_starts": self.clip_starts} if split == "train" else {}
        return {"columns": {"latent": self.record.column}, **starts}

    def given(self, model: Any, batch: Batch, rng: torch.Generator | None = None) -> Tensor:
        posterior = Posterior(*batch["latent"].float().unbind(1))
        drawn = self.posterior == "sample" and rng is not None
        latents: Tensor = model.normalise(posterior.sample(rng) if drawn else posterior.mode())
        return latents

    def start(self, batch: Batch, rng: torch.Generator) -> Tensor:
        start: Tensor = batch["start"]
        return start

    def trivial(self, windows: Iterable[Batch]) -> tuple[trivial.Still, trivial.Gaussian]:
        return trivial.unit(self.channels, torch.zeros((), device=device()))


@dataclass(frozen=True)
class PixelTarget:
    """Pixels, which look the same anywhere in a clip: whether a window starts its clip is drawn. A `Target`."""

    shape: tuple[int, int, int]
    fps: float
    clip_starts: float  # share of training windows that count as starting their clip
    codec: Codec = dataclasses.field(default_factory=Pixels)
    record: None = None
    channels: int = 3

    @property
    def size(self) -> tuple[int, int]:
        return self.shape[1:]

    def columns(self, split: str) -> dict[str, Any]:
        return {"columns": {"video": "video"}, "size": self.size}

    def given(self, model: Any, batch: Batch, rng: torch.Generator | None = None) -> Tensor:
        return to_model(batch["video"])

    def start(self, batch: Batch, rng: torch.Generator) -> Tensor:
        draws = torch.rand(len(batch["key"]), generator=rng, device=rng.device)
        return (draws >= self.clip_starts).long()

    def trivial(self, windows: Iterable[Batch]) -> tuple[trivial.Still, trivial.Gaussian]:
        total = merge(moments(to_model(batch["video"]).transpose(0, 1).flatten(1).T) for batch in windows)
        std = total.covariance().diagonal().sqrt()
        return trivial.Still(total.mean.float()), trivial.Gaussian(total.mean.float(), std.float())
