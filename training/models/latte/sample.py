"""Videos of any length by a Latte: latents window by window, each given the end of the one before, decoded in a stream.

Memory depends on the size of the frames and on how many videos are made at once, not on their length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.models.common import codec as codecs
from longtake.training.models.common.codec import Codec, latents_of, to_array
from longtake.training.models.common.condition import Condition, check_classes, of_classes
from longtake.training.models.common.flow import euler, guided
from longtake.training.models.generator import Request, Settings
from longtake.training.models.latte.model import Latte

ACCEPTS = frozenset({"class"})


@dataclass(frozen=True)
class Prior:
    """A registered Latte with the codec that makes videos of its latents: a `Generator`.

    `classes` are the names of its classes in the order of their ids, `frames` those of a window, `fps` and `size`
    (height, width) those of what it has learned.
    """

    latte: Latte
    codec: Any
    classes: Sequence[str]
    frames: int
    fps: float
    size: tuple[int, int]
    settings: Settings
    accepts: frozenset[str] = ACCEPTS

    @property
    def _factor(self) -> int:
        return int(self.codec.config.temporal_stride)

    def begin(self, frames: Iterator[np.ndarray]) -> Any:
        raise UserError("a Latte has no memory; name a `finetune_memory_prior` model")

    def frames_of_seconds(self, seconds: float, fps: float, start: Any = None) -> int:
        return codecs.frames_of_seconds(seconds, fps, self._factor)

    def rounds(self, frames: int, settings: Settings, start: Any = None) -> int:
        assert self.latte.config.shape
        count = latents_of(frames, self._factor)
        return windows(count, self.latte.config.shape[0], settings.overlap) * settings.steps

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
        assert start is None
        seeds = [request.seed for request in requests]
        asked = of_classes(request.story[0][1] for request in requests)
        return generate_videos(self.latte, self.codec, frames, seeds, asked, settings, tile=tile, each_step=each_step)

    def forget(self, folder: str) -> None:
        pass


def load_prior(uri: str, vae: str | None = None, dtype: torch.dtype = torch.float32) -> Prior:
    """A prior of the registry ("models:/latte@champion") or of a model folder, on the GPU where there is one.

    Args:
        vae: decode by this autoencoder and not by the one that the prior names; its encoder must be the same.

    Raises:
        UserError: no such model; it is no Latte; the autoencoder is another one.
        Failure: the store cannot be reached; or a model is damaged.
    """
    return prior_of(uri, *registry.load_with_facts(uri), vae, dtype)


def prior_of(uri: str, latte: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> Prior:
    """`load_prior` of a model that is loaded."""
    if not isinstance(latte, Latte):
        raise UserError(f"{uri}: is a {type(latte).__name__}, which generates no videos; name a `finetune_latte` model")
    codec, _ = codecs.decoder_of(uri, facts.get("vae"), vae)
    window = facts["window"]
    return Prior(
        latte.to(device(), dtype),
        codec.to(device(), dtype),
        tuple(facts["classes"]),
        window["frames"],
        window["fps"],
        (window["size"][0], window["size"][1]),
        Settings(**facts["sampling"]),
    )


def generate_videos(
    latte: Latte,
    codec: Codec,
    frames: int,
    seeds: Sequence[int],
    condition: Condition | None = None,
    settings: Settings | None = None,
    shape: tuple[int, int, int] | None = None,
    tile: int | None = None,
    each_step: Callable[[], object] | None = None,
) -> Iterator[np.ndarray]:
    """A video for each seed, as chunks `(B, t, H, W, 3)` uint8 that follow each other; the same seed, the same video.

    Longer videos than the windows that the prior has learned go on from their own last frames (see `generate`).

    Args:
        codec: decodes; `codec.Pixels` where the prior makes pixels.
        frames: of each video, 1 + 4n where the codec has 4 frames in a latent.
        condition: a class for each seed; None asks for none.
        shape: (frames, height, width) of a window, as the prior sees it; None is what it was trained on.
        tile: pixels a side; decode larger frames in overlapping tiles.
        each_step: called after each Euler step of each window.

    Raises:
        ValueError: at the call, for what does not fit together.
    """
    latents = generate_latents(latte, codec, frames, seeds, condition, settings, shape, each_step)
    return (to_array(chunk) for chunk in codec.decode_stream(latents, tile=tile))


def generate_latents(
    latte: Latte,
    codec: Codec,
    frames: int,
    seeds: Sequence[int],
    condition: Condition | None = None,
    settings: Settings | None = None,
    shape: tuple[int, int, int] | None = None,
    each_step: Callable[[], object] | None = None,
) -> Iterator[Tensor]:
    """What `generate_videos` decodes: chunks `(B, C, t, h, w)`, denormalised, fp32."""
    settings = settings or Settings()
    count = latents_of(frames, codec.config.temporal_stride)
    if codec.config.latent_channels != latte.config.channels:
        raise ValueError(
            f"the prior has {latte.config.channels} channels, the autoencoder {codec.config.latent_channels}"
        )
    return generate(
        latte,
        count,
        seeds,
        shape,
        settings.overlap,
        condition,
        settings.steps,
        settings.guidance if condition and condition.asks else 1.0,
        settings.shift,
        each_step,
    )


def windows(frames: int, window: int, overlap: int) -> int:
    """How many windows `generate` samples for so many latent frames."""
    return 1 if frames <= window else 1 + math.ceil((frames - window) / (window - overlap))


def generate(
    model: Latte,
    frames: int,
    seeds: Sequence[int],
    shape: tuple[int, int, int] | None = None,
    overlap: int = 2,
    condition: Condition | None = None,
    steps: int = 100,
    guidance: float = 1.0,
    shift: float = 1.0,
    each_step: Callable[[], object] | None = None,
) -> Iterator[Tensor]:
    """Sample a clip of `frames` latent frames for each seed, any number, window by window.

    Yields `(B, C, t, H, W)`, fp32, denormalised: the first window, then of each further one what is new, given the
    last `overlap` frames before it. Only one window is held. A sample depends on its seed, not on its neighbours in
    the batch, and a longer clip begins with the shorter one: the last window is sampled whole and cut.

    shape       (frames, height, width) of a window, in latents; by default what the model was trained on
    condition   a class for each seed; None asks for none
    steps       Euler steps of each window [PV-VAE: 100]
    guidance    1 is none; needs classes
    each_step   called after each of the `windows(...) * steps` steps

    Raises:
        ValueError: at the call, for what does not fit together.
    """
    config = model.config
    shape = shape or config.shape
    if shape is None:
        raise ValueError("shape: give (frames, height, width) of a window; the model's config names none")
    if steps < 1:
        raise ValueError(f"steps is {steps}; sampling needs at least 1")
    if frames < 1 or not seeds:
        raise ValueError(f"frames is {frames}, seeds are {len(seeds)}; there is nothing to generate")
    if frames > shape[0]:
        if not 1 <= overlap < shape[0]:
            raise ValueError(f"overlap is {overlap}; a window of {shape[0]} can go on from 1 to {shape[0] - 1} frames")
        if not config.conditioning:
            raise ValueError(
                f"frames is {frames}: this model was trained without clean leading frames (conditioning: 0) "
                f"and cannot go on beyond one window of {shape[0]}"
            )
    if condition is not None and condition.classes is not None:
        if len(condition.classes) != len(seeds):
            raise ValueError(f"classes are {len(condition.classes)}, seeds {len(seeds)}; each sample needs one of both")
        check_classes(condition.classes.tolist(), config.classes)
    elif guidance != 1.0:
        raise ValueError(f"guidance is {guidance}; it needs classes to guide to")
    asked = condition if config.classes else None
    draws = [torch.Generator().manual_seed(seed) for seed in seeds]  # on the CPU: the same noise on every device

    def sample(clean: Tensor | None) -> Tensor:
        count = shape[0] - (0 if clean is None else clean.shape[2])
        frame = (config.channels, *shape[1:])
        noise = torch.stack([torch.stack([torch.randn(frame, generator=g) for _ in range(count)], 1) for g in draws])
        start = 0 if clean is None else 1
        velocity = guided(lambda x, t, c: model(x, t, c, start), asked, guidance)
        training = model.training
        model.eval()
        try:
            return euler(velocity, noise.to(model.latent_mean.device), steps, shift, clean, each_step)
        finally:
            model.train(training)

    return _chunks(model, sample, frames, overlap)


def _chunks(model: Latte, sample: Callable[[Tensor | None], Tensor], frames: int, overlap: int) -> Iterator[Tensor]:
    clean = None
    while frames > 0:
        chunk = sample(clean)
        seen = chunk if clean is None else torch.cat([clean, chunk], dim=2)
        clean = seen[:, :, -overlap:].clone()
        yield model.denormalise(chunk[:, :, :frames])
        frames -= chunk.shape[2]
