"""Generated videos as arrays and files: joined chunks, grids and H.264."""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets import clip, storage
from longtake.datasets.loader import to_pixels
from longtake.training.models.common.joints import comment_of

_GAP = 2  # pixels between neighbours in a grid


def concatenated(chunks: Iterable[np.ndarray]) -> np.ndarray:
    """Chunks `(B, t, H, W, 3)` as one array `(B, T, H, W, 3)`."""
    return np.concatenate(list(chunks), axis=1)


def grid(videos: np.ndarray) -> np.ndarray:
    """Arrange the videos of a chunk `(B, t, H, W, 3)` in an almost square grid: `(t, H', W', 3)`."""
    count, frames, height, width, _ = videos.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    out = np.zeros((frames, rows * (height + _GAP) - _GAP, columns * (width + _GAP) - _GAP, 3), np.uint8)
    for n, video in enumerate(videos):
        top, left = n // columns * (height + _GAP), n % columns * (width + _GAP)
        out[:, top : top + height, left : left + width] = video
    return out


def write_panels(path: Path, panels: Sequence[Tensor], scale: int = 3) -> None:
    """Write a video of panels side by side, each (1, 3, T, H, W) in [-1, 1], enlarged without smoothing."""
    wide = torch.cat(list(panels), dim=4)[0].permute(1, 2, 3, 0)
    pixels = to_pixels(wide).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    clip.write(path, pixels.cpu().numpy(), fps=6)


@contextmanager
def video_file(
    path: str | Path,
    fps: float,
    crf: int = 16,
    sound: tuple[np.ndarray, int] | None = None,
    joints: Sequence[int] = (),
) -> Iterator[Callable[[np.ndarray], None]]:
    """Write an H.264 file to a path or fsspec URL, chunk by chunk `(t, H, W, 3)` uint8 with even H and W.

    It has the sound, samples (channels, n) float32 and their rate, from its first frame on. The joints, the frames at which
    new clips begin, are written in its comment (see `joints`). The file appears complete after the block, or not at all. The
    same frames give the same bytes. Raises Failure if it cannot be written.
    """
    import av

    options = {"fflags": "+bitexact", "movflags": "+faststart"}
    with storage.staged(str(path)) as scratch:
        with av.open(str(scratch), "w", format="mp4", container_options=options) as container:
            if joints:
                container.metadata["comment"] = comment_of(joints)
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
        if sound:
            clip.write_with_sound(scratch, scratch.read_bytes(), *sound)
