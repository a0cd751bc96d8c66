"""A registered model with a memory and its autoencoder: generation and retrieval in frames, seconds and class names."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.models.common import codec as codecs
from longtake.training.models.common import parts
from longtake.training.models.common import prompts as texts
from longtake.training.models.common import story as scenes
from longtake.training.models.common.codec import Posterior, frames_of, latent_groups, latents_of, nearest_lengths
from longtake.training.models.common.prompts import Prompts
from longtake.training.models.generator import Request, Settings, fields_of
from longtake.training.models.memory import segments
from longtake.training.models.memory.history import posterior_of
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.retrieval import AT_ONCE, learned_at_once
from longtake.training.registry import disk

Stage = Literal["generation", "retrieval"]
_KINDS = {"generation": "finetune_memory_prior", "retrieval": "pretrain_memory"}
ACCEPTS = frozenset({"class", "start", "storyboard", *segments.SETTINGS})


@dataclass(frozen=True)
class MemoryPrior:
    """A registered `memory_dit` with the codec that decodes its latents and encodes what it remembers.

    A `Generator` if it was trained to generate.

    classes    names in the order of their ids
    frames     of a video's first segment
    fps, size  of the videos that it has learned from; (height, width) in pixels
    settings   of sampling, by default; their `steps` are the solver's, as in the registered files
    digest     of all weights
    posterior  what of each latent it has learned
    prompts    the encoder of its texts; None for a model without
    pooled     that of a vector of each text, for a model that takes such
    at_once    latents that it retrieves together
    """

    model: MemoryModel
    codec: Any
    classes: Sequence[str]
    frames: int
    fps: float
    size: tuple[int, int]
    settings: Settings
    digest: str
    posterior: Literal["sample", "mean"] = "mean"
    accepts: frozenset[str] = ACCEPTS
    prompts: Prompts | None = None
    pooled: Prompts | None = None
    at_once: int = AT_ONCE

    @property
    def _factor(self) -> int:
        return int(self.codec.config.temporal_stride)

    def latents(self, frames: int, start: Posterior | None = None) -> int:
        """The number of latents of `frames` new frames. ValueError where no whole number of latents makes these."""
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
        """The least number of new frames, in whole latents, that last `seconds`."""
        if start is None:
            return codecs.frames_of_seconds(seconds, fps, self._factor)
        return max(1, math.ceil((seconds * fps - 1e-6) / self._factor)) * self._factor

    def rounds(self, frames: int, settings: Settings, start: Posterior | None = None) -> int:
        """The number of solver steps that generate `frames` new frames."""
        return segments.count_segments(self.model, self.latents(frames, start)) * settings.steps

    def joints(self, frames: int, settings: Settings, start: Posterior | None = None) -> list[int]:
        """The first frames of the segments after the first one."""
        further = segments.begins(self.model, self.latents(frames, start))[1:]
        return [frames_of(latent, self._factor) if start is None else latent * self._factor for latent in further]

    def holds(self, frames: int) -> int:
        """How many of `frames` frames a memory takes at once: 1 + 4n that make whole groups of latents; 0 if too few."""
        group = self.model.config.group
        most = max(group, self.model.config.history)
        count = min(latent_groups(frames, self._factor), most) // group * group if frames > 0 else 0
        return frames_of(count, self._factor) if count else 0

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """See `Prompts.check`."""
        assert self.prompts
        self.prompts.check(prompts)

    def begin(self, frames: Iterable[np.ndarray]) -> Posterior:
        """The autoencoder's posterior `(1, C, T, h, w)` of a video's end, as much of it as a segment can know of.

        Frames are `(H, W, 3)` uint8. UserError where they are too few to continue from.
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
        return posterior_of(self.codec, to_tensor(np.stack(list(end)[-count:])))

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
        """See `Generator.videos`, and `segments.generate`.

        The latents of a start are drawn as in training, by each request's own seed.
        """
        seeds, where = [request.seed for request in requests], self.model.latent_mean.device
        latent_of = partial(scenes.latent_at, fps=fps or self.fps, factor=self._factor, goes_on=start is not None)
        story = texts.story_of_requests(requests, latent_of, self.prompts, where, self.pooled)
        negative = texts.negative_of_requests(requests, self.prompts, where, self.pooled)
        if not scenes.asks(story) and negative is None:
            # guidance to no condition has no effect
            settings = replace(settings, guidance=1.0)
        return segments.generate(
            self.model,
            self.codec,
            self.latents(frames, start),
            seeds,
            start=None if start is None else segments.draw_latents(start, seeds, self.posterior),
            story=story,
            negative=negative,
            settings=settings,
            folder=folder,
            models=self.digest,
            tile=tile,
            each_step=each_step,
        )

    def forget(self, folder: str) -> None:
        """See `parts.forget`."""
        parts.forget(folder)


def load_prior(uri: str, stage: Stage, vae: str | None = None, dtype: torch.dtype = torch.float32) -> MemoryPrior:
    """A model of the registry or of a model folder, on the GPU where there is one.

    Args:
        stage: what it must have been trained for.
        vae: decode by this autoencoder instead of the one that the model names; its encoder must be the same.

    Raises:
        UserError: no such model; it has no memory or another stage; the autoencoder is another one.
        Failure: the store cannot be reached, or a model is damaged.
    """
    return prior_of(uri, *registry.load_with_facts(uri), vae, dtype, stage)


def prior_of(
    uri: str, model: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype, stage: Stage = "generation"
) -> MemoryPrior:
    """Make a prior of a loaded model. Raises as `load_prior`."""
    if not isinstance(model, MemoryModel):
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
        accepts=ACCEPTS | texts.accepted(facts),
        prompts=Prompts(uri, facts["text"]["encoder"], model.config.text_length) if facts.get("text") else None,
        pooled=texts.pooled_for(uri, facts),
        at_once=learned_at_once(facts),
    )


def to_tensor(frames: np.ndarray) -> Tensor:
    """Frames `(t, H, W, 3)` uint8 -> `(1, 3, t, H, W)` uint8."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]
