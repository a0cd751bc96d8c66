"""How latents are made: which clips are encoded together, at which size, which latents each keeps, and their posteriors.

A stream is a clip, or with `join_seconds` clips that follow each other without a hole: then only its first latent is of a
single frame. Batches hold streams of the same lengths and size, and depend on nothing but the shard's own clips.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from longtake.datasets.errors import UserError
from longtake.datasets.latents import shrunk
from longtake.datasets.neighbours import follows

if TYPE_CHECKING:
    from torch import Tensor

_METHODS = ("encode_stream", "encoder", "config")
_FACTS = ("spatial_stride", "temporal_stride", "latent_channels")

Row = Mapping[str, Any]  # a clip in the index of its shard
Stream = tuple[Row, ...]


@dataclass(frozen=True)
class Settings:
    """How a column is encoded. `batch`, `chunk` and `threads` say how the work is done, and change values by roundings only."""

    size: tuple[int, int] | None  # height, width
    precision: Literal["fp32", "bf16"]
    dtype: Literal["float16", "bfloat16"]
    tile: int | None  # pixels
    overlap: int
    batch: int
    chunk: int  # latents
    threads: int = 1  # that decode
    shrink: tuple[int, int] = (1, 1)  # of height, width
    join_seconds: float = 0.0  # of a stream of several clips

    def values(self) -> dict[str, Any]:
        """The settings that decide a column's values."""
        used = {"overlap": self.tile, "shrink": self.shrink != (1, 1), "join_seconds": self.join_seconds}
        skipped = {"batch", "chunk", "threads"} | {name for name in used if not used[name]}
        return {name: value for name, value in asdict(self).items() if name not in skipped}


@dataclass(frozen=True)
class Strides:
    """What an encoder makes of a video: pixels a position, frames a latent, and channels."""

    stride: int
    factor: int
    channels: int

    def covered(self, frames: int) -> int:
        """The frames that make whole latents: 1 + factor * n of them. The tail is left out."""
        return 1 + (frames - 1) // self.factor * self.factor


def strides_of(model: Any, uri: str) -> Strides:
    """The strides of a video autoencoder. Raises UserError where the model is none."""
    config: Any = getattr(model, "config", None)
    if any(not hasattr(model, name) for name in _METHODS) or any(not hasattr(config, name) for name in _FACTS):
        raise UserError(
            f"encoder: {uri}: is a {type(model).__name__}, which does not encode videos; name a `pretrain_vae` model"
        )
    if (first := getattr(config, "first_frames", 1)) != 1:
        raise UserError(
            f"encoder: {uri}: is a {type(model).__name__}, whose first latent stands for {first} frames, and a column's"
            " stands for one; cache its tokens by a `cache_tokens` stage"
        )
    return Strides(config.spatial_stride, config.temporal_stride, config.latent_channels)


def column_name(encoder: str, settings: Settings, view: str) -> str:
    """`latent-DIGEST`, by the digests of the encoder and of the view ("" without one), and the settings' values."""
    record = json.dumps([encoder, settings.values(), view], sort_keys=True)
    return f"latent-{hashlib.sha256(record.encode()).hexdigest()[:16]}"


