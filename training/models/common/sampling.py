"""Videos from models: a prior's latents window by window, decoded in a stream; and any video through an autoencoder.

Memory depends on the size of the frames and on how many videos are made at once, not on their length.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.latents import encoder_digest
from longtake.datasets.loader import to_model, to_pixels
from longtake.training import registry
from longtake.training.models.common.flow import NO_CLASS
from longtake.training.models.latte.model import Latte, check_classes, generate, windows
from longtake.training.models.pv_vae.model import PVVAE, latent_groups

_GAP = 2  # pixels between the videos of a grid


@dataclass(frozen=True)
class Settings:
    """How to sample. PV-VAE: 100 Euler steps, no shift; the others are choices.

    steps      Euler steps of a window
    guidance   towards the class, 1 is none; without a class it has no effect
    shift      of the flow's times towards noise
    overlap    latent steps (frames, for a prior of pixels) of a window that are given by the one before
    history_noise   level of noise, 0 to 1, that a model with a memory is given its past with; 0 is none
    """

    steps: int = 100
    guidance: float = 1.0
    shift: float = 1.0
    overlap: int = 2
    history_noise: float = 0.0


@dataclass(frozen=True)
class Prior:
    """A registered prior with the autoencoder that makes videos of its latents; `vae` is None for one of pixels.

    `classes` are the names of its classes in the order of their ids, `frames` those of a window, `fps` of what it has
    learned from.
    """

    latte: Latte
    vae: PVVAE | None
    classes: Sequence[str]
    frames: int
    fps: float
    settings: Settings

    def class_id(self, given: str | None) -> int:
        """The id of a class by its name or number; -1 for None. UserError where there is none such."""
        return class_id(given, self.classes)


def class_id(given: str | None, classes: Sequence[str]) -> int:
    """Which of a model's classes, by name or number, is meant; -1 for None. UserError where there is none such."""
    if given is None:
        return NO_CLASS
    if given in classes:
        return classes.index(given)
    try:
        number = int(given)
        check_classes([number], len(classes))
        if number == NO_CLASS:
            raise ValueError
    except ValueError as e:
        if not classes:
            raise UserError(f"class {given!r}: this model has no classes; leave it out") from e
        near = difflib.get_close_matches(given, classes, 3, 0.4) or classes[:5]
        raise UserError(
            f"class {given!r}: this model has {len(classes)} classes, by name such as {', '.join(near)},"
            f" or by number 0 to {len(classes) - 1}"
        ) from e
    return number


def load_prior(uri: str, vae: str | None = None, dtype: torch.dtype = torch.float32) -> Prior:
    """A prior of the registry ("models:/latte@champion") or of a model folder, on the GPU where there is one.

    Args:
        vae: decode by this autoencoder and not by the one that the prior names; its encoder must be the same.

    Raises:
        UserError: no such model; it is no Latte; the autoencoder is another one.
        Failure: the store cannot be reached; or a model is damaged.
    """
    return prior_of(uri, *registry.load_with_facts(uri), vae, dtype)


