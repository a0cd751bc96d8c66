"""One sample to what a training step sees of it: a window of its clip, the same in every column, and what came before.

The window is drawn from the sample's own random numbers; see datasets/README.md for what each column gives.
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from typing import Any

import numpy as np

from longtake.datasets import clip, later
from longtake.datasets.compact import Rows
from longtake.datasets.errors import Failure
from longtake.datasets.loader.order import sample_rng
from longtake.datasets.loader.reader import Reader
from longtake.datasets.loader.streams import Lengths, clips_of, first_step
from longtake.datasets.neighbours import pasts
from longtake.datasets.shard import described


@dataclass(frozen=True)
class Window:
    """What to take of a clip: T frames, every `stride`-th, at (height, width), and where on the longer side.

    `clip_starts` is the probability that a window is a clip's first one; None draws all of them alike.
    """

    frames: int
    stride: int
    size: tuple[int, int]
    random_crop: bool
    history_seconds: float = 0.0
    clip_starts: float | None = None
    lengths: Lengths | None = None


@dataclass(frozen=True)
class Sample:
    """A row of the index: its shard and place there; seed, epoch and copy, of which its chance is made (None: none).

    `batch` is the number of the global batch that it is in.
    """

    shard: int
    at: int
    chance: tuple[int, int, int] | None
    batch: int = 0


class Source:
    """A split with its cache columns, as worker processes need it."""

    def __init__(
        self, base: Rows, columns: Mapping[str, Rows], names: Mapping[str, str], reader: Reader, classes: list[str]
    ) -> None:
        """`names` are columns by the names that samples have them under, `columns` the rows of those that are caches."""
        self.base, self.columns, self.names, self.reader = base, columns, names, reader
        self.labels = {label: number for number, label in enumerate(classes)}
        self.latents = tuple(name for name in columns if name != "frame_diff")
        self.latent = self.latents[0] if self.latents else None

    def row(self, shard: int, at: int) -> dict[str, Any]:
        return self.base.row(shard, at)

    def place(self, column: str, sample: Sample, row: Mapping[str, Any]) -> dict[str, Any]:
        """Where a cache column has this clip. Raises Failure: it has other clips."""
        found = self.columns[column].row(sample.shard, sample.at)
        if found["key"] != row["key"] or found["base_sha256"] != row["sha256"]:
            url = self.columns[column].tar(sample.shard)[0]
            raise Failure(f"{url}: made from other clips; delete the column's indexes and run its stage again")
        return found


def load(source: Source, sample: Sample, window: Window) -> dict[str, Any]:
    """The columns of one sample, as arrays ready to be stacked. Raises Failure naming what is damaged."""
    row = source.row(sample.shard, sample.at)
    name = f"{source.base.tar(sample.shard)[0]}: {row['key']}"
    places = {column: source.place(column, sample, row) for column in source.columns}
    quantum = places[source.latent]["factor"] if source.latent else 1
    rng = sample_rng(*sample.chance[:2], row["key"], sample.chance[2]) if sample.chance else None
    if window.lengths:
        label = {"label": source.labels.get(row["label"], -1)} if "label" in source.names else {}
        return {"key": row["key"], **_of_stream(source, sample, window, rng), **label}
    frames, spot = _draw(window, rng, row["frame_count"], quantum)
    out: dict[str, Any] = {"key": row["key"], "start": frames[0]}
    if "video" in source.names:
        out["video"] = _video(source, sample.shard, row, frames, window.size, spot)
    if "frame_diff" in source.names:
        place = places["frame_diff"]
        packed = source.reader.member(source.columns["frame_diff"], sample.shard, *_span(place))
        diff = clip.unpack_array(packed, f"{name} (frame_diff)")
        if len(diff) != row["frame_count"] - 1:
            what = f"frame_diff has {len(diff)} entries for {row['frame_count']} frames"
            raise Failure(f"{name}: {what}; delete its index and run `shard` again")
        out["frame_diff"] = _channels_first(clip.crop(diff[np.asarray(frames[1:], int) - 1], window.size, spot))
    if source.latents:
        _in_step(source, sample.shard, [places[column] for column in source.latents])
        first, count = frames[0] // quantum, 1 + (window.frames - 1) // quantum
        for column in source.latents:
            out[column] = _latent(source, column, sample.shard, places[column], first, count)
    if window.history_seconds:
        out |= _history(source, sample, row, frames[0], window, spot)
    if "label" in source.names:
        out["label"] = source.labels.get(row["label"], -1)
    if "json" in source.names:
        # a plain image may have no text beside it
        data = source.reader.member(source.base, sample.shard, *_span(row, "json_")) if row["json_size"] else b""
        out["json"] = later.sample(described(bytes(data)), source.base.annotations(sample.shard), row["source"])
    return out


def _draw(window: Window, rng: np.random.Generator | None, count: int, quantum: int) -> tuple[list[int], float]:
    """The frames of a window that starts at a multiple of `quantum`, and the place of its crop."""
    span = (window.frames - 1) * window.stride + 1
    latest = (count - span) // quantum
    if rng is None:
        return list(range(0, span, window.stride)), 0.5
    if window.clip_starts is None or not latest:
        start = int(rng.integers(latest + 1)) * quantum
    elif rng.random() < window.clip_starts:
        start = 0
    else:
        start = (1 + int(rng.integers(latest))) * quantum
    return list(range(start, start + span, window.stride)), rng.random() if window.random_crop else 0.5


def _video(
    source: Source, shard: int, row: Mapping[str, Any], frames: list[int], size: tuple[int, int], spot: float
) -> np.ndarray:
    """(3, T, H, W) uint8."""
    mp4 = source.reader.member(source.base, shard, *_span(row, "mp4_"))
    own = (row["height"], row["width"])
    scaled = clip.covering_size(own, size)
    name = f"{source.base.tar(shard)[0]}: {row['key']}.mp4"
    made: np.ndarray | None = None
    for n, frame in enumerate(clip.decoded(mp4, frames, None if scaled == own else scaled, name)):
        part = clip.crop(frame[None], size, spot)[0]
        made = np.empty((3, len(frames), *part.shape[:2]), np.uint8) if made is None else made
        made[:, n] = part.transpose(2, 0, 1)
    assert made is not None
    return made


def _latent(source: Source, column: str, shard: int, place: Mapping[str, Any], first: int, count: int) -> np.ndarray:
    """(count, 2, C, h, w) float16, or uint16 of bfloat16's bits: steps of the latent; only these bytes are read."""
    rows = source.columns[column]
    shape = (2, place["channels"], place["height"], place["width"])
    step = 2 * int(np.prod(shape))
    start = place["offset"] + place["size"] - (place["steps"] - first) * step
    data = source.reader.range(rows, shard, start, count * step)
    sums = np.frombuffer(place["step_crc32"], "<u4")[first : first + count]
    if len(sums) != count or any(zlib.crc32(data[n * step : (n + 1) * step]) != s for n, s in enumerate(sums.tolist())):
        url = rows.tar(shard)[0]
        raise Failure(
            f"{url}: {place['key']}: steps {first} to {first + count} are damaged; run `longtake dataset verify`"
        )
    return np.frombuffer(data, _latent_dtype(place)).reshape(count, *shape)