def check(settings: Settings, stride: int) -> None:
    """Raises UserError where the settings do not fit an encoder with this stride."""
    if settings.size and any(side % stride for side in settings.size):
        height, width = settings.size
        near = "x".join(str(max(1, side // stride) * stride) for side in settings.size)
        raise UserError(f"size: {height}x{width} is not in multiples of {stride}, as the encoder needs; {near} is")
    if settings.size and target_size(settings.size, settings, stride) is None:
        (height, width), (rows, columns) = settings.size, settings.shrink
        raise UserError(f"shrink: {rows}x{columns} leaves no whole position of size {height}x{width}; lower it")
    if settings.tile and (settings.tile % stride or settings.overlap % stride or settings.overlap >= settings.tile):
        raise UserError(
            f"tile: {settings.tile} with overlap {settings.overlap}: the encoder needs multiples of {stride}, the overlap the smaller"
        )


def target_size(clip_size: tuple[int, int], settings: Settings, stride: int) -> tuple[int, int] | None:
    """The (height, width) at which a clip of this size is encoded, before it is shrunk.

    None of a clip that the loader leaves out at this size, or of which shrinking leaves no whole position.
    """
    height, width = settings.size or (clip_size[0] // stride * stride, clip_size[1] // stride * stride)
    rows, columns = settings.shrink
    fits = stride * rows <= height <= clip_size[0] and stride * columns <= width <= clip_size[1]
    return (height, width) if fits else None


def streams(rows: Sequence[Row], settings: Settings, strides: Strides) -> list[Stream]:
    """Clips that are encoded one after the other, in their order. A clip that is too small is in no stream.

    A clip joins the stream before it where it follows its last clip without a hole, both have a latent at least, and the
    stream gets no longer than `settings.join_seconds`.
    """
    joined: list[list[Row]] = []
    for row in rows:
        if not target_size((row["height"], row["width"]), settings, strides.stride):
            continue
        seconds = 0.0
        if joined and settings.join_seconds:
            seconds = sum(clip["frame_count"] / clip["fps"] for clip in (*joined[-1], row))
        # half a frame of tolerance for roundings
        fits = 0 < seconds <= settings.join_seconds + 0.5 / row["fps"]
        if fits and row["frame_count"] >= strides.factor and follows(joined[-1][-1], row):
            joined[-1].append(row)
        else:
            joined.append([row])
    return [tuple(stream) for stream in joined]


def frames_of(stream: Stream, strides: Strides) -> int:
    """The number of a stream's frames that are encoded."""
    return strides.covered(sum(row["frame_count"] for row in stream))


def latents_of(stream: Stream, strides: Strides) -> list[int]:
    """The number of a stream's latents that each of its clips keeps: those whose last frame is the clip's."""
    ends = np.cumsum([row["frame_count"] for row in stream])
    return np.diff(-(-ends // strides.factor), prepend=0).tolist()


def batches(streams: Sequence[Stream], settings: Settings, strides: Strides) -> list[list[Stream]]:
    """Streams of clips of the same lengths and size, in their order, at most `settings.batch` together."""
    alike: dict[tuple[tuple[int, ...], tuple[int, int] | None], list[Stream]] = {}
    for stream in streams:
        size = target_size((stream[0]["height"], stream[0]["width"]), settings, strides.stride)
        lengths = tuple(row["frame_count"] for row in stream)
        # the tail of a single clip does not count
        lengths = lengths if len(stream) > 1 else (strides.covered(lengths[0]),)
        alike.setdefault((lengths, size), []).append(stream)
    most = settings.batch
    return [group[n : n + most] for group in alike.values() for n in range(0, len(group), most)]


def positions(size: tuple[int, int], settings: Settings, strides: Strides) -> tuple[int, int]:
    """Height and width in positions of the latents of a clip that is encoded at this `target_size`."""
    height, width = (side // (strides.stride * by) for side, by in zip(size, settings.shrink, strict=True))
    return height, width


def posteriors(
    model: Any, strides: Strides, videos: "Iterable[Tensor]", settings: Settings
) -> "Iterator[tuple[Tensor, Tensor]]":
    """Latents (B, t, 2, C, h, w), mean and log-variance, of a stream: as the model gives them, and in `settings.dtype`.

    Args:
        videos: (B, 3, T, H, W) in [-1, 1] on the model's device: one frame first, then those of `settings.chunk` latents.
    """
    import torch

    pixels = (shrunk(video, settings.shrink, strides.stride) for video in videos)
    for posterior in model.encode_stream(pixels, settings.chunk, settings.tile, settings.overlap):
        exact = torch.stack([posterior.mean, posterior.logvar], 1).permute(0, 3, 1, 2, 4, 5)
        yield exact, exact.to(getattr(torch, settings.dtype))
