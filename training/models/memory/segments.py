"""Videos of any length by a prior with a memory (arXiv 2512.23851): segment by segment, each given what came before.

A segment sees the past as compressed tokens and, clean beside them, the recent latents. Once generated it is decoded, and
only its own latents are encoded into the memory, by streams that stay open: the cost of a segment does not depend on how
much came before.

What it gives up: a run that is resumed decodes and encodes its kept segments again, since no state of a stream is kept.
That is exact, and little beside the many passes that each of them was sampled with.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.latents import shrunk
from longtake.datasets.loader import to_pixels
from longtake.training.models.common import parts
from longtake.training.models.common import story as scenes
from longtake.training.models.common.codec import Codec, Posterior
from longtake.training.models.common.condition import Condition, check_classes
from longtake.training.models.common.draws import rng_of
from longtake.training.models.common.flow import euler, guided, interpolate
from longtake.training.models.common.story import Story
from longtake.training.models.common.streaming import Past
from longtake.training.models.common.text import check_guidance
from longtake.training.models.generator import Settings, plain
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.pushes import pushes_of
from longtake.training.models.memory.tokens import Memory, cropped, repeated

SETTINGS = ("steps", "guidance", "shift", "history_noise")  # those that have an effect
_NAME = "latent"  # of the tensor in a kept segment
_NOISES = ("high", "low", "recent")  # what is noised; the places decide the draws


class History:
    """What a model is given of the latents so far, which come in chunks and are encoded once.

    latents  their number
    memory   of the last `config.history` of them; None without any
    recent   `(B, C, n, h, w)`, normalised: the last `config.window` latents, and all others that the memory does not have
             yet, since it takes them in groups; None without any
    level    of noise, as a time of the flow, that memory and recent latents get: what was generated is then trusted less,
             as the model has learned it; 0 is none. Each video's noise depends on its own one of `seeds` alone
    """

    def __init__(self, model: MemoryModel, level: float = 0.0, seeds: Sequence[int] = ()) -> None:
        self.latents, self.level, self._seeds = 0, level, seeds
        self.memory: Memory | None = None
        self.recent: Tensor | None = None
        self._model = model
        self._pasts = [Past() for _ in model.memory]
        self._waiting = 0  # number of the last latents, which fill no group yet
        self._low: Tensor | None = None  # these, of the scaled-down video

    @torch.no_grad()
    def append(self, latent: Tensor, low: Tensor | None = None) -> None:
        """Add the latents that come next, `(B, C, T, h, w)` as the autoencoder makes them; `low` is of the scaled-down video."""
        model, group = self._model, self._model.config.group
        high = model.normalise(latent)
        recent = high if self.recent is None else torch.cat([self.recent, high], dim=2)
        if low is not None:
            low = model.normalise_low(low)
            low = low if self._low is None else torch.cat([self._low, low], dim=2)
        self.latents += high.shape[2]
        waiting = self._waiting + high.shape[2]

        # Encode the whole groups.
        if count := waiting // group * group:
            first, begin = recent.shape[2] - waiting, self.latents - waiting
            chunk = self._noised(recent[:, :, first : first + count], begin, "high")
            low_chunk = None if low is None else self._noised(low[:, :, :count], begin, "low")
            is_first = (begin + torch.arange(count, device=chunk.device)[None] == 0).expand(len(chunk), -1)
            self.memory = model.append(self.memory, chunk, low_chunk, begin, self._pasts, is_first)
            waiting -= count
        if self.memory is not None:
            # whole groups, as in training: of one that begins earlier no rate keeps a token
            reach = (model.config.history - waiting) // group * group
            self.memory = cropped(self.memory, self.latents - waiting - reach)

        # Keep the rest. Clones, because a view would keep all of the chunk.
        self._waiting = waiting
        self._low = None if low is None else low[:, :, low.shape[2] - waiting :].clone()
        count = min(max(model.config.window, waiting), recent.shape[2])
        self.recent = recent[:, :, recent.shape[2] - count :].clone() if count else None

    def noised_recent(self) -> Tensor | None:
        """The recent latents as the next segment sees them."""
        return None if self.recent is None else self._noised(self.recent, self.latents, "recent")

    def _noised(self, latents: Tensor, time: int, name: str) -> Tensor:
        if not self.level:
            return latents
        kind = _NOISES.index(name) + 1
        noise = torch.stack(
            [torch.randn(latents.shape[1:], generator=rng_of(seed, time, kind)) for seed in self._seeds]
        )
        level = torch.full((len(latents),), self.level, device=latents.device)
        return interpolate(latents, noise.to(latents.device), level)


def draw_latents(posterior: Posterior, seeds: Sequence[int], choice: Literal["sample", "mean"]) -> Tensor:
    """Latents `(B, C, T, h, w)` of one video to continue, one for each seed: its own sample, or the mean."""
    if choice == "mean":
        return posterior.mode().float().expand(len(seeds), -1, -1, -1, -1)
    on_cpu = Posterior(*(moment.float().cpu() for moment in posterior))
    samples = [on_cpu.sample(rng_of(seed, 0, 4)) for seed in seeds]
    return torch.cat(samples).to(posterior.mean.device)


def count_segments(model: MemoryModel, latents: int) -> int:
    """The number of segments that `generate` samples for `latents` new latents."""
    return len(begins(model, latents))


def begins(model: MemoryModel, latents: int) -> range:
    """The new latents at which segments begin."""
    return range(0, latents, _shape(model)[0])


@dataclass(frozen=True)
class _Job:
    """The arguments of `generate`."""

    model: MemoryModel
    vae: Codec
    latents: int
    seeds: Sequence[int]
    start: Tensor | None
    story: Story
    negative: Condition | None
    settings: Settings
    folder: str | None
    models: str
    tile: int | None
    each_step: Callable[[], object] | None

    def record(self) -> dict[str, Any]:
        """All that decides the segments, but for their number."""
        return {
            "models": self.models,
            "precision": [str(self.model.dtype), str(self.vae.dtype)],
            "seeds": list(self.seeds),
            "start": None if self.start is None else _digest(self.start),
            "story": [[begin, condition.record()] for begin, condition in self.story],
            "negative": self.negative and self.negative.record(),
            "settings": plain(self.settings, SETTINGS),
            "tile": self.tile,
        }

    def condition(self, latent: int, recent: int) -> Condition | None:
        """The condition of a segment that begins at a new latent, with so many recent ones in front."""
        now = scenes.seen(self.story, latent, range(latent - recent, latent + _shape(self.model)[0]))
        return now if now is None or self.model.config.classes else replace(now, classes=None)


def generate(
    model: MemoryModel,
    vae: Codec,
    latents: int,
    seeds: Sequence[int],
    *,
    start: Tensor | None = None,
    story: Story = (),
    negative: Condition | None = None,
    settings: Settings | None = None,
    folder: str | None = None,
    models: str = "",
    tile: int | None = None,
    each_step: Callable[[], object] | None = None,
) -> Iterator[np.ndarray]:
    """A video of `latents` new latents for each seed: chunks of frames `(B, t, H, W, 3)` uint8, one for each segment.

    The same seed gives the same video, and a longer one begins with the shorter one: the last segment is sampled whole and
    cut. Without `start` the first latent is one frame; all others are as many as the autoencoder has in a latent.

    Args:
        start: `(1 or B, C, T, h, w)`, latents as the autoencoder makes them of a video from its first frame on. The
            result begins after them.
        story: (new latent, condition) in order. A text is seen by its own latents, a class takes effect with the first
            segment that begins at its latent or later (see `common.story`).
        negative: a text for each seed that guidance leads away from, in place of no text.
        settings: solver steps of a segment (`steps`), guidance, shift, and the noise of its history.
        folder: a URL where finished segments are kept. The same call resumes after them, to the same bytes.
        models: digests of the weights, which decide the result beside the other arguments.
        tile: pixels a side; decode larger frames in overlapping tiles.
        each_step: called after each of the `count_segments(...) * settings.steps` solver steps, also those of kept segments.

    Raises:
        ValueError: at the call, for arguments that do not fit together.
        UserError: at the first chunk, where the folder has segments of other settings.
        Failure: a kept segment is damaged.
    """
    job = _Job(
        model, vae, latents, seeds, start, story, negative, settings or Settings(), folder, models, tile, each_step
    )
    _check(job)
    return _chunks(job)


def _chunks(job: _Job) -> Iterator[np.ndarray]:
    model, vae, seeds = job.model, job.vae, job.seeds
    device, shape, shrink = model.latent_mean.device, _shape(model), model.config.shrink
    decode, encode = pushes_of(vae, job.tile)
    history = History(model, job.settings.history_noise, seeds)

    def append(latents: Tensor) -> np.ndarray:
        """Add latents to the history and return their frames."""
        frames, lows = [], []
        for latent in latents.split(1, dim=2):
            video = decode(latent)
            frames.append(to_pixels(video).permute(0, 2, 3, 4, 1))
            if shrink:
                lows.append(encode(shrunk(video.float().clamp(-1, 1), shrink, vae.config.spatial_stride)))
        history.append(latents, torch.cat(lows, dim=2) if lows else None)
        return torch.cat(frames, dim=1).cpu().numpy()

    if job.folder:
        parts.open_folder(job.folder, job.record())
    if job.start is not None:
        start = job.start.to(device).expand(len(seeds), -1, -1, -1, -1)
        for chunk in start.split(shape[0], dim=2):
            append(chunk)
    for number, begin in enumerate(begins(job.model, job.latents)):
        url = parts.url_of(job.folder, number)
        segment = parts.load(url, _NAME)
        if segment is None:
            segment = _sample(job, history, number).cpu()
            parts.save(url, _NAME, segment)
        else:
            parts.check_shape(url, segment, (len(seeds), model.config.channels, *shape))
            if job.each_step:
                for _ in range(job.settings.steps):
                    job.each_step()
        yield append(segment[:, :, : job.latents - begin].to(device))


def _sample(job: _Job, history: History, number: int) -> Tensor:
    """Segment `number`: `(B, C, T, h, w)`, fp32, denormalised."""
    model, seeds, settings = job.model, job.seeds, job.settings
    device, shape, clean = model.latent_mean.device, _shape(model), history.noised_recent()
    recent = 0 if clean is None else clean.shape[2]
    times = torch.arange(history.latents - recent, history.latents + shape[0], device=device)
    # by segment: each can be sampled without the draws of those before
    noise = torch.stack([torch.randn(model.config.channels, *shape, generator=rng_of(seed, number)) for seed in seeds])
    first = (times == 0)[None]

    def velocity(x: Tensor, t: Tensor, part: Condition | None) -> Tensor:
        memory = None if history.memory is None else repeated(history.memory, len(x) // len(seeds))
        level = torch.full((len(x),), history.level, device=x.device) if history.level else None
        return model(x, t, times, memory, part, first=first, level=level)

    training = model.training
    model.eval()
    try:
        flow = guided(velocity, job.condition(number * shape[0], recent), settings.guidance, job.negative)
        x = euler(flow, noise.to(device), settings.steps, settings.shift, clean, job.each_step, history.level)
        return model.denormalise(x)
    finally:
        model.train(training)


def _digest(latent: Tensor) -> str:
    return hashlib.sha256(latent.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _shape(model: MemoryModel) -> tuple[int, int, int]:
    if model.config.shape is None:
        raise ValueError("shape: the model's config names no segment; it was not trained to generate")
    return model.config.shape


def _check(job: _Job) -> None:
    """Refuse arguments that do not fit together: ValueError."""
    config, seeds, start, settings = job.model.config, job.seeds, job.start, job.settings
    _, height, width = _shape(job.model)
    if job.latents < 1 or not seeds:
        raise ValueError(f"latents is {job.latents}, seeds are {len(seeds)}; there is nothing to generate")
    if settings.steps < 1:
        raise ValueError(f"steps is {settings.steps}; sampling needs at least 1")
    if not 0 <= settings.history_noise <= config.history_noise:
        raise ValueError(
            f"history_noise is {settings.history_noise:g}; the model has learned 0 to {config.history_noise:g}"
        )
    if job.vae.config.latent_channels != config.channels:
        raise ValueError(f"the prior has {config.channels} channels, the autoencoder {job.vae.config.latent_channels}")
    if start is not None and (
        start.ndim != 5
        or start.shape[0] not in (1, len(seeds))
        or start.shape[1] != config.channels
        or start.shape[3:] != (height, width)
        or not start.shape[2]
    ):
        raise ValueError(
            f"start has shape {tuple(start.shape)}; it needs (1 or {len(seeds)}, {config.channels}, T, {height}, {width})"
        )
    begins = [begin for begin, _ in job.story]
    if begins != sorted(set(begins)):
        raise ValueError("story: its latents must rise")
    for begin, condition in job.story:
        if condition.classes is None:
            continue
        if len(condition.classes) != len(seeds):
            raise ValueError(f"story: at latent {begin} are {len(condition.classes)} classes for {len(seeds)} seeds")
        check_classes(condition.classes.tolist(), config.classes)
    if settings.guidance != 1.0 and not scenes.asks(job.story) and job.negative is None:
        raise ValueError(f"guidance is {settings.guidance}; it needs a class or a text to guide to")
    check_guidance(config, settings.guidance)
    # an empty stream refuses a tile that does not fit, before anything is sampled
    deque(job.vae.decode_stream((), 1, job.tile), maxlen=0)
