"""What a memory has kept of a video: its frames, retrieved from the memory alone (arXiv 2512.23851)."""

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_pixels
from longtake.training.models.common.codec import frames_of
from longtake.training.models.generator import Settings
from longtake.training.models.memory import history
from longtake.training.models.memory.history import encoded
from longtake.training.models.memory.prior import MemoryPrior, video_of


@torch.no_grad()
def recall(
    prior: MemoryPrior, frames: np.ndarray, last: int | None = None, seed: int = 0, settings: Settings | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What a memory of a video has kept of its frames, and what the autoencoder alone keeps: both `(n, H, W, 3)` uint8.

    The memory is of the first `prior.holds(...)` frames. The steps from the first on to that of frame `last` are
    retrieved, since the decoder looks back, and n is how many frames they make.

    Args:
        frames: `(t, H, W, 3)` uint8.
        last: the last frame that is wanted; None is the last of the memory.
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
        steps = encoded(model, prior.codec, video_of(frames[:count]))
        memory = history.remembered(model, steps)
    except ValueError as e:
        raise UserError(f"video: {e}") from e
    draws = torch.Generator().manual_seed(seed)
    # some random ones at a time, as in training
    times = torch.randperm(1 + -(-last // factor), generator=draws)
    shape = (steps.high.shape[3], steps.high.shape[4])
    made = history.retrieve(model, memory, times.tolist(), shape, draws, settings.steps, settings.shift)
    return _decoded(prior, made[:, :, times.argsort()]), _decoded(prior, steps.high[:, :, : len(times)])


def _decoded(prior: MemoryPrior, steps: Tensor) -> np.ndarray:
    """Normalised steps as frames `(n, H, W, 3)` uint8."""
    chunks = prior.codec.decode_stream([prior.model.denormalise(steps)])
    return np.concatenate([to_pixels(chunk)[0].permute(1, 2, 3, 0).cpu().numpy() for chunk in chunks])


def recall_each(prior: MemoryPrior, videos: np.ndarray) -> np.ndarray:
    """What the memory of each of some videos `(B, T, H, W, 3)` uint8 has kept, of all frames it is of. Raises UserError."""
    if not isinstance(videos, np.ndarray) or videos.ndim != 5 or not len(videos):
        got = f"{videos.dtype} {videos.shape}" if isinstance(videos, np.ndarray) else type(videos).__name__
        raise UserError(f"videos: need a uint8 array (B, T, H, W, 3), got {got}")
    return np.stack([recall(prior, video)[0] for video in videos])