def _latent_dtype(place: Mapping[str, Any]) -> str:
    return "<u2" if place.get("dtype") == "bfloat16" else "<f2"


def _in_step(source: Source, shard: int, places: Sequence[Mapping[str, Any]]) -> None:
    """Raises Failure where a clip has other steps in one column of latents than in another."""
    for column, place in zip(source.latents[1:], places[1:], strict=True):
        if place["steps"] != places[0]["steps"]:
            url = source.columns[column].tar(shard)[0]
            raise Failure(
                f"{url}: {place['key']}: has {place['steps']} steps, and {places[0]['steps']} in {source.names[str(source.latent)]}; "
                "delete the column's indexes and run its stage again"
            )
        if first_step(place) != first_step(places[0]):
            url = source.columns[column].tar(shard)[0]
            raise Failure(
                f"{url}: {place['key']}: begins at step {first_step(place)} of its stream, and at"
                f" {first_step(places[0])} in {source.names[str(source.latent)]}; encode both with the same join_seconds"
            )


def _history(
    source: Source, sample: Sample, row: Mapping[str, Any], start: int, window: Window, spot: float
) -> dict[str, Any]:
    """What came just before the window, from its clip and the neighbours that it follows without a hole.

    `history_video` (3, Th, H, W) with `history_frames`, `history_NAME` (Sh, 2, C, h, w) of each column of
    latents with `history_steps`: so many at the end are true, before them all is zero.
    """
    out: dict[str, Any] = {}
    before = list(pasts(source.base, sample.shard, sample.at, window.history_seconds))
    if "video" in source.names:
        wanted = start - window.stride * np.arange(round(window.history_seconds * row["fps"] / window.stride), 0, -1)
        parts = [
            _video(source, sample.shard, past, inside.tolist(), window.size, spot)
            for past, inside in _inside(wanted, [(past, past["frame_count"]) for _, past in before])
        ]
        out |= _ended("video", parts, np.zeros((3, len(wanted), *window.size), np.uint8), "frames", 1)
    if source.latents:
        found = ([source.place(c, replace(sample, at=at), past) for c in source.latents] for at, past in before)
        # a clip without latents ends what is known
        places = list(takewhile(lambda some: all(place["steps"] for place in some), found))
        for some in places:
            _in_step(source, sample.shard, some)
        factor = places[0][0]["factor"]
        wanted = start // factor - np.arange(round(window.history_seconds * row["fps"] / factor), 0, -1)
        inside_of = _inside(wanted, [(some, some[0]["steps"]) for some in places])
        for number, column in enumerate(source.latents):
            own = places[0][number]
            parts = [
                _latent(source, column, sample.shard, some[number], int(inside[0]), len(inside))
                for some, inside in inside_of
            ]
            shape = (len(wanted), 2, *(own[name] for name in ("channels", "height", "width")))
            out |= _ended(column, parts, np.zeros(shape, _latent_dtype(own)), "steps", 0)
    return out