def prior_of(uri: str, latte: nn.Module, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> Prior:
    """`load_prior` of a model that is loaded."""
    if not isinstance(latte, Latte):
        raise UserError(f"{uri}: is a {type(latte).__name__}, which generates no videos; name a `finetune_latte` model")
    if facts.get("vae") is None and vae is not None:
        raise UserError(f"{uri}: makes pixels and needs no autoencoder; leave it out")
    decoder = decoder_of(uri, facts["vae"], vae)[0] if facts.get("vae") else None
    device, window = best_device(), facts["window"]
    return Prior(
        latte.to(device, dtype),
        decoder and decoder.to(device, dtype),
        tuple(facts["classes"]),
        window["frames"],
        window["fps"],
        Settings(**facts["sampling"]),
    )


def best_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def decoder_of(uri: str, needed: Mapping[str, Any], vae: str | None) -> tuple[PVVAE, str]:
    """The autoencoder that a prior names in `needed`, or this one, and its weights' digest.

    UserError where its encoder is another.
    """
    decoder, facts = _load_vae(vae or needed["uri"])
    if encoder_digest(decoder) != needed["encoder"]:
        raise UserError(
            f"{vae or needed['uri']}: has another encoder than the latents that {uri} was trained on; name {needed['uri']}"
        )
    return decoder, registry.digest(facts)


def load_vae(uri: str) -> PVVAE:
    """Raises UserError where the model is no PV-VAE, and as `registry.load`."""
    return _load_vae(uri)[0]


def _load_vae(uri: str) -> tuple[PVVAE, dict[str, Any]]:
    vae, facts = registry.load_with_facts(uri)
    if not isinstance(vae, PVVAE):
        raise UserError(f"{uri}: is a {type(vae).__name__}, not a video autoencoder; name a `pretrain_vae` model")
    return vae, facts


def nearest_lengths(frames: int, factor: int) -> tuple[int, int]:
    """The lengths 1 + factor * n around `frames`, or twice itself where it is one."""
    low = 1 + max(0, frames - 1) // factor * factor
    return low, low if low == frames else low + factor


def frames_of_seconds(seconds: float, fps: float, vae: PVVAE | None) -> int:
    """The least number of frames, 1 + 4n where there is an autoencoder, that lasts so long."""
    frames = max(1, math.ceil(seconds * fps - 1e-6))
    return frames if vae is None else nearest_lengths(frames, vae.config.temporal_stride)[1]


def latent_frames(frames: int, vae: PVVAE | None) -> int:
    """What so many frames are for the prior. ValueError where no latents are of so many."""
    if vae is None:
        return frames
    factor = vae.config.temporal_stride
    low, high = nearest_lengths(frames, factor)
    if frames < 1 or low != high:
        raise ValueError(f"frames is {frames}; this model makes 1 + {factor}n frames, such as {low} or {high}")
    return latent_groups(frames, factor)


def rounds(prior: Prior, frames: int, settings: Settings) -> int:
    """How often `generate_videos` calls its `each_step`."""
    assert prior.latte.config.shape
    count = latent_frames(frames, prior.vae)
    return windows(count, prior.latte.config.shape[0], settings.overlap) * settings.steps


def generate_videos(
    latte: Latte,
    vae: PVVAE | None,
    frames: int,
    seeds: Sequence[int],
    classes: Sequence[int] | None = None,
    settings: Settings | None = None,
    shape: tuple[int, int, int] | None = None,
    tile: int | None = None,
    each_step: Callable[[], object] | None = None,
) -> Iterator[np.ndarray]:
    """A video for each seed, as chunks `(B, t, H, W, 3)` uint8 that follow each other; the same seed, the same video.

    Longer videos than the windows that the prior has learned go on from their own last frames (see `latte.generate`).

    Args:
        vae: decodes; None where the prior makes pixels.
        frames: of each video, 1 + 4n where there is an autoencoder.
        classes: an id for each seed, -1 for none.
        shape: (frames, height, width) of a window, as the prior sees it; None is what it was trained on.
        tile: pixels a side; decode larger frames in overlapping tiles.
        each_step: called after each of the `rounds(...)`.

    Raises:
        ValueError: at the call, for what does not fit together.
    """
    latents = generate_latents(latte, vae, frames, seeds, classes, settings, shape, each_step)
    made = latents if vae is None else vae.decode_stream(latents, tile=tile)
    return (_to_array(chunk) for chunk in made)


def generate_latents(
    latte: Latte,
    vae: PVVAE | None,
    frames: int,
    seeds: Sequence[int],
    classes: Sequence[int] | None = None,
    settings: Settings | None = None,
    shape: tuple[int, int, int] | None = None,
    each_step: Callable[[], object] | None = None,
) -> Iterator[Tensor]:
    """What `generate_videos` decodes: chunks `(B, C, t, h, w)`, denormalised, fp32; the videos, where there is no autoencoder."""
    settings = settings or Settings()
    count = latent_frames(frames, vae)
    if vae is not None and vae.config.latent_channels != latte.config.channels:
        raise ValueError(
            f"the prior has {latte.config.channels} channels, the autoencoder {vae.config.latent_channels}"
        )
    guided = classes is not None and any(c != NO_CLASS for c in classes)
    return generate(
        latte,
        count,
        seeds,
        shape,
        settings.overlap,
        classes,
        settings.steps,
        settings.guidance if guided else 1.0,
        settings.shift,
        each_step,
    )


def decoded(vae: PVVAE | None, latent: Tensor) -> Tensor:
    """Latents `(B, C, t, h, w)`, denormalised, as videos `(B, 3, T, H, W)` uint8; they are videos where there is no autoencoder."""
    return to_pixels(latent if vae is None else torch.cat(list(vae.decode_stream([latent])), dim=2))


def whole(chunks: Iterable[np.ndarray]) -> np.ndarray:
    """Chunks `(B, t, H, W, 3)` as one array."""
    return np.concatenate(list(chunks), axis=1)


def grid(videos: np.ndarray) -> np.ndarray:
    """Chunks `(B, t, H, W, 3)` of videos side by side, in rows as many as there are columns or one less: `(t, H', W', 3)`."""
    count, frames, height, width, _ = videos.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    out = np.zeros((frames, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), np.uint8)
    for n, video in enumerate(videos):
        top, left = n // columns * (height + _GAP), n % columns * (width + _GAP)
        out[:, top : top + height, left : left + width] = video
    return out


@torch.no_grad()
def reconstruct_video(
    vae: PVVAE,
    frames: Iterable[np.ndarray],
    visible: int | None = None,
    tile: int | None = None,
    steps: int = 4,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """What an autoencoder makes of a video of any length: pairs of its frames and ours, both `(t, H, W, 3)` uint8.

    A length that is not 1 + 4n is filled up with the last frame, and cut again.

    Args:
        frames: `(H, W, 3)` uint8, sides in multiples of 16.
        visible: the encoder sees so many frames, 1 + 4n; all others are predicted. None shows everything.
        steps: latent steps at once.
        seed: of padding that is noise.

    Raises:
        ValueError: a size that does not divide; a video with fewer frames than are to be visible.
    """
    factor = vae.config.temporal_stride
    if visible is not None and (visible < 1 or (visible - 1) % factor):
        low, high = nearest_lengths(visible, factor)
        raise ValueError(f"visible is {visible}; the model sees 1 + {factor}n frames, such as {low} or {high}")
    device = next(vae.parameters()).device
    generator = torch.Generator(device).manual_seed(seed)
    source = iter(frames)
    waiting: deque[np.ndarray] = deque()  # frames whose reconstruction is to come
    read = 0

    def taken(count: int) -> list[np.ndarray]:
        nonlocal read
        some = list(itertools.islice(source, count))
        waiting.extend(some)
        read += len(some)
        return some

    def seen() -> Iterator[Tensor]:
        last = None
        while some := taken(factor * steps if visible is None else min(factor * steps, visible - read)):
            last = some[-1]
            yield _to_tensor(some, device)
        if last is None:
            raise ValueError("the video has no frame")
        if visible is not None and read < visible:
            raise ValueError(f"visible is {visible}, but the video has only {read} frames")
        if missing := -(read - 1) % factor:
            yield _to_tensor([last] * missing, device)

    def latents() -> Iterator[Tensor]:
        latent = None
        for posterior in vae.encode_stream(seen(), steps, tile):
            latent = posterior.mode()
            yield latent
        while visible is not None and (some := taken(factor * steps)):
            assert latent is not None
            yield vae.pad(latent[:, :, :0], math.ceil(len(some) / factor), generator)

    for chunk in vae.decode_stream(latents(), steps, tile):
        made = _to_array(chunk)[0]
        shown = [waiting.popleft() for _ in range(min(len(made), len(waiting)))]
        if shown:
            yield np.stack(shown), made[: len(shown)]


@contextmanager
def video_file(path: str | Path, fps: float, crf: int = 16) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an H.264 file, chunk by chunk `(t, H, W, 3)` uint8, H and W even: there whole after the block, or not at all.

    The same frames give the same bytes. Any fsspec URL. Raises Failure where it cannot be written.
    """
    import av

    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with (
        storage.staged(str(path)) as scratch,
        av.open(str(scratch), "w", format="mp4", container_options=options) as container,
    ):
        rate = Fraction(fps).limit_denominator(1001)
        stream: Any = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "mbtree": "0"})
        stream.pix_fmt, stream.codec_context.thread_count = "yuv420p", 1

        def write(frames: np.ndarray) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frames.shape[1:3]
            for frame in frames:
                image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                container.mux(stream.encode(image))

        yield write
        container.mux(stream.encode())


def _to_tensor(frames: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Frames `(H, W, 3)` uint8 -> `(1, 3, T, H, W)` in [-1, 1]."""
    return to_model(torch.from_numpy(np.stack(frames)).to(device).permute(3, 0, 1, 2)[None])


def _to_array(video: Tensor) -> np.ndarray:
    """`(B, 3, T, H, W)` in about [-1, 1] -> `(B, T, H, W, 3)` uint8."""
    return to_pixels(video).permute(0, 2, 3, 4, 1).cpu().numpy()
