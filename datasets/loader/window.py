"""One sample as a training step sees it: a window of its clip, the same in every column, and its history.

The window is drawn from the sample's own random numbers; see datasets/README.md for what each column gives.
"""

import math
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import numpy as np

from longtake.datasets import clip, later, text
from longtake.datasets.errors import Failure
from longtake.datasets.loader import captions, sound
from longtake.datasets.loader.live import LiveRows
from longtake.datasets.loader.order import sample_rng
from longtake.datasets.loader.split import Split
from longtake.datasets.loader.streams import Lengths, clips_of, latents_before
from longtake.datasets.neighbours import pasts
from longtake.datasets.shard import described

CHANCES = 4  # numbers of a sample's own, by which training hides its conditions


@dataclass(frozen=True)
class Window:
    """A window of a clip and its history."""

    frames: int  # T
    stride: int  # take every `stride`-th frame
    size: tuple[int, int]  # (height, width)
    random_crop: bool  # along the longer side; else in the middle
    history_seconds: float = 0.0
    clip_starts: float | None = None  # probability that a window starts its clip; None: all starts are equally likely
    lengths: Lengths | None = None  # of histories in streams of latents


@dataclass(frozen=True)
class Sample:
    """A row of the index in an epoch."""

    shard: int
    row: int  # in the shard
    chance: tuple[int, int, int] | None  # (seed, epoch, copy), of which random numbers are made; None: draw nothing
    batch: int = 0  # number of its global batch


