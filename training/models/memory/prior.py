"""A registered model with a memory and its autoencoder, in frames, seconds and names: what generates or retrieves by it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.models.common import codec as codecs
from longtake.training.models.common.codec import Posterior, frames_of, latent_groups, latents_of, nearest_lengths
from longtake.training.models.common.condition import Condition, of_classes
from longtake.training.models.generator import Request, Settings, fields_of
from longtake.training.models.memory import segments
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.history import posterior_of
from longtake.training.registry import disk

Stage = Literal["generation", "retrieval"]
_KINDS = {"generation": "finetune_memory_prior", "retrieval": "pretrain_memory"}


ACCEPTS = frozenset({"class", "start", "storyboard", "history_noise"})


@dataclass(frozen=True)
class MemoryPrior:
    """A registered `memory_dit` with the codec that makes videos of its latents, and encodes what it remembers.

    A `Generator` if it was trained to generate. `classes` are the names of its classes in the order of their ids,
    `frames` those of a video's first segment, `fps` and `size` (height, width) those of what it has learned from;
    `digest` is of all weights.
    """

    model: MemoryDiT
    codec: Any
    classes: Sequence[str]
    frames: int
    fps: float
    size: tuple[int, int]
    settings: Settings
    digest: str
    posterior: Literal["sample", "mean"] = "mean"  # what of each latent it has learned
    accepts: frozenset[str] = ACCEPTS

    @property
    def _factor(self) -> int:
        return int(self.codec.config.temporal_stride)

    def latents(self, frames: int, start: Posterior | None = None) -> int:
        """The number of latents of so many new frames. ValueError where no latents are of so many."""
        if start is None:
            return latents_of(frames, self._factor)
        factor = self._factor
        if frames < 1 or frames % factor:
            low = max(1, frames // factor) * factor
            raise ValueError(
                f"frames is {frames}; going on from a video makes {factor}n frames, such as {low} or {low + factor}"
            )
        return frames // factor

    def frames_of_seconds(self, seconds: float, fps: float, start: Posterior | None = None) -> int:
        if start is None:
            return codecs.frames_of_seconds(seconds, fps, self._factor)
        return max(1, math.ceil((seconds * fps - 1e-6) / self._factor)) * self._factor

    def rounds(self, frames: int, settings: Settings, start: Posterior | None = None) -> int:
        return segments.segments(self.model, self.latents(frames, start)) * settings.steps

    def holds(self, frames: int) -> int:
        """How many of so many frames a memory takes at once: 1 + 4n that make whole groups of latents; 0 for too few."""
        group = self.model.config.group
        most = max(group, self.model.config.history)
        count = min(latent_groups(frames, self._factor), most) // group * group if frames > 0 else 0
        return frames_of(count, self._factor) if count else 0

    def begin(self, frames: Iterable[np.ndarray]) -> Posterior:
        """What the autoencoder says, `(1, C, T, h, w)`, of the end of a video `(H, W, 3)` uint8, as much as a segment can know of.

        UserError where it is too short to go on from.
        """
        config = self.model.config
        most = frames_of(max(config.history, config.window, 1), self._factor)
        end = deque(frames, maxlen=most)
        least = frames_of(max(config.window, 1), self._factor)
        if len(end) < least:
            raise UserError(f"has {len(end)} frames at {self.fps:g} a second; the model goes on from {least} or more")
        count = self.holds(len(end))
        if count < least:
            count = nearest_lengths(len(end), self._factor)[0]
        return posterior_of(self.codec, video_of(np.stack(list(end)[-count:])))

    def videos(
        self,
        requests: Sequence[Request],
        frames: int,
        settings: Settings,
        *,
        fps: float | None = None,
        start: Posterior | None = None,
        folder: str | None = None,
        tile: int | None = None,
        each_step: Callable[[], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """See `Generator.videos`, and `segments.generate`. All requests' stories change at the same times.

        What a film goes on from is drawn as in training, by each request's own seed.
        """
        seeds = [request.seed for request in requests]
        beats: dict[int, Condition] = {}
        for number, (at, _) in enumerate(requests[0].story):
            frame = math.ceil(at * (fps or self.fps) - 1e-6)
            begins = -(-frame // self._factor) if start is None else frame // self._factor
            beats[begins] = of_classes(request.story[number][1] for request in requests)
        if not any(condition.asks for condition in beats.values()):
            # with nothing asked for guidance has no effect
            settings = replace(settings, guidance=1.0)
        return segments.generate(
            self.model,
            self.codec,
            self.latents(frames, start),
            seeds,
            start=None if start is None else segments.drawn(start, seeds, self.posterior),
            story=list(beats.items()),
            settings=settings,
            folder=folder,
            models=self.digest,
            tile=tile,
            each_step=each_step,
        )

    def forget(self, folder: str) -> None:
        segments.forget(folder)


def load_prior(uri: str, stage: Stage, vae: str | None = None, dtype: torch.dtype = torch.float32) -> MemoryPrior:
    """A model of the registry or of a model folder, on the GPU where there is one.

    Args:
        stage: what it is for.
        vae: decode by this autoencoder and not by the one that the model names; its encoder must be the same.

    Raises:
        UserError: no such model; it has no memory, or is for something else; the autoencoder is another one.
        Failure: the store cannot be reached; or a model is damaged.
    """
    return prior_of(uri, *registry.load_with_facts(uri), stage, vae, dtype)


def generator_of(uri: str, model: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> MemoryPrior:
    """`load_prior` of a model that is loaded, to generate by it."""
    return prior_of(uri, model, facts, "generation", vae, dtype)


def prior_of(
    uri: str, model: Any, facts: Mapping[str, Any], stage: Stage, vae: str | None, dtype: torch.dtype
) -> MemoryPrior:
    """`load_prior` of a model that is loaded."""
    if not isinstance(model, MemoryDiT):
        raise UserError(f"{uri}: is a {type(model).__name__}, which has no memory; name a `{_KINDS[stage]}` model")
    if facts["stage"] != stage:
        raise UserError(f"{uri}: has been trained for {facts['stage']}, not {stage}; name a `{_KINDS[stage]}` model")
    codec, digest = codecs.decoder_of(uri, facts["vae"], vae)
    return MemoryPrior(
        model.to(device(), dtype),
        codec.to(device(), dtype),
        **fields_of(facts),
        digest=f"{disk.digest(facts)} {digest}",
        posterior=facts.get("posterior", "mean"),
    )


def video_of(frames: np.ndarray) -> Tensor:
    """Frames `(t, H, W, 3)` uint8 -> `(1, 3, t, H, W)` uint8."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]
