"""One shard of clips to one shard of latents, beside it: decode, encode in a stream, commit. Plain functions.

A stream is a clip, or with `join_seconds` clips that follow each other without a hole: then only the first of its
latents is of a single frame. Streams of the same shape go through the encoder together, in batches that a shard's own
clips make up in the order of their keys, a few latent steps at a time: memory does not grow with their length, and the
bytes do not depend on who else is at work. Every frame is decoded and encoded once.
"""

import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import groupby, islice
from pathlib import Path
from queue import Empty, Full, Queue
from threading import Event, Thread
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from longtake.datasets import clip, index, schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import Moments, merged, moments, shrunk
from longtake.datasets.loader import to_model
from longtake.datasets.neighbours import follows
from longtake.datasets.shard import Member
from longtake.pipeline import column as columns

_AHEAD = 2  # chunks that are decoded while one is encoded
_NEEDED = ("encode_stream", "encoder", "config")
_FACTS = ("spatial_stride", "temporal_stride", "latent_channels")

Row = Mapping[str, Any]
Stream = tuple[Row, ...]
Tell = Callable[[int, str], None]


@dataclass(frozen=True)
class Settings:
    """What decides a column's values; `batch`, `chunk`, `threads` say how the work is done, and decide no more than roundings."""

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
        unused = {
            "overlap": self.tile is None,
            "shrink": self.shrink == (1, 1),
            "join_seconds": not self.join_seconds,
        }
        without = ("batch", "chunk", "threads", *(name for name, is_unused in unused.items() if is_unused))
        return {name: value for name, value in asdict(self).items() if name not in without}


@dataclass(frozen=True)
class Geometry:
    """Of an encoder: pixels and frames that become one position and one step, and channels."""

    stride: int
    factor: int
    channels: int


def geometry(model: nn.Module, uri: str) -> Geometry:
    """Raises UserError where the model is no video autoencoder."""
    config = getattr(model, "config", None)
    if any(not hasattr(model, name) for name in _NEEDED) or any(not hasattr(config, name) for name in _FACTS):
        raise UserError(
            f"encoder: {uri}: is a {type(model).__name__}, which does not encode videos; name a `pretrain_vae` model"
        )
    assert config is not None
    return Geometry(config.spatial_stride, config.temporal_stride, config.latent_channels)


def column_name(encoder: str, settings: Settings, view: str) -> str:
    """`latent-DIGEST`, of the encoder's digest, of what else decides the values, and of the view's ("" without one)."""
    record = json.dumps([encoder, settings.values(), view], sort_keys=True)
    return f"latent-{hashlib.sha256(record.encode()).hexdigest()[:16]}"


