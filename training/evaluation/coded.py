"""Held-out clips as an autoencoder takes them: as long as it divides, and as latents."""

from __future__ import annotations

from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training.evaluation.asking import refusing
from longtake.training.evaluation.subject import Subject
from longtake.training.models.common.codec import nearest_lengths


def whole(subject: Subject, video: Tensor) -> Tensor:
    """A clip uint8 (1, 3, T, H, W) in [-1, 1], without frames at its end that fill no latent.

    Raises:
        UserError: it is too short for the autoencoder, or of a size that it does not divide.
    """
    config, (frames, height, width) = subject.module.config, video.shape[2:]
    length = _length(subject, frames)
    if length > frames:
        raise UserError(f"clips: frames: {frames} are too few for {subject.uri}, which takes at least {length}")
    if height % config.spatial_stride or width % config.spatial_stride:
        raise UserError(
            f"clips: size: {height}x{width}; {subject.uri} takes sides in multiples of {config.spatial_stride}"
        )
    return to_model(video[:, :, :length])


def latents(subject: Subject, video: Tensor) -> Tensor:
    """The most likely latents (1, C, t, h, w) of a clip in [-1, 1], fp32. UserError where the autoencoder is of no videos."""
    with refusing(subject.uri):
        found = subject.module.encode(video)
    latent: Tensor = found if isinstance(found, Tensor) else found.mode()
    return latent.float()


def left_over(subject: Subject, frames: int) -> list[str]:
    """A note on frames that fill no latent; none where all do."""
    missing = frames - _length(subject, frames)
    return [f"without the last {missing} of {frames} frames, which fill no latent"] if missing > 0 else []


def _length(subject: Subject, frames: int) -> int:
    config = subject.module.config
    return nearest_lengths(frames, config.temporal_stride, config.first_frames)[0]
