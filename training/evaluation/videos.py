"""Videos that an evaluation has made: kept without loss, found again by what was asked for, and read chunk by chunk."""

import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.clip import covering_size
from longtake.datasets.errors import Failure
from longtake.datasets.shard import sha256_of
from longtake.training.evaluation.clips import ticks
from longtake.training.models.common.video import video_file

LOSSLESS, SHOWN, FACTS = "video.mkv", "video.mp4", "video.json"
_FACTS = {"seconds", "frames", "fps", "size", "sha256"}  # of each video


class Kept(NamedTuple):
    """A video on the disk: its folder, its `facts` (`frames`, `fps`, `size` and what its maker says of it)."""

    folder: Path
    facts: Mapping[str, Any]

    @property
    def fps(self) -> float:
        return float(self.facts["fps"])

    def frames(self) -> Iterator[np.ndarray]:
        """Its frames (H, W, 3) uint8, the same that were written. Raises Failure where the file is damaged."""
        import av

        path = self.folder / LOSSLESS
        count = 0
        try:
            # a decoder shows something else in place of what it cannot read
            if sha256_of(path) != self.facts["sha256"]:
                raise ValueError("its bytes are not those that were written")
            with av.open(str(path)) as container:
                for frame in container.decode(video=0):
                    yield frame.to_ndarray(format="rgb24")
                    count += 1
        except (av.error.FFmpegError, IndexError, ValueError, OSError) as e:
            raise Failure(f"{path}: damaged ({e}); delete its folder and run the same command again") from e
        assert count == self.facts["frames"], path


def key_of(asked: Mapping[str, Any]) -> str:
    """The name of what was asked for: 16 hex digits."""
    return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:16]


def find(folder: Path) -> Kept | None:
    """The video of a folder, if it was finished and both of its files are there. Raises Failure where its facts are damaged."""
    try:
        facts = json.loads((folder / FACTS).read_bytes())
        if missing := _FACTS - facts.keys():
            raise ValueError(f"no {min(missing)}")
        whole = all((folder / name).is_file() for name in (LOSSLESS, SHOWN))
        return Kept(folder, facts) if whole else None
    except FileNotFoundError:
        return None
    except (OSError, ValueError, AttributeError) as e:
        raise Failure(f"{folder / FACTS}: damaged ({e}); delete its folder and run the same command again") from e


def keep(folder: Path, frames: Iterable[np.ndarray], fps: float, facts: Mapping[str, Any], timed: bool = True) -> Kept:
    """Write frames (H, W, 3) uint8 as they come; the facts come last, and say that the video is whole.

    Beside the lossless file is one to look at, whose sides are even: an odd one loses its last pixel. The fact `seconds`
    is how long the frames took, None where they are not `timed`.
    """
    count, size, seconds = 0, (0, 0), 0.0
    folder.mkdir(parents=True, exist_ok=True)
    storage.sweep(str(folder))
    with _lossless(folder / LOSSLESS, fps) as write, video_file(folder / SHOWN, fps) as show:
        since = time.perf_counter()
        for frame in frames:
            seconds += time.perf_counter() - since
            write(frame)
            height, width = (side // 2 * 2 for side in frame.shape[:2])
            show(frame[None, :height, :width])
            count, size = count + 1, (frame.shape[0], frame.shape[1])
            since = time.perf_counter()
        seconds += time.perf_counter() - since
    found = {**facts, "seconds": seconds if timed else None, "frames": count, "fps": fps, "size": list(size)}
    found["sha256"] = sha256_of(folder / LOSSLESS)
    storage.write(str(folder / FACTS), storage.canonical_json(found))
    return Kept(folder, found)


def forget(folder: Path) -> None:
    """Remove a video."""
    shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _lossless(path: Path, fps: float) -> Iterator[Callable[[np.ndarray], None]]:
    """Write FFV1 frame by frame; the file appears whole, or not at all."""
    import av

    options = {"fflags": "+bitexact"}
    with (
        storage.staged(str(path)) as scratch,
        av.open(str(scratch), "w", format="matroska", container_options=options) as container,
    ):
        stream: Any = container.add_stream("ffv1", rate=Fraction(fps).limit_denominator(1001))
        stream.pix_fmt, stream.codec_context.thread_count = "bgr0", 1

        def write(frame: np.ndarray) -> None:
            if not stream.codec_context.is_open:
                stream.height, stream.width = frame.shape[:2]
            image = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
            container.mux(stream.encode(image))

        yield write
        container.mux(stream.encode())


def at(frames: Iterable[np.ndarray], count: int, fps: float, rate: float) -> Iterator[np.ndarray]:
    """The first `count` frames at `fps` of a video of `rate`; where it ends earlier its last frame stays."""
    source = enumerate(frames)
    number, frame = next(source)
    for tick in ticks(count, fps, rate):
        while number < tick and (following := next(source, None)):
            number, frame = following
        yield frame


def fitted(video: Tensor, size: tuple[int, int]) -> Tensor:
    """A uint8 video (..., T, H, W), scaled to cover `size` (height, width) and cropped around its middle, as clips are."""
    own = (video.shape[-2], video.shape[-1])
    if own == size:
        return video
    height, width = covering_size(own, size)
    flat = video.reshape(-1, 1, *own).float()
    scaled = F.interpolate(flat, (height, width), mode="bilinear", antialias=True, align_corners=False)
    top, left = (height - size[0]) // 2, (width - size[1]) // 2
    part = scaled[..., top : top + size[0], left : left + size[1]].round().clamp(0, 255).to(torch.uint8)
    return part.view(*video.shape[:-2], *size)


def tensor_of(frames: Iterable[np.ndarray], device: torch.device) -> Tensor:
    """Frames (H, W, 3) as uint8 (1, 3, T, H, W)."""
    return torch.from_numpy(np.stack(list(frames))).permute(3, 0, 1, 2)[None].contiguous().to(device)


def chunks_of(frames: Iterable[np.ndarray], chunk: int, device: torch.device) -> Iterator[Tensor]:
    """The same, `chunk` frames at a time."""
    source = iter(frames)
    while part := list(islice(source, chunk)):
        yield tensor_of(part, device)
