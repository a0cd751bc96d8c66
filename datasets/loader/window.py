"""One sample as a training step sees it: a window of its clip, the same in every column, and its history.

The window is drawn from the sample's own random numbers; see datasets/README.md for what each column gives.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets import clip, later, text
from longtake.datasets.errors import Failure
from longtake.datasets.loader import captions, codes, sound
from longtake.datasets.loader.live import LiveRows
from longtake.datasets.loader.order import sample_rng
from longtake.datasets.loader.split import Split
from longtake.datasets.loader.streams import Lengths, clips_of
from longtake.datasets.neighbours import pasts
from longtake.datasets.shard import described

Array = Callable[[str, tuple[int, ...], Any], np.ndarray]
_PIXELS = {"video", "frame_diff", "audio"}  # columns that need more of a clip's row than its length
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


class Sample(NamedTuple):
    """A row of the index in an epoch."""

    shard: int
    row: int  # in the shard
    chance: tuple[int, int, int] | None  # (seed, epoch, copy), of which random numbers are made; None: draw nothing
    batch: int = 0  # number of its global batch


def load(split: Split, sample: Sample, window: Window, array: Array) -> dict[str, Any]:
    """The columns of one sample, as arrays ready to be stacked. Raises Failure naming what is damaged.

    Args:
        array: makes the array of a column, given its name, shape and dtype.
    """
    shard, number = sample.shard, sample.row
    base = split.base.lists(shard)
    key = base["key"][number]
    rng = sample_rng(*sample.chance[:2], key, sample.chance[2]) if sample.chance else None
    out: dict[str, Any] = {"key": key}
    frames: Sequence[int]

    if window.lengths:
        out |= _of_stream(split, sample, window, rng, array)
    else:
        latents = split.latent_codes(shard, number)
        tokens = [split.codes(column, shard, number) for column in split.tokens]
        factor = latents[0].units[number] if latents else 1
        unit = math.lcm(factor, *(items.units[number] for items in tokens)) if tokens else factor
        frames, place = draw(window, rng, base["frame_count"][number], unit)
        start = out["start"] = frames[0]
        first, count = start // factor, 1 + (window.frames - 1) // factor
        for column, items in zip(split.latents, latents, strict=True):
            out[column] = array(column, (count, *items.shapes[number]), items.dtypes[number])
            _read(split, column, shard, items, number, first, out[column])
        for column, items in zip(split.tokens, tokens, strict=True):
            ids = np.empty((1, *items.shapes[number]), items.dtypes[number])
            _read(split, column, shard, items, number, start // items.units[number], ids)
            out[column] = array(column, ids.shape[1:], np.int64)
            out[column][:] = ids[0]
        if window.history_seconds or not _PIXELS.isdisjoint(split.names):
            out |= _pixels_and_past(split, sample, frames, window, place, array)

    if split.captions or split.texts:
        if window.lengths:
            frames = _frames_of_stream(split, sample, window, out["stream_step"])
        # drawn last, so that windows are the same with captions and without
        where = captions.place(_clips(split, sample, window), frames[0], frames[-1] + 1, rng.random() if rng else None)
        for column in split.captions:
            out[column] = _caption(split, column, shard, where)
        for column in split.texts:
            out[column] = _text(split, column, shard, where)
        if split.texts and rng:
            out["chances"] = rng.random(CHANCES)
    if "label" in split.names:
        out["label"] = split.labels.get(base["label"][number], -1)
    if "json" in split.names:
        # a plain image may have no text beside it
        row = split.base.row(shard, number)
        data = split.reader.member(split.base, shard, *_span(row, "json_")) if row["json_size"] else b""
        out["json"] = later.sample(described(bytes(data)), split.base.annotations(shard), row["source"])
    return out


def _pixels_and_past(
    split: Split, sample: Sample, frames: Sequence[int], window: Window, place: float, array: Array
) -> dict[str, Any]:
    """The video, frame differences and sound of a window, and its history."""
    out: dict[str, Any] = {}
    row = split.base.row(sample.shard, sample.row)
    if "video" in split.names:
        out["video"] = array("video", (3, len(frames), *window.size), np.uint8)
        _video(split, sample.shard, row, frames, place, out["video"])
    if "frame_diff" in split.names:
        out["frame_diff"] = _frame_diff(split, sample, row, frames, window.size, place, array)
    if "audio" in split.names:
        span = (window.frames - 1) * window.stride + 1
        out |= sound.of_window(split, sample.shard, sample.row, row, frames[0], span)
    if window.history_seconds:
        out |= _history(split, sample, row, frames[0], window, place)
    return out


def draw(window: Window, rng: np.random.Generator | None, count: int, factor: int) -> tuple[range, float]:
    """The frames of a window that starts at a multiple of `factor` in a clip of `count`, and the place of its crop."""
    start, span = draw_start(window, rng, count, factor), (window.frames - 1) * window.stride + 1
    return range(start, start + span, window.stride), rng.random() if rng and window.random_crop else 0.5


def draw_start(window: Window, rng: np.random.Generator | None, count: int, factor: int) -> int:
    """The first frame of a window, as `draw` does."""
    if rng is None:
        return 0
    latest = (count - (window.frames - 1) * window.stride - 1) // factor
    if window.clip_starts is None or not latest:
        return int(rng.integers(latest + 1)) * factor
    return 0 if rng.random() < window.clip_starts else (1 + int(rng.integers(latest))) * factor


def _video(
    split: Split, shard: int, row: Mapping[str, Any], frames: Sequence[int], place: float, video: np.ndarray
) -> None:
    """Fill `video` (3, T, H, W) uint8."""
    mp4 = split.reader.member(split.base, shard, *_span(row, "mp4_"))
    clip.fill(video, mp4, (row["height"], row["width"]), frames, f"{split.base.tar(shard)[0]}: {row['key']}.mp4", place)


def _frame_diff(
    split: Split,
    sample: Sample,
    row: Mapping[str, Any],
    frames: Sequence[int],
    size: tuple[int, int],
    place: float,
    array: Array,
) -> np.ndarray:
    """(3, T-1, h, w) uint8."""
    name = f"{split.base.tar(sample.shard)[0]}: {row['key']}"
    cached = split.cache_row("frame_diff", sample.shard, sample.row, row)
    packed = split.reader.member(split.columns["frame_diff"], sample.shard, *_span(cached))
    diff = clip.unpack_array(packed, f"{name} (frame_diff)")
    if len(diff) != row["frame_count"] - 1:
        problem = f"frame_diff has {len(diff)} entries for {row['frame_count']} frames"
        raise Failure(f"{name}: {problem}; delete its index and run `shard` again")
    part = clip.crop(diff[np.asarray(frames[1:], int) - 1], size, place).transpose(3, 0, 1, 2)
    out = array("frame_diff", part.shape, np.uint8)
    out[:] = part
    return out


def _read(split: Split, column: str, shard: int, items: codes.Items, number: int, first: int, out: np.ndarray) -> None:
    """Fill an array (n, ...) with the latents, or windows of tokens, from `first` on of clip `number`."""
    if isinstance(split.columns[column], LiveRows):
        out[:] = 0  # to be filled in once they are encoded
        return
    what = "step" if column in split.latents else "window"
    codes.read(split.reader, split.columns[column], shard, items, number, first, len(out), out.data.cast("B"), what)


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
        pieces = _by_clip(frames, [(past, past["frame_count"]) for _, past in before])
        out["history_frames"] = length = sum(len(numbers) for _, numbers in pieces)
        video = out["history_video"] = np.zeros((3, len(frames), *window.size), np.uint8)
        at = len(frames) - length
        for past, numbers in pieces:
            _video(split, sample.shard, past, numbers.tolist(), place, video[:, at : at + len(numbers)])
            at += len(numbers)

    if "audio" in split.names:
        count = round(window.history_seconds * row["fps"] / window.stride) * window.stride
        out |= sound.before_window(split, sample.shard, before, row, start, count)

    if split.latents:
        shard, numbers_before = sample.shard, [number for number, _ in before]
        codes_of = ((number, [split.codes(name, shard, number) for name in split.latents]) for number in numbers_before)
        # a clip without latents ends the history
        clips = list(takewhile(lambda clip: all(items.counts[clip[0]] for items in clip[1]), codes_of))
        for number, columns in clips:
            split.check_alike(shard, number, columns)
        first = clips[0][1][0]
        factor = first.units[sample.row]
        latents = start // factor - np.arange(round(window.history_seconds * row["fps"] / factor), 0, -1)
        pieces = _by_clip(latents, [(number, first.counts[number]) for number, _ in clips])
        for column, items in zip(split.latents, clips[0][1], strict=True):
            room = np.zeros((len(latents), *items.shapes[sample.row]), items.dtypes[sample.row])
            out["history_steps"] = length = sum(len(numbers) for _, numbers in pieces)
            at = len(room) - length
            for number, numbers in pieces:
                part = room[at : at + len(numbers)]
                _read(split, column, sample.shard, items, number, int(numbers[0]), part)
                at += len(numbers)
            out[f"history_{column}"] = room
    return out


def _of_stream(
    split: Split, sample: Sample, window: Window, rng: np.random.Generator | None, array: Array
) -> dict[str, Any]:
    """A window at a drawn latent of its clip's stream, and the latents before it in the stream.

    For each column of latents `NAME` and `history_NAME` (Lh, 2, C, h, w); Lh is the longest history that may be drawn,
    `history_steps` how many at its end are true, `stream_step` the latent at which the window begins.
    """
    assert window.lengths
    shard, number = sample.shard, sample.row
    first, *_ = split.latent_codes(shard, number)
    clips = clips_of(first.before, number)
    for clip_number in clips:
        split.latent_codes(shard, clip_number)

    # without random numbers as late as there is room, whatever a curriculum says
    lengths = window.lengths.of_batch(sample.batch) if rng else window.lengths
    count = 1 + (window.frames - 1) // first.units[clips[0]]
    begin = lengths.draw(sum(first.counts[clips.start : clips.stop]), count, rng)
    before = min(begin, lengths.most)

    out: dict[str, Any] = {"history_steps": before, "stream_step": begin}
    for column, items in zip(split.latents, split.latent_codes(shard, number), strict=True):
        shape, dtype = items.shapes[number], items.dtypes[number]
        out[column] = array(column, (count, *shape), dtype)
        past = out[f"history_{column}"] = array(f"history_{column}", (window.lengths.most, *shape), dtype)
        past[: len(past) - before] = 0
        for part, start in ((past[len(past) - before :], begin - before), (out[column], begin)):
            for clip_number in clips:
                own = items.before[clip_number]
                low, high = max(start, own), min(start + len(part), own + items.counts[clip_number])
                if low < high:
                    place = part[low - start : high - start]
                    _read(split, column, shard, items, clip_number, low - own, place)
    return out


def _clips(split: Split, sample: Sample, window: Window) -> list[tuple[int, Mapping[str, Any]]]:
    """The clips that a window may be in: row numbers and rows of the base."""
    numbers = [sample.row]
    if window.lengths:
        before = split.codes(split.latents[0], sample.shard, sample.row).before
        numbers = [*clips_of(before, sample.row)]
    return [(number, split.base.row(sample.shard, number)) for number in numbers]


def _frames_of_stream(split: Split, sample: Sample, window: Window, begin: int) -> range:
    """The frames of a window that begins at latent `begin` of its stream, counted from the stream's first."""
    factor = split.codes(split.latents[0], sample.shard, sample.row).units[sample.row]
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


def _span(row: Mapping[str, Any], prefix: str = "") -> tuple[int, int, int]:
    """Offset, size and CRC-32 of a member of a tar."""
    return row[f"{prefix}offset"], row[f"{prefix}size"], row[f"{prefix}crc32"]
