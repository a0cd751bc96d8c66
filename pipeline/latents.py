"""One shard of clips to one shard of latents, beside it: decode, encode in a stream, commit. Plain functions.

Streams of a batch go through the encoder together, a few latents at a time: memory does not grow with their length, and
the bytes do not depend on who else is at work. Every frame is decoded and encoded once.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from isal import isal_zlib
from torch import nn

from longtake.datasets import clip as clip_file
from longtake.datasets import index, schema, storage
from longtake.datasets.encoding import (
    Settings,
    Stream,
    Strides,
    batches,
    frames_of,
    latents_of,
    posteriors,
    streams,
    target_size,
)
from longtake.datasets.errors import Failure
from longtake.datasets.latents import Moments, merged, moments
from longtake.datasets.loader import to_model
from longtake.pipeline import column as columns

_AHEAD = 2  # chunks that are decoded while one is encoded
_NUMPY = {"bfloat16": "<u2", "float16": "<f2"}  # numpy has no bfloat16: its bits are stored

Report = Callable[[int, str], None]


def make_latents(
    model: nn.Module,
    strides: Strides,
    dataset: str,
    split: str,
    name: str,
    column: str,
    settings: Settings,
    keep: np.ndarray,
    report: Report = lambda clips, position: None,
) -> dict[str, int]:
    """Encode the clips of one base shard and commit them as a column's shard.

    Args:
        model: on its device and in its precision, in evaluation mode.
        keep: (N,) bool, which of the shard's clips are encoded; the others get no latents.
        report: called with the number of clips that are encoded and the clip that is at work.

    Returns:
        Counts: `clips`, `clips_small` left out for their size, `streams`, `latents`, `frames` encoded, `frames_cut` from
        tails, `bytes`.

    Raises:
        Failure: a clip is not readable, the base shard is another than before, or values are beyond the dtype.
    """
    base = index.read_shard(dataset, split, name)
    columns.check_keep(dataset, base, keep)
    rows = base.table.filter(pa.array(keep)).to_pylist()
    shard_streams = streams(rows, settings, strides)
    groups = batches(shard_streams, settings, strides)

    folder = storage.join(dataset, split)
    tar = storage.join(folder, f"{name}.tar")
    clips: dict[str, _Clip] = {}
    with storage.spool_folder(folder) as spool:
        for batch in encode_batches(model, strides, tar, groups, settings, spool, report):
            clips |= {clip.key: clip for clip in batch}
        report(len(clips), "its commit")
        size = _commit(dataset, base, column, clips, strides, settings, spool)

    frames = sum(frames_of(stream, strides) for stream in shard_streams)
    return {
        "clips": len(clips),
        "clips_small": len(rows) - len(clips),
        "streams": len(shard_streams),
        "latents": sum(len(clip.checksums) for clip in clips.values()),
        "frames": frames,
        "frames_cut": sum(row["frame_count"] for stream in shard_streams for row in stream) - frames,
        "bytes": size,
    }


class _Clip:
    """A clip whose latents come chunk by chunk: a .npy in the spool, their checksums and moments.

    `first` is the number of latents of its stream that come before it, `count` the number of its own.
    """

    def __init__(self, spool: Path, key: str, first: int, count: int, dtype: str) -> None:
        self.key, self.path, self._dtype = key, spool / f"{key}.npy", dtype
        self.first, self._count = first, count
        self.shape: tuple[int, ...] = (0, 0, 0)  # channels, height, width
        self.checksums: list[int] = []
        self._moments: list[Moments] = []

    def append(self, start: int, stored: np.ndarray, values: np.ndarray) -> None:
        """Add its part of a chunk (t, 2, C, h, w), as stored and as numbers, whose first latent is `start` of the stream."""
        part = slice(max(0, self.first - start), max(0, self.first + self._count - start))
        stored, values = stored[part], values[part]
        if not len(stored):
            return
        with self.path.open("ab") as f:
            if not self.checksums:
                self.shape = stored.shape[2:]
                _write_header(f, (self._count, *stored.shape[1:]), self._dtype)
            f.write(stored.tobytes())
        self.checksums += [isal_zlib.crc32(latent.tobytes()) for latent in stored]
        self._moments += moments(values)
        if len(self.checksums) == self._count:
            # merged latent by latent, so that the last bits do not depend on the chunks
            self.moments = merged(self._moments)
            self._moments = []


def _clips(spool: Path, stream: Stream, strides: Strides, dtype: str) -> list[_Clip]:
    counts = latents_of(stream, strides)
    firsts = (np.cumsum(counts) - counts).tolist()
    return [
        _Clip(spool, row["key"], first, count, dtype) for row, first, count in zip(stream, firsts, counts, strict=True)
    ]


def encode_batches(
    model: nn.Module,
    strides: Strides,
    tar: str,
    groups: Sequence[Sequence[Stream]],
    settings: Settings,
    spool: Path,
    report: Report = lambda clips, position: None,
) -> Iterator[list[_Clip]]:
    """The clips of each batch of streams, encoded into the spool; the next frames are decoded meanwhile.

    Args:
        tar: URL of the base shard, whose index has the rows.

    Raises:
        Failure: a clip is not readable, or a latent is not finite in `settings.dtype`.
    """
    with (
        ThreadPoolExecutor(settings.threads) as pool,
        closing(prefetched(video_chunks(tar, groups, settings, strides, pool))) as chunks,
    ):
        encoded = 0
        for number, batch_chunks in groupby(chunks, key=lambda chunk: chunk[0]):
            group = groups[number]
            clips = [_clips(spool, stream, strides, settings.dtype) for stream in group]
            rows = [stream[0] for stream in group]
            start, count = 0, 1 + (frames_of(group[0], strides) - 1) // strides.factor
            videos = (video for _, video in batch_chunks)
            for stored, values in _posteriors(model, strides, videos, settings, tar, rows):
                for n, stream_clips in enumerate(clips):
                    for clip in stream_clips:
                        clip.append(start, stored[n], values[n])
                start += stored.shape[1]
                report(encoded, f"{rows[0]['key']}, latent {start} of {count}")
            encoded += sum(map(len, clips))
            yield [clip for stream_clips in clips for clip in stream_clips]


def _posteriors(
    model: nn.Module,
    strides: Strides,
    videos: Iterator[np.ndarray],
    settings: Settings,
    tar: str,
    rows: Sequence[Mapping[str, Any]],
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Latents (B, t, 2, C, h, w), as stored and as numbers, of chunks of video (B, T, H, W, 3) uint8."""
    device = next(model.parameters()).device
    on_device = (to_model(torch.from_numpy(video).to(device).permute(0, 4, 1, 2, 3)) for video in videos)
    with torch.inference_mode():
        try:
            for exact, rounded in posteriors(model, strides, on_device, settings):
                latents = rounded.cpu().contiguous()
                if not latents.isfinite().all():
                    key = next(row["key"] for row, clip in zip(rows, latents, strict=True) if not clip.isfinite().all())
                    remedy = "; try `dtype: bfloat16`" if settings.dtype == "float16" and exact.isfinite().all() else ""
                    raise Failure(f"{tar}: {key}: its latents are not finite in {settings.dtype}{remedy}")
                stored = latents.view(torch.uint16) if settings.dtype == "bfloat16" else latents
                yield stored.numpy(), latents.float().numpy()
        except torch.OutOfMemoryError as e:
            clips = f"{tar}: {len(rows)} clips from {rows[0]['key']} on"
            remedy = "lower `run.batch` or `run.chunk`, or set `tile`"
            raise Failure(f"{clips} do not fit into the GPU's memory; {remedy}") from e


