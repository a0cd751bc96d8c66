"""The interface to video autoencoders, which encode and decode a prior's latents, and what any of them can do."""

from __future__ import annotations

import itertools
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import encoder_digest
from longtake.datasets.loader import to_model, to_pixels
from longtake.training import registry
from longtake.training.registry import disk


class Posterior(NamedTuple):
    """A diagonal Gaussian over latents: `mean` and `logvar` are `(B, C, t, h, w)`, logvar in [-30, 20].

    A tuple, because DeepSpeed's ZeRO-3 hooks look for tensors in tuples but not in dataclasses.
    """

    mean: Tensor
    logvar: Tensor

    def mode(self) -> Tensor:
        return self.mean

    def sample(self, rng: torch.Generator | None = None) -> Tensor:
        """One draw, in the dtype of `mean`; `rng` lives on the same device."""
        noise = torch.randn(self.mean.shape, generator=rng, device=self.mean.device)
        return (self.mean.float() + torch.exp(0.5 * self.logvar.float()) * noise).to(self.mean.dtype)

    def kl(self) -> Tensor:
        """KL to N(0, 1) in nats per latent element, averaged over each sample: `(B,)`, fp32."""
        mean, logvar = self.mean.float(), self.logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(1)


class Codec(Protocol):
    """Video `(B, 3, g + f n, H, W)` in [-1, 1] <-> latents `(B, C, 1 + n, H / s, W / s)`, whole or as streams.

    The first latent stands for g frames: for 1 where time is causal, for f where all are alike.
    """

    @property
    def config(self) -> Any:
        """Has `temporal_stride`, frames in a latent but the first, `first_frames`, those of the first; `spatial_stride`,
        pixels a side; `latent_channels`."""

    @property
    def dtype(self) -> torch.dtype: ...

    def encode(self, video: Tensor) -> Posterior: ...

    def decode(self, latent: Tensor) -> Tensor: ...

    def encode_stream(self, chunks: Iterable[Tensor], chunk: int = 4, tile: int | None = None) -> Iterator[Posterior]:
        """Posteriors of one latent, then of `chunk` latents at once."""

    def decode_stream(self, latents: Iterable[Tensor], chunk: int = 4, tile: int | None = None) -> Iterator[Tensor]:
        """Videos of one latent, then of `chunk` latents at once."""


class Pixels(nn.Module):
    """The codec of a prior that generates pixels: videos are their own latents."""

    config = SimpleNamespace(temporal_stride=1, first_frames=1, spatial_stride=1, latent_channels=3)
    dtype = torch.float32

    def encode(self, video: Tensor) -> Posterior:
        return Posterior(video, torch.full_like(video, -30.0))

    def decode(self, latent: Tensor) -> Tensor:
        return latent

    def encode_stream(self, chunks: Iterable[Tensor], chunk: int = 4, tile: int | None = None) -> Iterator[Posterior]:
        yield from map(self.encode, chunks)

    def decode_stream(self, latents: Iterable[Tensor], chunk: int = 4, tile: int | None = None) -> Iterator[Tensor]:
        yield from latents


def latent_groups(frames: int, temporal_stride: int = 4, first: int = 1) -> int:
    """Latents of a clip of 1 + 4n frames, or `first` + 4n: 1 + n."""
    return 1 + (frames - first) // temporal_stride


def frames_of(groups: int, temporal_stride: int = 4, first: int = 1) -> int:
    """Frames of a clip of 1 + n latents: 1 + 4n, or `first` + 4n."""
    return first + (groups - 1) * temporal_stride


def nearest_lengths(frames: int, factor: int, first: int = 1) -> tuple[int, int]:
    """The lengths first + factor * n just below and above `frames`; both are `frames` if it is such a length."""
    low = first + max(0, frames - first) // factor * factor
    return low, low if low == frames else low + factor


def latents_of(frames: int, factor: int, first: int = 1) -> int:
    """The number of latents of a video of `frames`. ValueError unless that is first + factor * n."""
    low, high = nearest_lengths(frames, factor, first)
    if frames != low:
        raise ValueError(f"frames is {frames}; this model makes {first} + {factor}n frames, such as {low} or {high}")
    return latent_groups(frames, factor, first)


def frames_of_seconds(seconds: float, fps: float, factor: int, first: int = 1) -> int:
    """The smallest number of frames first + factor * n that lasts at least `seconds`."""
    return nearest_lengths(max(first, math.ceil(seconds * fps - 1e-6)), factor, first)[1]


def load_codec(uri: str) -> Any:
    """The autoencoder of the registry, of a model folder, or of a pipeline of another library.

    Raises:
        UserError: it is another model; and as `registry.load`.
    """
    return _codec_and_facts(uri)[0]


def _codec_and_facts(uri: str) -> tuple[Any, dict[str, Any]]:
    codec, facts = registry.load_with_facts(uri, "vae")
    if not hasattr(codec, "decode_stream"):
        raise UserError(f"{uri}: is a {type(codec).__name__}, not a video autoencoder; name a `pretrain_vae` model")
    return codec, facts