def load(split: Split, sample: Sample, window: Window) -> dict[str, Any]:
    """The columns of one sample, as arrays ready to be stacked. Raises Failure naming what is damaged."""
    row = split.base.row(sample.shard, sample.row)
    rng = sample_rng(*sample.chance[:2], row["key"], sample.chance[2]) if sample.chance else None
    out: dict[str, Any] = {"key": row["key"]}
    frames: Sequence[int]

    if window.lengths:
        out |= _of_stream(split, sample, window, rng)
    else:
        latents = split.latent_rows(sample.shard, sample.row, row)
        split.check_alike(sample.shard, latents)
        tokens = {column: split.cache_row(column, sample.shard, sample.row, row) for column in split.tokens}
        factor = latents[0]["factor"] if latents else 1
        unit = math.lcm(factor, *(cached["hop"] for cached in tokens.values()))
        frames, place = draw(window, rng, row["frame_count"], unit)
        out["start"] = frames[0]
        if "video" in split.names:
            out["video"] = _video(split, sample.shard, row, frames, window.size, place)
        if "frame_diff" in split.names:
            out["frame_diff"] = _frame_diff(split, sample, row, frames, window.size, place)
        if "audio" in split.names:
            span = (window.frames - 1) * window.stride + 1
            out |= sound.of_window(split, sample.shard, sample.row, row, frames[0], span)
        first, count = frames[0] // factor, 1 + (window.frames - 1) // factor
        for column, cached in zip(split.latents, latents, strict=True):
            out[column] = _latents(split, column, sample.shard, cached, first, count)
        for column, cached in tokens.items():
            out[column] = _tokens(split, column, sample.shard, cached, frames[0] // cached["hop"])
        if window.history_seconds:
            out |= _history(split, sample, row, frames[0], window, place)

    if split.captions or split.texts:
        if window.lengths:
            frames = _frames_of_stream(split, sample, window, out["stream_step"])
        # drawn last, so that windows are the same with captions and without
        where = captions.place(_clips(split, sample, window), frames[0], frames[-1] + 1, rng.random() if rng else None)
        for column in split.captions:
            out[column] = _caption(split, column, sample.shard, where)
        for column in split.texts:
            out[column] = _text(split, column, sample.shard, where)
        if split.texts and rng:
            out["chances"] = rng.random(CHANCES)
    if "label" in split.names:
        out["label"] = split.labels.get(row["label"], -1)
    if "json" in split.names:
        # a plain image may have no text beside it
        data = split.reader.member(split.base, sample.shard, *_span(row, "json_")) if row["json_size"] else b""
        out["json"] = later.sample(described(bytes(data)), split.base.annotations(sample.shard), row["source"])
    return out


def draw(window: Window, rng: np.random.Generator | None, count: int, factor: int) -> tuple[list[int], float]:
    """The frames of a window that starts at a multiple of `factor` in a clip of `count`, and the place of its crop."""
    span = (window.frames - 1) * window.stride + 1
    latest = (count - span) // factor
    if rng is None:
        return list(range(0, span, window.stride)), 0.5
    if window.clip_starts is None or not latest:
        start = int(rng.integers(latest + 1)) * factor
    elif rng.random() < window.clip_starts:
        start = 0
    else:
        start = (1 + int(rng.integers(latest))) * factor
    return list(range(start, start + span, window.stride)), rng.random() if window.random_crop else 0.5


def _video(
    split: Split, shard: int, row: Mapping[str, Any], frames: Sequence[int], size: tuple[int, int], place: float
) -> np.ndarray:
    """(3, T, H, W) uint8."""
    mp4 = split.reader.member(split.base, shard, *_span(row, "mp4_"))
    name = f"{split.base.tar(shard)[0]}: {row['key']}.mp4"
    video = np.empty(0)
    for n, frame in enumerate(clip.fitted(mp4, (row["height"], row["width"]), frames, size, name, place)):
        video = video if n else np.empty((3, len(frames), *frame.shape[:2]), np.uint8)
        video[:, n] = frame.transpose(2, 0, 1)
    return video


def _frame_diff(
    split: Split, sample: Sample, row: Mapping[str, Any], frames: Sequence[int], size: tuple[int, int], place: float
) -> np.ndarray:
    """(3, T-1, h, w) uint8."""
    name = f"{split.base.tar(sample.shard)[0]}: {row['key']}"
    cached = split.cache_row("frame_diff", sample.shard, sample.row, row)
    packed = split.reader.member(split.columns["frame_diff"], sample.shard, *_span(cached))
    diff = clip.unpack_array(packed, f"{name} (frame_diff)")
    if len(diff) != row["frame_count"] - 1:
        problem = f"frame_diff has {len(diff)} entries for {row['frame_count']} frames"
        raise Failure(f"{name}: {problem}; delete its index and run `shard` again")
    part = clip.crop(diff[np.asarray(frames[1:], int) - 1], size, place)
    return np.ascontiguousarray(part.transpose(3, 0, 1, 2))


def _latents(split: Split, column: str, shard: int, cached: Mapping[str, Any], first: int, count: int) -> np.ndarray:
    """(count, 2, C, h, w) float16, or uint16 of bfloat16's bits, from number `first` on; only these bytes are read."""
    shape = (2, cached["channels"], cached["height"], cached["width"])
    if isinstance(split.columns[column], LiveRows):
        return np.zeros((count, *shape), _dtype(cached))  # to be filled in once they are encoded
    return _items(split, column, shard, cached, "step", _dtype(cached), shape, first, count)


def _tokens(split: Split, column: str, shard: int, cached: Mapping[str, Any], number: int) -> np.ndarray:
    """(t, h, w) int64 of window `number`, -1 for those of a clip without sound; only its bytes are read."""
    shape, dtype = (cached["steps"], cached["height"], cached["width"]), np.dtype(cached["dtype"]).newbyteorder("<")
    ids = _items(split, column, shard, cached, "window", dtype.str, shape, number, 1)
    return ids[0].astype(np.int64)


def _items(
    split: Split,
    column: str,
    shard: int,
    cached: Mapping[str, Any],
    item: str,
    dtype: str,
    shape: tuple[int, ...],
    first: int,
    count: int,
) -> np.ndarray:
    """(count, *shape) from number `first` on of the `item`s in a clip's .npy, each with its own checksum."""
    rows = split.columns[column]
    size = np.dtype(dtype).itemsize * int(np.prod(shape))  # bytes of an item
    start = cached["offset"] + cached["size"] - (cached[f"{item}s"] - first) * size
    data = split.reader.range(rows, shard, start, count * size)
    sums = np.frombuffer(cached[f"{item}_crc32"], "<u4")[first : first + count]
    if len(sums) != count or any(zlib.crc32(data[n * size : (n + 1) * size]) != s for n, s in enumerate(sums.tolist())):
        url = rows.tar(shard)[0]
        raise Failure(
            f"{url}: {cached['key']}: {item}s {first} to {first + count} are damaged; run `longtake dataset verify`"
        )
    return np.frombuffer(data, dtype).reshape(count, *shape)


def _dtype(cached: Mapping[str, Any]) -> str:
    return "<u2" if cached.get("dtype") == "bfloat16" else "<f2"


def _history(
    split: Split, sample: Sample, row: Mapping[str, Any], start: int, window: Window, place: float
) -> dict[str, Any]:
    """The frames and latents just before the window, from its clip and the clips that it follows without a hole.

    `history_video` (3, Th, H, W), `history_audio` (channels, samples) and `history_NAME` (Lh, 2, C, h, w) for each column
    of latents. Of these the last `history_frames`, `history_samples` and `history_steps` are true, and all before them is
    zero.
    """
    out: dict[str, Any] = {}
    before = list(pasts(split.base, sample.shard, sample.row, window.history_seconds))

    if "video" in split.names:
        frames = start - window.stride * np.arange(round(window.history_seconds * row["fps"] / window.stride), 0, -1)
        parts = [
            _video(split, sample.shard, past, numbers.tolist(), window.size, place)
            for past, numbers in _by_clip(frames, [(past, past["frame_count"]) for _, past in before])
        ]
        room = np.zeros((3, len(frames), *window.size), np.uint8)
        out["history_video"], out["history_frames"] = _at_end(room, parts, 1)

    if "audio" in split.names:
        count = round(window.history_seconds * row["fps"] / window.stride) * window.stride
        out |= sound.before_window(split, sample.shard, before, row, start, count)

    if split.latents:
        rows_of = (split.latent_rows(sample.shard, number, past) for number, past in before)
        # a clip without latents ends the history
        clips = list(takewhile(lambda rows: all(cached["steps"] for cached in rows), rows_of))
        for rows in clips:
            split.check_alike(sample.shard, rows)
        factor = clips[0][0]["factor"]
        latents = start // factor - np.arange(round(window.history_seconds * row["fps"] / factor), 0, -1)
        pieces = _by_clip(latents, [(rows, rows[0]["steps"]) for rows in clips])
        for n, column in enumerate(split.latents):
            parts = [
                _latents(split, column, sample.shard, rows[n], int(numbers[0]), len(numbers))
                for rows, numbers in pieces
            ]
            cached = clips[0][n]
            shape = (len(latents), 2, cached["channels"], cached["height"], cached["width"])
            room = np.zeros(shape, _dtype(cached))
            out[f"history_{column}"], out["history_steps"] = _at_end(room, parts, 0)
    return out


def _of_stream(split: Split, sample: Sample, window: Window, rng: np.random.Generator | None) -> dict[str, Any]:
    """A window at a drawn latent of its clip's stream, and the latents before it in the stream.

    For each column of latents `NAME` and `history_NAME` (Lh, 2, C, h, w); Lh is the longest history that may be drawn,
    `history_steps` how many at its end are true, `stream_step` the latent at which the window begins.
    """
    assert window.lengths
    clips = []
    for number in clips_of(split.columns[split.latents[0]], sample.shard, sample.row):
        clips.append(split.latent_rows(sample.shard, number, split.base.row(sample.shard, number)))
        split.check_alike(sample.shard, clips[-1])

    # without random numbers as late as there is room, whatever a curriculum says
    lengths = window.lengths.of_batch(sample.batch) if rng else window.lengths
    count = 1 + (window.frames - 1) // clips[0][0]["factor"]
    begin = lengths.draw(sum(rows[0]["steps"] for rows in clips), count, rng)
    before = min(begin, lengths.most)

    out: dict[str, Any] = {"history_steps": before, "stream_step": begin}
    for number, column in enumerate(split.latents):
        parts = []
        for rows in clips:
            start = latents_before(rows[number])
            first, end = max(begin - before, start), min(begin + count, start + rows[number]["steps"])
            if first < end:
                parts.append(_latents(split, column, sample.shard, rows[number], first - start, end - first))
        latents = np.concatenate(parts)
        room = np.zeros((window.lengths.most, *latents.shape[1:]), latents.dtype)
        room[len(room) - before :] = latents[:before]
        out |= {column: latents[before:], f"history_{column}": room}
    return out


def _clips(split: Split, sample: Sample, window: Window) -> list[tuple[int, Mapping[str, Any]]]:
    """The clips that a window may be in: row numbers and rows of the base."""
    numbers = [sample.row]
    if window.lengths:
        numbers = [*clips_of(split.columns[split.latents[0]], sample.shard, sample.row)]
    return [(number, split.base.row(sample.shard, number)) for number in numbers]


def _frames_of_stream(split: Split, sample: Sample, window: Window, begin: int) -> range:
    """The frames of a window that begins at latent `begin` of its stream, counted from the stream's first."""
    factor = split.columns[split.latents[0]].row(sample.shard, sample.row)["factor"]
    first = max(0, (begin - 1) * factor + 1)
    return range(first, (begin + (window.frames - 1) // factor) * factor + 1)


def _caption(split: Split, column: str, shard: int, place: captions.Place) -> str | None:
    """The text of the caption that a sample gets."""
    cached = split.cache_row(column, shard, place.row, split.base.row(shard, place.row))
    number = captions.drawn(cached["captions"], place)
    return None if number is None else str(cached["captions"][number]["text"])


def _text(split: Split, column: str, shard: int, place: captions.Place) -> np.ndarray:
    """(L, width) uint16, bfloat16's bits: the states of the caption that a sample gets, of which there are none without one."""
    cached = split.cache_row(column, shard, place.row, split.base.row(shard, place.row))
    if cached["texts"] == []:
        url = split.columns[column].tar(shard)[0]
        raise Failure(f"{url}: {cached['key']}: its view left this clip out; load that view, or make texts without one")
    number = captions.drawn(cached["texts"], place)
    if number is None:
        return np.empty((0, split.widths[column]), np.uint16)
    found = cached["texts"][number]
    return text.unpacked(split.reader.member(split.columns[column], shard, *_span(found)), found["tokens"])


def _by_clip(numbers: np.ndarray, clips: list[tuple[Any, int]]) -> list[tuple[Any, np.ndarray]]:
    """Numbers of frames or latents split by clip, counted from its start; earliest clip first, none without numbers.

    `clips` come with their lengths, latest first. Number 0 is the first of the latest clip, -1 the last of the one before.
    """
    pieces: list[tuple[Any, np.ndarray]] = []
    base = clips[0][1]
    for past, length in clips:
        base -= length
        part = numbers[(numbers >= base) & (numbers < base + length)] - base
        if len(part):
            pieces.insert(0, (past, part))
    return pieces


def _at_end(room: np.ndarray, parts: list[np.ndarray], axis: int) -> tuple[np.ndarray, int]:
    """`room` with the parts, joined along `axis`, at its end, and their length."""
    length = sum(part.shape[axis] for part in parts)
    if length:
        np.moveaxis(room, axis, 0)[-length:] = np.moveaxis(np.concatenate(parts, axis), axis, 0)
    return room, length


def _span(row: Mapping[str, Any], prefix: str = "") -> tuple[int, int, int]:
    """Offset, size and CRC-32 of a member of a tar."""
    return row[f"{prefix}offset"], row[f"{prefix}size"], row[f"{prefix}crc32"]
