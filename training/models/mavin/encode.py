"""Clips beside a gap as latents that have not seen it.

With an autoencoder that is causal in time, the latents of frames after a gap know the frames in it when all are encoded
together, and a model would learn to read the answer there. So A and B are encoded each as a clip of its own, in training
as in use. What is to be made goes on from A: M is encoded, and decoded, after it. See `MavinConfig` for the lengths.

Where a latent stands for several frames, a gap may have any number of them nevertheless: B begins some frames `early`,
before the last latent of M ends, and as many frames at the end of M are left out when it is decoded.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.training.models.common.codec import Codec, frames_of, nearest_lengths


def gap_frames(codec: Codec, latents: int) -> int:
    """Frames of a gap of so many latents, which go on from the clip before."""
    return int(latents * codec.config.temporal_stride)


def gap_latents(codec: Codec, frames: int) -> int:
    """Latents of the shortest gap that has at least so many frames."""
    return -(-frames // int(codec.config.temporal_stride))


def window_frames(codec: Codec, latents: int) -> int:
    """Frames of a window A | M | B of so many latents: the same wherever its span is."""
    return int(2 * codec.config.first_frames + codec.config.temporal_stride * (latents - 2))


def window_latents(codec: Codec, frames: int) -> int:
    """Latents of a window A | M | B of so many frames. ValueError for a length that does not divide."""
    factor, least = codec.config.temporal_stride, 2 * codec.config.first_frames
    low, high = nearest_lengths(frames, factor, least)
    if frames != low:
        raise ValueError(
            f"a window of {frames} frames: of this autoencoder it needs {least} + {factor}n, such as {low} or {high}"
        )
    return int(2 + (frames - least) // factor)


def frames_of_span(codec: Codec, start: int, end: int) -> tuple[int, int]:
    """The frames of a window's span, (first, one after the last), from its latents."""
    begin = frames_of(start, codec.config.temporal_stride, codec.config.first_frames)
    return begin, begin + gap_frames(codec, end - start)


@torch.no_grad()
def encode_clip(codec: Codec, video: Tensor) -> Tensor:
    """A clip (B, 3, T, H, W) in [-1, 1], encoded by itself: the means of its latents, (B, C, n, h, w), fp32."""
    return codec.encode(video.to(codec.dtype)).mode().float()


def encode_apart(codec: Codec, before: Tensor, after: Tensor) -> tuple[Tensor, Tensor]:
    """The clips before and after a gap, (B, 3, T, H, W) each, as latents that know neither the gap nor each other."""
    return encode_clip(codec, before), encode_clip(codec, after)


def encode_window(codec: Codec, video: Tensor, start: int, end: int, early: int = 0) -> Tensor:
    """Windows A | M | B (B, 3, T, H, W) with their span at latents start to end - 1, as latents (B, C, t, h, w).

    B begins `early` frames before M ends, fewer than those of a latent; as many frames at the end of the window are not used.
    """
    latents = window_latents(codec, video.shape[2])
    if not 0 < start < end < latents:
        raise ValueError(f"span {start} to {end} does not leave a clip on either side of a window of {latents} latents")
    begin, stop = frames_of_span(codec, start, end)
    assert 0 <= early < codec.config.temporal_stride
    before, after = encode_apart(codec, video[:, :, :begin], video[:, :, stop - early : video.shape[2] - early])
    # not the first latents of this: where time is not causal they have seen the span
    middle = encode_clip(codec, video[:, :, :stop])[:, :, start:]
    return torch.cat([before, middle, after], dim=2)


def encode_windows(
    codec: Codec, video: Tensor, spans: Sequence[tuple[int, int]], early: Sequence[int] | None = None
) -> Tensor:
    """The same of windows that have each their own span; B begins early in none of them where nothing is said."""
    rows = zip(video.split(1), spans, early or [0] * len(spans), strict=True)
    return torch.cat([encode_window(codec, one, *span, sooner) for one, span, sooner in rows])


def boundary_frames(
    codec: Codec, video: Tensor, spans: Sequence[tuple[int, int]], early: Sequence[int] | None = None
) -> Tensor:
    """The last frame before the span of each window and the first one of B, (B, 2, 3, H, W)."""
    places = [frames_of_span(codec, *span) for span in spans]
    rows = zip(video, places, early or [0] * len(spans), strict=True)
    # not by a list as an index, which would be copied to the device and waited for
    pairs = [torch.stack([one[:, begin - 1], one[:, stop - sooner]]) for one, (begin, stop), sooner in rows]
    return torch.stack(pairs)
