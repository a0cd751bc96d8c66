"""Videos of any length from a Latte: latents window by window, each conditioned on the end of the one before, then decoded.

Memory depends on the size of the frames and on the number of videos in a batch, not on their length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.models.common import codec as codecs
from longtake.training.models.common import prompts as texts
from longtake.training.models.common import story as scenes
from longtake.training.models.common.codec import Codec, frames_of, latents_of, to_array
from longtake.training.models.common.condition import Condition, check_classes
from longtake.training.models.common.flow import euler, guided
from longtake.training.models.common.prompts import Prompts
from longtake.training.models.common.story import Story
from longtake.training.models.common.text import check_guidance
from longtake.training.models.generator import Request, Settings, fields_of
from longtake.training.models.latte.model import Latte

SETTINGS = ("steps", "guidance", "shift", "overlap")  # those that have an effect
ACCEPTS = frozenset({"class", "storyboard", *SETTINGS})
_DEFAULT = Settings()


@dataclass(frozen=True)
class Prior:
    """A registered Latte with the codec that decodes its latents: a `Generator` whose `frames` are those of a window."""

    latte: Latte
    codec: Any
    classes: Sequence[str]
    frames: int
    fps: float
    size: tuple[int, int]
    settings: Settings
    accepts: frozenset[str] = ACCEPTS
    prompts: Prompts | None = None

    @property
    def _factor(self) -> int:
        return int(self.codec.config.temporal_stride)

    def check_prompts(self, prompts: Sequence[str]) -> None:
        assert self.prompts
        self.prompts.check(prompts)

    def begin(self, frames: Iterator[np.ndarray]) -> Any:
        raise UserError("a Latte continues no video; leave the start out")

    def frames_of_seconds(self, seconds: float, fps: float, start: Any = None) -> int:
        return codecs.frames_of_seconds(seconds, fps, self._factor)

    def rounds(self, frames: int, settings: Settings, start: Any = None) -> int:
        assert self.latte.config.shape
        count = latents_of(frames, self._factor)
        return windows(count, self.latte.config.shape[0], settings.overlap) * settings.steps

    def joints(self, frames: int, settings: Settings, start: Any = None) -> list[int]:
        """The first frames of the windows after the first one, without those that they share with the one before."""
        assert self.latte.config.shape
        window, latents = self.latte.config.shape[0], latents_of(frames, self._factor)
        if latents <= window:
            return []
        return [frames_of(latent, self._factor) for latent in range(window, latents, window - settings.overlap)]

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
        """See `Generator.videos`. A scene's class holds from the first window on that begins in it or later."""
        assert start is None
        seeds, where = [request.seed for request in requests], self.latte.latent_mean.device
        latent_of = partial(scenes.latent_at, fps=fps or self.fps, factor=self._factor, goes_on=False)
        return generate_videos(
            self.latte,
            self.codec,
            frames,
            seeds,
            texts.story_of_requests(requests, latent_of, self.prompts, where),
            settings,
            tile=tile,
            each_step=each_step,
            negative=texts.negative_of_requests(requests, self.prompts, where),
        )

    def forget(self, folder: str) -> None:
        pass


def load_prior(uri: str, vae: str | None = None, dtype: torch.dtype = torch.float32) -> Prior:
    """A prior of the registry ("models:/latte@champion") or of a model folder, on the GPU where there is one.

    Args:
        vae: decode with this autoencoder instead of the prior's own; its encoder must be the same.

    Raises:
        UserError: no such model; it is no Latte; the autoencoder has another encoder.
        Failure: the store cannot be reached; a model is damaged.
    """
    return prior_of(uri, *registry.load_with_facts(uri), vae, dtype)


