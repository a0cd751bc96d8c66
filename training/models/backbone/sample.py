"""Videos from a video transformer of another library, as its own pipeline makes them: one window, then decoded.

The same seed, settings and texts give what the library's pipeline gives for noise of the same generator.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.foreign.backbone import Backbone, BackboneConfig
from longtake.training.foreign.columns import pipeline_uri
from longtake.training.foreign.folder import pipeline_of
from longtake.training.models.backbone.given import start_image
from longtake.training.models.backbone.pipeline import codec_for, image_states_for
from longtake.training.models.backbone.solver import follow, scheduler_for, solver_of
from longtake.training.models.common import codec as codecs
from longtake.training.models.common import prompts as texts
from longtake.training.models.common.codec import latents_of, to_array, to_tensor
from longtake.training.models.common.condition import Condition, pooled_of
from longtake.training.models.common.guidance import parts_of
from longtake.training.models.common.prompts import Prompts
from longtake.training.models.generator import Request, Settings, fields_of
from longtake.training.registry import pipelines
from longtake.training.registry.uri import in_store

_BASES = 8  # fine-tunings of fine-tunings that are gone through for the other expert


class Text(NamedTuple):
    """What a batch of videos is led to, or away from: its texts, None for those of "", and a vector of each."""

    condition: Condition | None = None
    pooled: Tensor | None = None


_NOTHING = Text()


class Shown(NamedTuple):
    """A start image: `image` and `image_states` of `Backbone.forward`."""

    image: Tensor
    states: Tensor | None = None


@dataclass(frozen=True)
class Prior:
    """A transformer, or one for high noise and one for low, with its codec and texts: a `Generator`.

    models   the one for high noise first
    pooled   of texts, by a second encoder, for a class that takes a vector of each
    look     a start frame to the states that the model attends to, for a class that does
    """

    models: tuple[Backbone, ...]
    codec: Any
    classes: Sequence[str]
    frames: int
    fps: float
    size: tuple[int, int]
    settings: Settings
    accepts: frozenset[str]
    prompts: Prompts | None = None
    pooled: Prompts | None = None
    look: Callable[[np.ndarray], Tensor] | None = None

    def sized(self, height: int, width: int) -> Prior:
        """The same for videos of another size. UserError for sides that the codec or the model does not divide."""
        config = self.models[0].config
        rows, columns = (self.codec.config.spatial_stride * side for side in config.patch[1:])
        if height < rows or width < columns or height % rows or width % columns:
            raise UserError(f"{height}x{width}: this model makes frames with sides in multiples of {rows}x{columns}")
        return replace(self, size=(height, width))

    def check_prompts(self, prompts: Sequence[str]) -> None:
        assert self.prompts
        self.prompts.check(prompts)

    def begin(self, frames: Iterator[np.ndarray]) -> np.ndarray:
        """The last frame of a video, or an image: the start that is gone on from. UserError for none."""
        last = deque(frames, maxlen=1)
        if not last:
            raise UserError("has no frame; the model goes on from the last one")
        return last.pop()

    def frames_of_seconds(self, seconds: float, fps: float, start: Any = None) -> int:
        factor, first = self._lengths
        if start is None:
            return codecs.frames_of_seconds(seconds, fps, factor, first)
        return factor * max(1, math.ceil((seconds * fps - 1e-6) / factor))

    @property
    def _lengths(self) -> tuple[int, int]:
        return self.codec.config.temporal_stride, self.codec.config.first_frames

    def rounds(self, frames: int, settings: Settings, start: Any = None) -> int:
        """The solver's steps. The start frame is made again as the first one, and left out."""
        self._shape(frames, start)
        return settings.steps

    def joints(self, frames: int, settings: Settings, start: Any = None) -> list[int]:
        return []

    def _shape(self, frames: int, start: Any) -> tuple[int, int, int]:
        """Latents (T, H, W) of a video after a start. ValueError for a length that the codec cannot make."""
        factor, first = self._lengths
        if start is None and self.models[0].config.sizes.image_channels:
            raise UserError("start: this model goes on from an image; name one, as --start FILE")
        if start is not None and (frames < factor or frames % factor):
            below = max(1, frames // factor) * factor
            raise ValueError(f"frames is {frames}; after a start this model makes {factor}n, such as {below}")
        latents = latents_of(frames + (start is not None), factor, first)
        height, width = (side // self.codec.config.spatial_stride for side in self.size)
        sizes, shape = self.models[0].config.sizes, (latents, height, width)
        if sizes.longest and any(n // p > sizes.longest for n, p in zip(shape, sizes.patch, strict=True)):
            raise ValueError(
                f"frames is {frames} of {self.size[0]}x{self.size[1]}; this model has positions for"
                f" {sizes.longest} tokens in time and a side: make fewer or smaller ones"
            )
        return shape

    def videos(
        self,
        requests: Sequence[Request],
        frames: int,
        settings: Settings,
        *,
        fps: float | None = None,
        start: Any = None,
        folder: str | None = None,
        tile: int | None = None,
        each_step: Callable[[], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """See `Generator.videos`. The first scene of a story is that of the whole video."""
        shape = self._shape(frames, start)
        self._learn_empty()
        wanted = self._text([request.story[0][1].prompt for request in requests])
        away = self._text([request.negative for request in requests])
        shown = None if start is None else self._shown(start, shape[0], len(requests))
        seeds = [request.seed for request in requests]
        latents = sample(self.models, shape, seeds, settings, wanted, away, shown, fps or self.fps, each_step)
        pictures = (to_array(chunk) for chunk in self.codec.decode_stream([latents], tile=tile))
        return pictures if start is None else chain((next(pictures)[:, 1:],), pictures)

    def forget(self, folder: str) -> None:
        pass

    def _learn_empty(self) -> None:
        """Have the models know the states of "", which a pipeline's files do not have."""
        for model in self.models:
            if not model.config.text_empty and self.prompts:
                states, vector = self._text([""]), None
                assert states.condition and states.condition.text is not None
                if states.pooled is not None:
                    vector = states.pooled[0]
                model.set_empty(states.condition.text[0], vector)

    def _text(self, prompts: Sequence[str | None]) -> Text:
        where = self.models[0].empty.device
        if self.prompts is None or all(prompt is None for prompt in prompts):
            return Text()
        text, mask = self.prompts.states(prompts, where)
        pooled = None
        if self.pooled:
            states, seen = self.pooled.states(prompts, where)
            assert states is not None and seen is not None
            pooled = pooled_of(states, seen)
        return Text(Condition(None, text, mask), pooled)

    def _shown(self, frame: np.ndarray, latents: int, count: int) -> Shown:
        """A start frame as the models take it, for `count` videos of so many latents."""
        first = to_tensor([frame], device()).to(self.codec.dtype)
        image = start_image(self.codec, first, latents if self.models[0].config.sizes.image_channels else 1)
        image = image.expand(count, -1, -1, -1, -1)
        return Shown(image, self.look(frame).expand(count, -1, -1) if self.look else None)


@torch.no_grad()
def sample(
    models: Sequence[Backbone],
    shape: tuple[int, int, int],
    seeds: Sequence[int],
    settings: Settings,
    wanted: Text = _NOTHING,
    away: Text = _NOTHING,
    shown: Shown | None = None,
    fps: float | None = None,
    each_step: Callable[[], object] | None = None,
) -> Tensor:
    """The latents `(B, C, T, H, W)` fp32 of a window for each seed.

    Guidance is v(away) + guidance (v(wanted) - v(away)). A class that has it as an input gets it as that, and is led away
    by `negative_guidance`. Of two models the first is asked from its `boundary` on, and the other, at lower times, with
    `guidance_2` where that is set.

    Raises:
        ValueError: what a model refuses, and fewer than one step.
    """
    first = models[0].config
    scheduler = scheduler_for(first, settings.solver, settings.steps, shape, settings.shift, models[0].empty.device)
    strengths = [parts_of(settings.guidance).text] * 2
    if settings.guidance_2 is not None:
        strengths[1] = settings.guidance_2
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device
    noise = torch.stack([torch.randn(first.channels, *shape, generator=rng) for rng in rngs]).to(models[0].empty.device)
    given: dict[str, Any] = {"fps": fps}
    if shown is not None:
        given |= {"image": shown.image, "image_states": shown.states}

    def velocity(x: Tensor, time: float) -> Tensor:
        number = int(len(models) > 1 and time < (first.boundary or 0.0))
        model, strength, t = models[number], strengths[number], x.new_full((len(x),), time)
        embedded = None
        if first.sizes.embeds_guidance:
            embedded, strength = strength, settings.negative_guidance
        led = partial(_velocity, model, x, t, given | {"guidance": embedded})
        made = led(wanted)
        if strength == 1.0 or (wanted.condition is None and away.condition is None):
            return made
        lower = led(away)
        return lower + strength * (made - lower)

    latents = follow(velocity, noise, scheduler, each_step)
    if shown is not None and not first.sizes.image_channels:
        latents = torch.cat([shown.image, latents[:, :, shown.image.shape[2] :]], dim=2)
    return latents


def _velocity(model: Backbone, x: Tensor, t: Tensor, given: Mapping[str, Any], text: Text) -> Tensor:
    made: Tensor = model(x, t, text.condition, pooled=text.pooled, **given)
    return made.float()


def prior_of(uri: str, model: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> Prior:
    """The prior of a loaded backbone, and of the facts that `pipeline.completed` returns.

    Raises:
        UserError: it is another model; the autoencoder has another encoder; the other expert is not found.
    """
    if not isinstance(model, Backbone):
        raise UserError(f"{uri}: is a {type(model).__name__}, and no video transformer of another library")
    models = (model,) if model.config.expert is None else _experts(uri, model, facts)
    fields = fields_of(facts)
    if "solver" not in facts["sampling"]:
        fields["settings"] = replace(fields["settings"], solver=solver_of(model.config.scheduler))
    return Prior(
        tuple(each.to(device(), dtype).eval() for each in models),
        codec_for(uri, facts, vae).to(device(), dtype),
        **fields,
        accepts=accepts_of(facts),
        prompts=texts.prompts_of(uri, facts),
        pooled=texts.pooled_for(uri, facts),
        look=image_states_for(pipeline_uri(uri, facts), model.config.sizes.image_width),
    )


def accepts_of(facts: Mapping[str, Any]) -> frozenset[str]:
    """The options of a request to the model with this config.json."""
    config = facts["config"]
    sizes = BackboneConfig(**config).sizes
    starts = bool(sizes.image_channels or config.get("expand_timesteps"))
    more = {"start": starts, "guidance_2": config.get("expert") is not None, "negative_guidance": sizes.embeds_guidance}
    return frozenset(
        {"steps", "guidance", "solver", "size", *(name for name, has in more.items() if has)}
    ) | texts.accepted(facts)


def _experts(uri: str, model: Backbone, facts: Mapping[str, Any]) -> tuple[Backbone, Backbone]:
    """Both transformers that share the times: this one, and the other of the pipeline that it was made of."""
    expert = model.config.expert
    other: Literal["high", "low"] = "low" if expert == "high" else "high"
    where = facts.get("base", {}).get("uri", uri)
    for _ in range(_BASES):
        if not in_store(where):
            # one of two transformers may be named by its own folder
            where = str(pipeline_of(pipelines.local(where)))
        found, of_found = registry.load_with_facts(where, "transformer", other)
        assert isinstance(found, Backbone)
        if found.config.expert == other:
            return (model, found) if expert == "high" else (found, model)
        where = of_found.get("base", {}).get("uri")
        if where is None:
            break
    raise UserError(f"{uri}: is the expert of {expert} noise, and the one of {other} noise is not at {where}")
