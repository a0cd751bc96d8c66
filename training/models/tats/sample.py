"""Videos of any length from a TATS: tokens part by part (see `rollout`), decoded in a stream.

Memory depends on the size of the frames and on the number of videos in a batch, not on their length.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.tokens import model_digest
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.models.common import parts
from longtake.training.models.common import prompts as texts
from longtake.training.models.common import story as scenes
from longtake.training.models.common.codec import to_array, to_tensor
from longtake.training.models.common.prompts import States
from longtake.training.models.generator import Request, Settings, fields_of
from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.rollout import Rollout, spans
from longtake.training.models.tats.sound.hearing import HeardSamples, samples_of
from longtake.training.models.tats.words import Words
from longtake.training.registry import disk

SETTINGS = frozenset({"guidance", "temperature", "top_k", "top_p", "keep"})
ACCEPTS = frozenset({"class", "start", "storyboard"}) | SETTINGS


def accepts(facts: Mapping[str, Any]) -> frozenset[str]:
    """The options of a request to the model with this config.json."""
    more = {name for name, learned in (("prompt", "words"), ("audio", "sound")) if facts.get(learned)}
    return ACCEPTS | texts.accepted(facts) | more


@dataclass(frozen=True)
class Prior:
    """A registered TATS with the model of its anchors, if it has one, and the VQGAN that decodes its tokens: a `Generator`.

    frames    of a window of its tokens
    fps, size of its training videos
    digest    of all weights
    leading   the settings that the model of the anchors was registered with
    prompts   the encoder of its texts, or its own words; None for a model without
    hearing   the VQGAN of its sound; None for a model without
    """

    model: TATS
    anchors: TATS | None
    vqgan: Any
    classes: Sequence[str]
    frames: int
    fps: float
    size: tuple[int, int]
    settings: Settings
    digest: str
    leading: Settings | None = None
    accepts: frozenset[str] = ACCEPTS
    prompts: States | None = None
    hearing: Any = None

    @property
    def _factor(self) -> int:
        return int(self.vqgan.config.temporal_stride)

    @property
    def _every(self) -> int:
        return self.model.config.every if self.anchors else 1

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """See `States.check`."""
        assert self.prompts
        self.prompts.check(prompts)

    def latents(self, frames: int) -> int:
        """The latent frames of a video. ValueError, with the nearest that there are, where no whole number makes it."""
        if frames < 1 or frames % self._factor:
            low = max(1, frames // self._factor) * self._factor
            raise ValueError(
                f"frames is {frames}; this model makes {self._factor}n frames, such as {low} or {low + self._factor}"
            )
        return frames // self._factor

    def frames_of_seconds(self, seconds: float, fps: float, start: Tensor | None = None) -> int:
        return max(1, math.ceil((seconds * fps - 1e-6) / self._factor)) * self._factor

    def rounds(self, frames: int, settings: Settings, start: Tensor | None = None) -> int:
        """The latent frames that are drawn."""
        return max(end for _, end in spans(self.latents(frames), self._every, start is not None))

    def joints(self, frames: int, settings: Settings, start: Tensor | None = None) -> list[int]:
        """The frames after the anchors at which two gaps meet. A window that slides latent frame by latent frame has none."""
        if self._every == 1:
            return []
        first = self._every + (start is None)  # without a start the first anchor is the video's first latent frame
        return [latent * self._factor for latent in range(first, self.latents(frames), self._every)]

    def begin(self, frames: Iterable[np.ndarray]) -> Tensor:
        """The tokens `(1, t, h, w)` of a video's end, of a window at most. UserError where it is too short."""
        leader = self.anchors or self.model
        end = deque(frames, maxlen=leader.config.shape[0] * self._factor)
        count = len(end) // self._factor * self._factor
        if not count:
            raise UserError(
                f"has {len(end)} frames at {self.fps:g} a second; the model goes on from {self._factor} or more"
            )
        video = to_tensor(list(end)[-count:], leader.places.device)
        with torch.no_grad():
            tokens: Tensor = self.vqgan.tokens(video.to(next(self.vqgan.parameters()).dtype))
        return tokens

    def videos(
        self,
        requests: Sequence[Request],
        frames: int,
        settings: Settings,
        *,
        fps: float | None = None,
        start: Tensor | None = None,
        folder: str | None = None,
        tile: int | None = None,
        each_step: Callable[[], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """See `Generator.videos`, and `Rollout`. A scene holds from the latent frame on that has its first frame."""
        where = self.model.places.device
        latent_of = partial(scenes.latent_at, fps=fps or self.fps, factor=self._factor, goes_on=True)
        story = texts.story_of_requests(requests, latent_of, self.prompts, where)
        negative = texts.negative_of_requests(requests, self.prompts, where)
        heard = self._heard(requests, fps or self.fps)
        leading = self._leading(settings)
        if not scenes.asks(story) and negative is None and heard is None:
            settings, leading = replace(settings, guidance=1.0), leading and replace(leading, guidance=1.0)
        rollout = Rollout(
            self.model,
            [request.seed for request in requests],
            settings,
            self.anchors,
            leading,
            start,
            story,
            negative,
            heard,
            models=self.digest,
            each_step=each_step,
        )
        rollout.check()
        # before a token is drawn
        self.vqgan.check_tile(tile, self.model.config.shape[1:])
        return videos_of(rollout, self.vqgan, self.latents(frames), folder, tile)

    def _leading(self, settings: Settings) -> Settings | None:
        """The settings of the anchors: their own, but for what is asked for in place of the model's."""
        asked = {field.name: getattr(settings, field.name) for field in fields(settings)}
        changes = {name: value for name, value in asked.items() if value != getattr(self.settings, name)}
        return self.leading and replace(self.leading, **changes)

    def _heard(self, requests: Sequence[Request], fps: float) -> HeardSamples | None:
        """The requests' sounds; None where none has any."""
        if all(request.sound is None for request in requests):
            return None
        return HeardSamples(self.hearing, [samples_of(self.hearing, request.sound) for request in requests], fps)

    def forget(self, folder: str) -> None:
        """See `parts.forget`."""
        parts.forget(folder)


def videos_of(
    rollout: Rollout, vqgan: Any, latents: int, folder: str | None = None, tile: int | None = None
) -> Iterator[np.ndarray]:
    """The videos of a rollout, as chunks `(B, t, H, W, 3)` uint8 that follow each other, without its start."""

    def tokens() -> Iterator[Tensor]:
        if rollout.start is not None:
            yield rollout.start.expand(len(rollout.seeds), -1, -1, -1)
        yield from rollout.tokens(latents, folder)

    # the start decides how its end and what follows look together
    given = 0 if rollout.start is None else rollout.start.shape[1] * vqgan.config.temporal_stride
    for video in vqgan.decode_tokens_stream(tokens(), tile=tile):
        if given < video.shape[2]:
            yield to_array(video[:, :, given:])
        given = max(0, given - video.shape[2])


def prior_of(uri: str, model: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> Prior:
    """The prior of a loaded model, on the GPU where there is one.

    Args:
        vae: where the VQGAN of its tokens is, if not where it was.

    Raises:
        UserError: it is no TATS, or makes no whole videos; the VQGAN is another one.
        Failure: the store cannot be reached, or a model is damaged.
    """
    if not isinstance(model, TATS):
        raise UserError(f"{uri}: is a {type(model).__name__}; name a `pretrain_tats` model")
    if model.config.mode == "anchors":
        raise UserError(
            f"{uri}: makes anchors alone, one in {model.config.every} latent frames; name the model of mode interpolate that"
            " was trained to fill what is between them"
        )
    vqgan, vqgan_facts = vqgan_of(uri, facts["vqgan"], vae)
    anchors: Any = None
    leading: Settings | None = None
    hearing: Any = None
    digests = [disk.digest(facts), disk.digest(vqgan_facts)]
    if facts.get("sound"):
        hearing, hearing_facts = vqgan_of(uri, facts["sound"], None)
        digests.append(disk.digest(hearing_facts))
        hearing.to(device(), dtype)
    if model.config.mode == "interpolate":
        anchors, anchors_facts = registry.load_with_facts(facts["anchors"]["uri"])
        digests.append(disk.digest(anchors_facts))
        leading = fields_of(anchors_facts)["settings"]
        anchors.to(device(), dtype)
    return Prior(
        model.to(device(), dtype),
        anchors,
        vqgan.to(device(), dtype),
        **fields_of(facts),
        digest=" ".join(digests),
        leading=leading,
        accepts=accepts(facts),
        prompts=prompts_of(uri, facts),
        hearing=hearing,
    )


def prompts_of(uri: str, facts: Mapping[str, Any]) -> States | None:
    """The words that a model has learned, or the encoder of its texts; None for a model without."""
    if facts.get("words"):
        return Words.of(facts["words"], facts["config"]["word_length"])
    return texts.prompts_of(uri, facts)


def vqgan_of(uri: str, needed: Mapping[str, Any], vae: str | None) -> tuple[Any, dict[str, Any]]:
    """The module that decodes a model's tokens, and its config.json. UserError where it makes other tokens."""
    where = vae or needed["uri"]
    vqgan, facts = registry.load_with_facts(where)
    if model_digest(vqgan) != needed["encoder"]:
        raise UserError(f"{where}: has not made the tokens that {uri} was trained on; name {needed['uri']}")
    return vqgan, facts