def video_chunks(
    tar: str, groups: Sequence[Sequence[Stream]], settings: Settings, strides: Strides, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of a batch and (B, T, H, W, 3) uint8 of its streams: one frame first, then those of `chunk` latents."""
    for number, group in enumerate(groups):
        videos = [_stream_frames(tar, stream, settings, strides) for stream in group]
        remaining, most = frames_of(group[0], strides), 1
        while remaining:
            count = min(most, remaining)
            yield number, np.stack(list(pool.map(partial(_next_frames, count=count), videos)))
            remaining -= count
            most = settings.chunk * strides.factor


def _next_frames(frames: Iterator[np.ndarray], count: int) -> np.ndarray:
    return np.stack(list(islice(frames, count)))


def _stream_frames(tar: str, stream: Stream, settings: Settings, strides: Strides) -> Iterator[np.ndarray]:
    """The frames of a stream (H, W, 3) up to the last that is encoded. A clip is read when its turn comes."""
    remaining = frames_of(stream, strides)
    for row in stream:
        count = min(remaining, row["frame_count"])
        yield from _clip_frames(tar, row, count, settings, strides)
        remaining -= count


def _clip_frames(
    tar: str, row: Mapping[str, Any], count: int, settings: Settings, strides: Strides
) -> Iterator[np.ndarray]:
    """The first frames of a clip (H, W, 3), scaled and cropped as the loader does at this size."""
    data = columns.clip_bytes(tar, row)
    clip_size = (row["height"], row["width"])
    size = target_size(clip_size, settings, strides.stride)
    assert size
    scaled = clip_file.covering_size(clip_size, size)
    frames = clip_file.decoded(data, range(count), None if scaled == clip_size else scaled, f"{tar}: {row['key']}.mp4")
    return (clip_file.crop(frame[None], size)[0] for frame in frames)


def prefetched(items: Iterator[Any]) -> Generator[Any, None, None]:
    """The same items, of which the next `_AHEAD` are made in a thread."""
    end = object()
    with ThreadPoolExecutor(1) as thread:
        ahead = deque(thread.submit(next, items, end) for _ in range(_AHEAD))
        try:
            while (item := ahead.popleft().result()) is not end:
                ahead.append(thread.submit(next, items, end))
                yield item
        finally:
            thread.shutdown(cancel_futures=True)


def _commit(
    dataset: str,
    base: index.Shard,
    column: str,
    clips: Mapping[str, _Clip],
    strides: Strides,
    settings: Settings,
    spool: Path,
) -> int:
    """Commit the shard of a column; returns the bytes of its tar."""
    empty = spool / "none.npy"
    with empty.open("wb") as f:
        _write_header(f, (0, 2, strides.channels, 0, 0), settings.dtype)
    keys = base.table["key"].to_pylist()
    members = ((key, {"npy": (clips[key].path if key in clips else empty).read_bytes()}) for key in keys)

    # a latent is called a step in the columns of the index
    def row_of(row: Mapping[str, Any]) -> dict[str, Any]:
        clip = clips.get(row["key"])
        channels, height, width = clip.shape if clip else (strides.channels, 0, 0)
        return (
            {"factor": strides.factor, "dtype": settings.dtype, "steps": len(clip.checksums) if clip else 0}
            | {"channels": channels, "height": height, "width": width}
            | {"step_crc32": np.array(clip.checksums if clip else [], "<u4").tobytes()}
            | ({"stream_step": clip.first if clip else 0} if settings.join_seconds else {})
        )

    parts = [clips[key].moments for key in keys if key in clips]
    none = Moments(0, *(np.zeros(strides.channels) for _ in range(3)))
    notes = (merged(parts) if parts else none).plain()
    kind = schema.STREAM_INDEX if settings.join_seconds else schema.LATENT_INDEX
    return columns.commit(dataset, base, column, members, row_of, kind, notes)


def _write_header(file: Any, shape: tuple[int, ...], dtype: str) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": _NUMPY[dtype], "fortran_order": False, "shape": shape})