def prior_of(uri: str, latte: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> Prior:
    """The prior of a model that is already loaded; see `load_prior`."""
    if not isinstance(latte, Latte):
        raise UserError(f"{uri}: is a {type(latte).__name__}, which generates no videos; name a `finetune_latte` model")
    codec, _ = codecs.decoder_of(uri, facts.get("vae"), vae)
    return Prior(
        latte.to(device(), dtype),
        codec.to(device(), dtype),
        **fields_of(facts),
        accepts=ACCEPTS | texts.accepted(facts),
        prompts=texts.prompts_of(uri, facts),
    )


def generate_videos(
    latte: Latte,
    codec: Codec,
    frames: int,
    seeds: Sequence[int],
    condition: Condition | Story | None = None,
    settings: Settings = _DEFAULT,
    shape: tuple[int, int, int] | None = None,
    tile: int | None = None,
    each_step: Callable[[], object] | None = None,
    negative: Condition | None = None,
) -> Iterator[np.ndarray]:
    """A video for each seed, as chunks `(B, t, H, W, 3)` uint8 that follow each other; the same seed, the same video.

    A video longer than a window continues from its own last latents (see `generate`).

    Args:
        codec: decodes the latents; `codec.Pixels` for a prior of pixels.
        frames: of each video, 1 + 4n for a codec with 4 frames in a latent.
        tile: pixels a side; decode larger frames in overlapping tiles.
        condition, settings, shape, each_step, negative: see `generate`; without classes and texts, guidance has no effect.

    Raises:
        ValueError: at the call, for what does not fit together.
    """
    latents = generate_latents(latte, codec, frames, seeds, condition, settings, shape, each_step, negative)
    return (to_array(chunk) for chunk in codec.decode_stream(latents, tile=tile))


def generate_latents(
    latte: Latte,
    codec: Codec,
    frames: int,
    seeds: Sequence[int],
    condition: Condition | Story | None = None,
    settings: Settings = _DEFAULT,
    shape: tuple[int, int, int] | None = None,
    each_step: Callable[[], object] | None = None,
    negative: Condition | None = None,
) -> Iterator[Tensor]:
    """The latents that `generate_videos` decodes: chunks `(B, C, t, h, w)`, denormalised, fp32."""
    count = latents_of(frames, codec.config.temporal_stride)
    if codec.config.latent_channels != latte.config.channels:
        raise ValueError(
            f"the prior has {latte.config.channels} channels, the autoencoder {codec.config.latent_channels}"
        )
    if not scenes.asks(_story(condition)) and negative is None:
        settings = replace(settings, guidance=1.0)
    return generate(latte, count, seeds, condition, settings, shape, each_step, negative)


def windows(latents: int, window: int, overlap: int) -> int:
    """Sampling windows that `generate` needs for a video, all numbers in latents."""
    return 1 if latents <= window else 1 + math.ceil((latents - window) / (window - overlap))


def generate(
    model: Latte,
    latents: int,
    seeds: Sequence[int],
    condition: Condition | Story | None = None,
    settings: Settings = _DEFAULT,
    shape: tuple[int, int, int] | None = None,
    each_step: Callable[[], object] | None = None,
    negative: Condition | None = None,
) -> Iterator[Tensor]:
    """Sample a clip of `latents` latents for each seed, window by window.

    A sampling window has as many latents as one of training. Each after the first starts with the last `overlap` latents
    before it, clean, and samples the others. Only one window is in memory. A sample depends on its seed, not on the other
    samples, and a longer clip begins with the shorter one: the last window is sampled in full and cut.

    condition   a class and a text for each seed, or a `Story` of them; None is none, and then needs a guidance of 1
    shape       (latents, height, width) of a window; None is that of training
    each_step   called after each Euler step of each of the `windows(...)`
    negative    a text for each seed that guidance leads away from, in place of no text

    Yields:
        The new latents of each window, `(B, C, t, H, W)`, fp32, denormalised.

    Raises:
        ValueError: at the call, for what does not fit together.
    """
    config, overlap = model.config, settings.overlap
    shape = shape or config.shape
    if shape is None:
        raise ValueError("shape: give (frames, height, width) of a window; the model's config names none")
    if settings.steps < 1:
        raise ValueError(f"steps is {settings.steps}; sampling needs at least 1")
    if latents < 1 or not seeds:
        raise ValueError(f"frames is {latents}, seeds are {len(seeds)}; there is nothing to generate")
    if latents > shape[0]:
        if not 1 <= overlap < shape[0]:
            raise ValueError(f"overlap is {overlap}; a window of {shape[0]} can go on from 1 to {shape[0] - 1} frames")
        if not config.conditioning:
            raise ValueError(
                f"frames is {latents}: this model was trained without clean leading frames (conditioning: 0) "
                f"and cannot go on beyond one window of {shape[0]}"
            )
    story = _story(condition)
    for _, held in story:
        if held.classes is None:
            continue
        if len(held.classes) != len(seeds):
            raise ValueError(f"classes are {len(held.classes)}, seeds {len(seeds)}; each sample needs one of both")
        check_classes(held.classes.tolist(), config.classes)
    if settings.guidance != 1.0 and not story and negative is None:
        raise ValueError(f"guidance is {settings.guidance}; it needs a class or a text to guide to")
    check_guidance(config, settings.guidance)

    if not config.classes:
        story = [(begin, replace(held, classes=None)) for begin, held in story]
    rngs = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device

    def sample(clean: Tensor | None, begin: int) -> Tensor:
        given = 0 if clean is None else clean.shape[2]
        count = shape[0] - given
        one = (config.channels, *shape[1:])
        noise = torch.stack([torch.stack([torch.randn(one, generator=rng) for _ in range(count)], 1) for rng in rngs])
        start = 0 if clean is None else 1
        now = scenes.seen(story, begin, range(begin - given, begin + count))
        velocity = guided(lambda x, t, c: model(x, t, c, start), now, settings.guidance, negative)
        training = model.training
        model.eval()
        try:
            noise = noise.to(model.latent_mean.device)
            return euler(velocity, noise, settings.steps, settings.shift, clean, each_step)
        finally:
            model.train(training)

    return _chunks(model, sample, latents, overlap)


def _story(condition: Condition | Story | None) -> Story:
    """A condition that holds from the first latent on, as a story."""
    if condition is None:
        return []
    return [(0, condition)] if isinstance(condition, Condition) else condition


def _chunks(
    model: Latte, sample: Callable[[Tensor | None, int], Tensor], latents: int, overlap: int
) -> Iterator[Tensor]:
    clean, made = None, 0
    while made < latents:
        chunk = sample(clean, made)
        window = chunk if clean is None else torch.cat([clean, chunk], dim=2)
        clean = window[:, :, -overlap:].clone()
        yield model.denormalise(chunk[:, :, : latents - made])
        made += chunk.shape[2]