def _of_stream(
    source: Source, sample: Sample, window: Window, rng: np.random.Generator | None
) -> dict[str, np.ndarray | int]:
    """A window at a step that is drawn of its clip's stream, and what the stream has before it.

    Of each column of latents `NAME` and `history_NAME` (Sh, 2, C, h, w); Sh is the longest that may be drawn,
    `history_steps` how many at the end are true, `stream_step` where the window begins.
    """
    assert window.lengths and source.latent
    places = []
    for at in clips_of(source.columns[source.latent], sample.shard, sample.at):
        own, row = replace(sample, at=at), source.row(sample.shard, at)
        places.append([source.place(column, own, row) for column in source.latents])
        _in_step(source, sample.shard, places[-1])
    factor, total = places[0][0]["factor"], sum(of[0]["steps"] for of in places)
    count = 1 + (window.frames - 1) // factor
    # without chance as late as there is, whatever a curriculum says
    lengths, room = window.lengths.at(sample.batch) if rng else window.lengths, window.lengths.most
    begin = lengths.draw(total, count, rng)
    known = min(begin, lengths.most)
    wanted = np.arange(begin - known, begin + count)
    out: dict[str, Any] = {"history_steps": known, "stream_step": begin}
    for number, column in enumerate(source.latents):
        parts = []
        for of in places:
            inside = wanted[
                (wanted >= first_step(of[number])) & (wanted < first_step(of[number]) + of[number]["steps"])
            ]
            if len(inside):
                first = int(inside[0]) - first_step(of[number])
                parts.append(_latent(source, column, sample.shard, of[number], first, len(inside)))
        steps = np.concatenate(parts)
        before = np.zeros((room, *steps.shape[1:]), steps.dtype)
        before[room - known :] = steps[:known]
        out |= {column: steps[known:], f"history_{column}": before}
    return out


def _inside(wanted: np.ndarray, pasts: list[tuple[Any, int]]) -> list[tuple[Any, np.ndarray]]:
    """The clips that hold some of the wanted numbers, earliest first, with these as their own; 0 is the first of the latest."""
    found: list[tuple[Any, np.ndarray]] = []
    base = pasts[0][1]
    for past, length in pasts:
        base -= length
        inside = wanted[(wanted >= base) & (wanted < base + length)] - base
        if len(inside):
            found.insert(0, (past, inside))
    return found


def _ended(name: str, parts: list[np.ndarray], whole: np.ndarray, unit: str, axis: int) -> dict[str, Any]:
    true = sum(part.shape[axis] for part in parts)
    if true:
        np.moveaxis(whole, axis, 0)[-true:] = np.moveaxis(np.concatenate(parts, axis), axis, 0)
    return {f"history_{name}": whole, f"history_{unit}": true}


def _span(place: Mapping[str, Any], prefix: str = "") -> tuple[int, int, int]:
    return place[f"{prefix}offset"], place[f"{prefix}size"], place[f"{prefix}crc32"]


def _channels_first(video: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(video.transpose(3, 0, 1, 2))
