"""What a memory keeps of a video: its frames, retrieved from the memory alone (arXiv 2512.23851)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_pixels
from longtake.training.models.common.codec import frames_of
from longtake.training.models.generator import Retriever, Settings
from longtake.training.models.memory import retrieval
from longtake.training.models.memory.history import encode_video, memory_of
from longtake.training.models.memory.prior import MemoryPrior, prior_of, to_tensor


@torch.no_grad()
def recall(
    prior: MemoryPrior, frames: np.ndarray, last: int | None = None, seed: int = 0, settings: Settings | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The frames that a memory of a video keeps, and those that the autoencoder alone keeps: both `(n, H, W, 3)` uint8.

    The memory is of the first `prior.holds(...)` frames. Since the decoder looks back, all latents up to that of frame
    `last` are retrieved; n is the number of their frames.

    Args:
        frames: `(t, H, W, 3)` uint8.
        last: the last frame that is needed; None is the last of the memory.
        settings: None is what the model was registered with.

    Raises:
        UserError: another array, too few frames, or a model without a memory.
    """
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise UserError(f"video: needs a uint8 array (T, H, W, 3), got {got}")
    model, settings = prior.model, settings or prior.settings
    if not len(model.memory):
        raise UserError("this model has no memory to retrieve from; name one with another `memory` than none")
    factor = prior.codec.config.temporal_stride
    count = prior.holds(len(frames))
    if not count:
        raise UserError(
            f"video: has {len(frames)} frames; a memory takes at least {frames_of(model.config.group, factor)}"
        )
    last = count - 1 if last is None else last
    if not 0 <= last < count:
        raise UserError(f"video: frame {last} is none of the {count} that the memory is of")
    try:
        stretch = encode_video(model, prior.codec, to_tensor(frames[:count]))
        memory = memory_of(model, stretch)
    except ValueError as e:
        raise UserError(f"video: {e}") from e
    rng = torch.Generator().manual_seed(seed)
    # some random ones at a time, as many as training had
    times = torch.randperm(1 + -(-last // factor), generator=rng)
    shape = (stretch.high.shape[3], stretch.high.shape[4])
    latents = retrieval.retrieve(
        model, memory, times.tolist(), shape, rng, settings.steps, settings.shift, None, prior.at_once
    )
    return _decode(prior, latents[:, :, times.argsort()]), _decode(prior, stretch.high[:, :, : len(times)])


def retriever_of(uri: str, model: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> Retriever:
    """Make a retriever of a loaded model. Raises as `prior.load_prior`."""
    prior = prior_of(uri, model, facts, vae, dtype, "retrieval")
    return Retriever(prior.fps, prior.size, prior.settings, prior.holds, partial(recall, prior))


def _decode(prior: MemoryPrior, latents: Tensor) -> np.ndarray:
    """Normalised latents as frames `(n, H, W, 3)` uint8."""
    chunks = prior.codec.decode_stream([prior.model.denormalise(latents)])
    return np.concatenate([to_pixels(chunk)[0].permute(1, 2, 3, 0).cpu().numpy() for chunk in chunks])


def recall_each(prior: MemoryPrior, videos: np.ndarray) -> np.ndarray:
    """The frames that a memory of each video `(B, T, H, W, 3)` uint8 keeps, of all that it holds. Raises UserError."""
    if not isinstance(videos, np.ndarray) or videos.ndim != 5 or not len(videos):
        got = f"{videos.dtype} {videos.shape}" if isinstance(videos, np.ndarray) else type(videos).__name__
        raise UserError(f"videos: need a uint8 array (B, T, H, W, 3), got {got}")
    return np.stack([recall(prior, video)[0] for video in videos])