def check(settings: Settings, stride: int) -> None:
    """Raises UserError where these settings do not fit the encoder."""
    if settings.size and any(side % stride for side in settings.size):
        height, width = settings.size
        near = "x".join(str(max(1, side // stride) * stride) for side in settings.size)
        raise UserError(f"size: {height}x{width} is not in multiples of {stride}, as the encoder needs; {near} is")
    if settings.size and target(settings.size, settings.size, stride, settings.shrink) is None:
        (height, width), (rows, columns) = settings.size, settings.shrink
        raise UserError(f"shrink: {rows}x{columns} leaves no whole position of size {height}x{width}; lower it")
    if settings.tile and (settings.tile % stride or settings.overlap % stride or settings.overlap >= settings.tile):
        raise UserError(
            f"tile: {settings.tile} with overlap {settings.overlap}: the encoder needs multiples of {stride}, the overlap the smaller"
        )


def target(
    own: tuple[int, int], size: tuple[int, int] | None, stride: int, shrink: tuple[int, int] = (1, 1)
) -> tuple[int, int] | None:
    """The (height, width) that is encoded of a clip of this size, before it is shrunk; None of one that is too small.

    That is one that the loader leaves out at this size, or of which shrinking leaves no whole position.
    """
    height, width = size or (own[0] // stride * stride, own[1] // stride * stride)
    fits = stride * shrink[0] <= height <= own[0] and stride * shrink[1] <= width <= own[1]
    return (height, width) if fits else None


def covered(frames: int, factor: int) -> int:
    """How many of a clip's frames make whole steps: 1 + factor * n. The tail is left out."""
    return 1 + (frames - 1) // factor * factor


def streams(rows: Sequence[Row], settings: Settings, of: Geometry) -> list[Stream]:
    """Clips that are encoded one after the other, in the order given; one that is too small is in none.

    A clip goes on with the stream before it where it follows its last clip without a hole, both have a step at least,
    and the stream gets no longer than `settings.join_seconds`.
    """
    made: list[list[Row]] = []
    for row in rows:
        if not target((row["height"], row["width"]), settings.size, of.stride, settings.shrink):
            continue
        seconds = sum(r["frame_count"] / r["fps"] for r in (*made[-1], row)) if made and settings.join_seconds else 0.0
        # half a frame, that a rounding shall not decide
        fits = 0 < seconds <= settings.join_seconds + 0.5 / row["fps"]
        if fits and row["frame_count"] >= of.factor and follows(made[-1][-1], row):
            made[-1].append(row)
        else:
            made.append([row])
    return [tuple(stream) for stream in made]


def frames_of(stream: Stream, factor: int) -> int:
    """How many frames of a stream are encoded."""
    return covered(sum(row["frame_count"] for row in stream), factor)


def steps_of(stream: Stream, factor: int) -> list[int]:
    """How many of a stream's steps each of its clips keeps: those whose last frame it has."""
    ends = np.cumsum([row["frame_count"] for row in stream])
    return np.diff(-(-ends // factor), prepend=0).tolist()


def batches(found: Sequence[Stream], settings: Settings, of: Geometry) -> list[list[Stream]]:
    """Streams of clips of the same lengths and size, in the order given, at most `settings.batch` together."""
    alike: dict[tuple[tuple[int, ...], tuple[int, int] | None], list[Stream]] = {}
    for stream in found:
        size = target((stream[0]["height"], stream[0]["width"]), settings.size, of.stride, settings.shrink)
        lengths = tuple(row["frame_count"] for row in stream)
        # of a clip by itself its tail does not count
        lengths = lengths if len(stream) > 1 else (covered(lengths[0], of.factor),)
        alike.setdefault((lengths, size), []).append(stream)
    most = settings.batch
    return [some[n : n + most] for some in alike.values() for n in range(0, len(some), most)]


def make_latents(
    model: nn.Module,
    of: Geometry,
    dataset: str,
    split: str,
    name: str,
    column: str,
    settings: Settings,
    keep: np.ndarray,
    tell: Tell = lambda clips, at: None,
) -> dict[str, int]:
    """Encode the clips of one base shard and commit them as a column's shard.

    Args:
        model: on its device and in its precision, in evaluation mode.
        keep: (N,) bool, which of the shard's clips; the others get no steps.
        tell: called with the clips done and the one at hand.

    Returns:
        `clips`, `steps`, `frames` encoded, `frames_cut` from tails, `clips_small` left out for their size, `bytes`.

    Raises:
        Failure: a clip is not readable, the base shard is another than before, or values are beyond the dtype.
    """
    base = index.read_shard(dataset, split, name)
    rows = base.table.to_pylist()
    if len(keep) != len(rows):
        raise Failure(
            f"{dataset} ({split}): {name} has {len(rows)} clips, the view {len(keep)}; run the same command again"
        )
    kept = [row for row, wanted in zip(rows, keep.tolist(), strict=True) if wanted]
    url = storage.join(dataset, split, f"{name}.tar")
    folder = storage.join(dataset, split)
    every = streams(kept, settings, of)
    made: dict[str, _Clip] = {}
    with storage.spool_folder(folder) as spool:
        for clips in encoded(model, of, url, batches(every, settings, of), settings, spool, tell):
            made |= {clip.key: clip for clip in clips}
        tell(len(made), "its commit")
        size = _commit(dataset, base, column, made, of, settings, spool)
    frames = sum(frames_of(stream, of.factor) for stream in every)
    return {
        "clips": len(made),
        "clips_small": len(kept) - len(made),
        "streams": len(every),
        "steps": sum(len(clip.sums) for clip in made.values()),
        "frames": frames,
        "frames_cut": sum(row["frame_count"] for stream in every for row in stream) - frames,
        "bytes": size,
    }


class _Clip:
    """A clip whose steps come one piece after the other: a .npy in the spool, their checksums and moments.

    `first` is how many steps of its stream come before it.
    """

    def __init__(self, spool: Path, key: str, first: int, steps: int, kind: str) -> None:
        self.key, self.path, self._kind = key, spool / f"{key}.npy", kind
        self.first, self._steps = first, steps
        self.shape: tuple[int, ...] = (0, 0, 0)  # channels, height, width
        self.sums: list[int] = []
        self._moments: list[Moments] = []

    def take(self, at: int, piece: np.ndarray, values: np.ndarray) -> None:
        """Add its part of a stream's steps from `at` on, (t, 2, C, h, w), as they are stored and as numbers."""
        mine = slice(max(0, self.first - at), max(0, self.first + self._steps - at))
        piece, values = piece[mine], values[mine]
        if not len(piece):
            return
        with self.path.open("ab") as f:
            if not self.sums:
                self.shape = piece.shape[2:]
                _header(f, (self._steps, *piece.shape[1:]), self._kind)
            f.write(piece.tobytes())
        self.sums += [zlib.crc32(step.tobytes()) for step in piece]
        self._moments += moments(values)
        if len(self.sums) == self._steps:
            # of single steps, so that their last bits do not depend on the pieces
            self.moments = merged(self._moments)
            self._moments = []


def encoded(
    model: nn.Module,
    of: Geometry,
    tar: str,
    groups: Sequence[Sequence[Stream]],
    settings: Settings,
    spool: Path,
    tell: Tell = lambda clips, at: None,
) -> Iterator[list[_Clip]]:
    """The clips of each batch of streams, encoded into the spool; the next frames are decoded meanwhile.

    Args:
        tar: URL of the base shard, of whose index the rows are.

    Raises:
        Failure: a clip is not readable, or a latent is not finite in `settings.dtype`.
    """
    kind = "<u2" if settings.dtype == "bfloat16" else "<f2"
    with ThreadPoolExecutor(settings.threads) as pool, _ahead(_chunks(tar, groups, settings, of, pool)) as chunks:
        done = 0
        for number, pieces in groupby(chunks, key=lambda chunk: chunk[0]):
            group = groups[number]
            clips = [_clips(spool, stream, of.factor, kind) for stream in group]
            rows = [stream[0] for stream in group]
            at, steps = 0, 1 + (frames_of(group[0], of.factor) - 1) // of.factor
            for stored, values in _posteriors(model, of, (video for _, video in pieces), settings, tar, rows):
                for n, of_stream in enumerate(clips):
                    for clip_ in of_stream:
                        clip_.take(at, stored[n], values[n])
                at += stored.shape[1]
                tell(done, f"{rows[0]['key']}, step {at} of {steps}")
            done += sum(map(len, clips))
            yield [clip_ for of_stream in clips for clip_ in of_stream]


def _clips(spool: Path, stream: Stream, factor: int, kind: str) -> list[_Clip]:
    counts = steps_of(stream, factor)
    firsts = (np.cumsum(counts) - counts).tolist()
    return [
        _Clip(spool, row["key"], first, count, kind) for row, first, count in zip(stream, firsts, counts, strict=True)
    ]


def _posteriors(
    model: nn.Module, of: Geometry, videos: Iterator[np.ndarray], settings: Settings, tar: str, rows: Sequence[Row]
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Steps (B, t, 2, C, h, w), as they are stored and as numbers, of chunks (B, T, H, W, 3) uint8."""
    device = next(model.parameters()).device
    kind = {"float16": torch.float16, "bfloat16": torch.bfloat16}[settings.dtype]

    def on_device() -> Iterator[Tensor]:
        for video in videos:
            whole = to_model(torch.from_numpy(video).to(device).permute(0, 4, 1, 2, 3))
            yield shrunk(whole, settings.shrink, of.stride)

    with torch.inference_mode():
        stream = model.encode_stream(on_device(), settings.chunk, settings.tile, settings.overlap)  # type: ignore[operator]
        for posterior in _in_memory(stream, f"{tar}: {len(rows)} clips from {rows[0]['key']} on"):
            both = torch.stack([posterior.mean, posterior.logvar], 1).permute(0, 3, 1, 2, 4, 5)
            latent = both.to(kind).cpu().contiguous()
            if not latent.isfinite().all():
                bad = next(row["key"] for row, one in zip(rows, latent, strict=True) if not one.isfinite().all())
                other = "; try `dtype: bfloat16`" if settings.dtype == "float16" and both.isfinite().all() else ""
                raise Failure(f"{tar}: {bad}: its latents are not finite in {settings.dtype}{other}")
            bits = latent.view(torch.uint16) if kind is torch.bfloat16 else latent
            yield bits.numpy(), latent.float().numpy()


def _in_memory(stream: Iterator[Any], what: str) -> Iterator[Any]:
    try:
        yield from stream
    except torch.OutOfMemoryError as e:
        raise Failure(f"{what} do not fit into the GPU's memory; lower `batch` or `steps`, or set `tile`") from e


def _chunks(
    tar: str, groups: Sequence[Sequence[Stream]], settings: Settings, of: Geometry, pool: ThreadPoolExecutor
) -> Iterator[tuple[int, np.ndarray]]:
    """The number of a batch and (B, T, H, W, 3) uint8 of its streams, one frame first, then as many as `steps` have."""
    for number, group in enumerate(groups):
        videos = [_frames(tar, stream, settings, of) for stream in group]
        left, count = frames_of(group[0], of.factor), 1
        while left:
            taken = min(count, left)
            yield number, np.stack(list(pool.map(partial(_take, count=taken), videos)))
            left -= taken
            count = settings.chunk * of.factor


def _take(frames: Iterator[np.ndarray], count: int) -> np.ndarray:
    return np.stack(list(islice(frames, count)))


def _frames(tar: str, stream: Stream, settings: Settings, of: Geometry) -> Iterator[np.ndarray]:
    """The frames of a stream (H, W, 3) up to the last that is encoded, a clip read when it is its turn."""
    left = frames_of(stream, of.factor)
    for row in stream:
        taken = min(left, row["frame_count"])
        yield from _decoded(tar, row, taken, settings, of)
        left -= taken


def _decoded(tar: str, row: Row, count: int, settings: Settings, of: Geometry) -> Iterator[np.ndarray]:
    """The first frames of a clip (H, W, 3), scaled and cropped as the loader does at this size."""
    name = f"{tar}: {row['key']}.mp4"
    try:
        data = storage.read_range(tar, row["mp4_offset"], row["mp4_size"])
    except FileNotFoundError as e:
        raise Failure(f"{tar}: is missing; run `longtake dataset verify`") from e
    if len(data) != row["mp4_size"] or zlib.crc32(data) != row["mp4_crc32"]:
        raise Failure(f"{name}: is damaged; run `longtake dataset verify`")
    own = (row["height"], row["width"])
    size = target(own, settings.size, of.stride, settings.shrink)
    assert size
    scaled = clip.covering_size(own, size)
    frames = clip.decoded(data, range(count), None if scaled == own else scaled, name)
    return (clip.crop(frame[None], size)[0] for frame in frames)


@contextmanager
def _ahead(items: Iterator[Any]) -> Iterator[Iterator[Any]]:
    """The same items, made in a thread, which ends with the block."""
    queue: Queue[tuple[str, Any]] = Queue(_AHEAD)
    stop = Event()

    def put(what: str, value: Any) -> None:
        while not stop.is_set():
            try:
                return queue.put((what, value), timeout=0.1)
            except Full:
                continue

    def work() -> None:
        try:
            for item in items:
                put("item", item)
                if stop.is_set():
                    return
            put("end", None)
        except BaseException as e:
            put("error", e)

    def taken() -> Iterator[Any]:
        while True:
            what, value = queue.get()
            if what == "error":
                raise value
            if what == "end":
                return
            yield value

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield taken()
    finally:
        stop.set()
        try:
            while True:
                queue.get_nowait()
        except Empty:
            pass
        thread.join()


def _commit(
    dataset: str,
    base: index.Shard,
    column: str,
    clips: Mapping[str, _Clip],
    of: Geometry,
    settings: Settings,
    spool: Path,
) -> int:
    """Bytes of the tar."""
    none = spool / "none.npy"
    with none.open("wb") as f:
        _header(f, (0, 2, of.channels, 0, 0), "<u2" if settings.dtype == "bfloat16" else "<f2")
    keys = base.table["key"].to_pylist()
    members = ((key, {"npy": (clips[key].path if key in clips else none).read_bytes()}) for key in keys)

    def row_of(member: Member, row: Row) -> Row:
        clip = clips.get(row["key"])
        channels, height, width = clip.shape if clip else (of.channels, 0, 0)
        return (
            {"factor": of.factor, "dtype": settings.dtype, "steps": len(clip.sums) if clip else 0}
            | {"channels": channels, "height": height, "width": width}
            | {"step_crc32": np.array(clip.sums if clip else [], "<u4").tobytes()}
            | ({"stream_step": clip.first if clip else 0} if settings.join_seconds else {})
        )

    parts = [clips[key].moments for key in keys if key in clips]
    empty = Moments(0, *(np.zeros(of.channels) for _ in range(3)))
    notes = (merged(parts) if parts else empty).plain()
    kind = schema.STREAM_INDEX if settings.join_seconds else schema.LATENT_INDEX
    return columns.commit(dataset, base, column, members, row_of, kind, notes)


def _header(file: Any, shape: tuple[int, ...], kind: str) -> None:
    np.lib.format.write_array_header_1_0(file, {"descr": kind, "fortran_order": False, "shape": shape})