def decoder_of(uri: str, needed: Mapping[str, Any] | None, vae: str | None) -> tuple[Any, str]:
    """The codec that decodes a prior's latents, and the digest of its weights.

    Args:
        uri: of the prior, for messages.
        needed: `uri` and `encoder` digest of the prior's own autoencoder; None for a prior of pixels, which gets `Pixels`.
        vae: URI of another autoencoder with the same encoder.

    Raises:
        UserError: `vae` has another encoder, or the prior needs none.
    """
    if needed is None:
        if vae is not None:
            raise UserError(f"{uri}: makes pixels and needs no autoencoder; leave it out")
        return Pixels(), ""
    codec, facts = _codec_and_facts(vae or needed["uri"])
    if encoder_digest(codec) != needed["encoder"]:
        raise UserError(
            f"{vae or needed['uri']}: has another encoder than the latents that {uri} was trained on; name {needed['uri']}"
        )
    return codec, disk.digest(facts)


def decoded(codec: Codec, latent: Tensor) -> Tensor:
    """Latents `(B, C, t, h, w)`, denormalised, as videos `(B, 3, T, H, W)` uint8."""
    return to_pixels(torch.cat(list(codec.decode_stream([latent])), dim=2))


@torch.no_grad()
def reconstruct_video(
    codec: Any,
    frames: Iterable[np.ndarray],
    visible: int | None = None,
    tile: int | None = None,
    chunk: int = 4,
    seed: int = 0,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Reconstruct a video of any length: yields pairs of its frames and their reconstruction, both `(t, H, W, 3)` uint8.

    A length that the codec cannot divide is padded with the last frame; the reconstruction is cut to the video's length.

    Args:
        frames: `(H, W, 3)` uint8, sides in multiples of the codec's stride.
        visible: number of frames that the encoder sees, 1 + 4n; all others are predicted. None shows everything.
        chunk: latents at once.
        seed: of padding that is noise.

    Raises:
        ValueError: a size that does not divide; a video with fewer frames than `visible`; `visible` with a codec that
            does not predict.
    """
    factor, first = codec.config.temporal_stride, codec.config.first_frames
    if visible is not None and (visible < 1 or (visible - 1) % factor):
        low, high = nearest_lengths(visible, factor)
        raise ValueError(f"visible is {visible}; the model sees 1 + {factor}n frames, such as {low} or {high}")
    if visible is not None and getattr(codec, "padding", None) is None:
        raise ValueError("visible: this model does not predict frames; leave it out")
    device = next(codec.parameters()).device
    rng = torch.Generator(device).manual_seed(seed)
    source = iter(frames)
    waiting: deque[np.ndarray] = deque()  # frames read whose reconstruction is still to come
    read = 0

    def next_frames(count: int) -> list[np.ndarray]:
        nonlocal read
        batch = list(itertools.islice(source, count))
        waiting.extend(batch)
        read += len(batch)
        return batch

    def visible_chunks() -> Iterator[Tensor]:
        last = None
        while batch := next_frames(factor * chunk if visible is None else min(factor * chunk, visible - read)):
            last = batch[-1]
            yield to_tensor(batch, device)
        if last is None:
            raise ValueError("the video has no frame")
        if visible is not None and read < visible:
            raise ValueError(f"visible is {visible}, but the video has only {read} frames")
        if missing := -(read - first) % factor:
            yield to_tensor([last] * missing, device)

    def latents() -> Iterator[Tensor]:
        latent = None
        for posterior in codec.encode_stream(visible_chunks(), chunk, tile):
            latent = posterior.mode()
            yield latent
        while visible is not None and (hidden := next_frames(factor * chunk)):
            assert latent is not None
            yield codec.pad(latent[:, :, :0], math.ceil(len(hidden) / factor), rng)

    for video in codec.decode_stream(latents(), chunk, tile):
        reconstruction = to_array(video)[0]
        originals = [waiting.popleft() for _ in range(min(len(reconstruction), len(waiting)))]
        if originals:
            yield np.stack(originals), reconstruction[: len(originals)]


def reconstruct_arrays(codec: Any, video: np.ndarray) -> np.ndarray:
    """Reconstruct videos `(B, T, H, W, 3)` uint8: an array of the same shape and type.

    Raises:
        UserError: the array is not of that shape and type, or the model cannot divide it.
    """
    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 5 or video.shape[-1] != 3:
        got = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
        raise UserError(f"videos: need a uint8 array (B, T, H, W, 3), got {got}")
    device = next(codec.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 4, 1, 2, 3).to(device)
    with torch.inference_mode():
        try:
            reconstruction = codec.reconstruct(to_model(pixels))
        except ValueError as e:
            raise UserError(f"videos: {e}") from e
    return to_array(reconstruction)


def served(folder: str) -> Callable[[np.ndarray], np.ndarray]:
    """What the autoencoder of a model folder answers to videos (see `Kind.answer`): `reconstruct_arrays`."""
    from longtake.training.engines import device  # not at hand where models are only loaded

    return partial(reconstruct_arrays, disk.load(Path(folder)).to(device()))


def to_tensor(frames: Sequence[np.ndarray], device: torch.device) -> Tensor:
    """Frames `(H, W, 3)` uint8 -> `(1, 3, T, H, W)` in [-1, 1]."""
    return to_model(torch.from_numpy(np.stack(frames)).to(device).permute(3, 0, 1, 2)[None])


def to_array(video: Tensor) -> np.ndarray:
    """`(B, 3, T, H, W)` in about [-1, 1] -> `(B, T, H, W, 3)` uint8. Failure for values that are no numbers."""
    if not video.isfinite().all():
        raise Failure(
            "the model makes values that are no numbers: it is damaged or not trained, or its guidance is too high"
        )
    return to_pixels(video).permute(0, 2, 3, 4, 1).cpu().numpy()
