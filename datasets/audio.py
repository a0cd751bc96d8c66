"""The sound of clips: which samples belong to which frames, how they are decoded, what the column says about itself.

Samples are counted at the column's rate from the first frame of the source on. So clips that follow each other share no
sample and miss none.
"""

from collections.abc import Iterator, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pyarrow.compute as pc

from longtake.datasets import index, ogg, schema, storage
from longtake.datasets.errors import Failure

COLUMN = "audio"
ENDING = "ogg"  # of members; the container of both codecs
UNREACHABLE = "unreachable"
REMEDY = "delete it and run a `cache_audio` stage"

# why a clip has no sound
REASONS = {
    "no_audio": "its source has no sound",
    "outside": "the sound of its source begins later, ends earlier, or has a gap there",
    "unreadable": "no decoder opens the sound, or it is damaged there",
    "too_large": "the sound exceeds a limit",
    "timed_out": "the sound took longer than `limits.timeout_seconds`",
    "crashed": "the decoder crashed on the sound",
    "missing": "its source is gone",
    "refused": "its source may not be read any more",
    UNREACHABLE: "the store of its source did not answer; the next run asks again",
    "changed": "its source is another file than the one that was cut",
}


class Count(NamedTuple):
    """Clips of a dataset."""

    with_sound: int
    clips: int


def sample_at(frame: int, fps: Fraction, rate: int) -> int:
    """The sample that is nearest to the beginning of a frame; both are counted from 0, and may be negative."""
    return (2 * frame * fps.denominator * rate + fps.numerator) // (2 * fps.numerator)


def span(row: Mapping[str, Any], rate: int) -> tuple[int, int]:
    """The first sample of a clip, a row of schema.INDEX, and the one after its last, counted from the source's first frame."""
    fps = _fps(row)
    first = _first_frame(row, fps)
    return sample_at(first, fps, rate), sample_at(first + row["frame_count"], fps, rate)


def samples_of(frames: int, row: Mapping[str, Any], rate: int) -> int:
    """Samples of a window of so many frames, wherever it begins: as many as there always are, where a frame has a broken number."""
    fps = _fps(row)
    return frames * fps.denominator * rate // fps.numerator


def offset_of(frame: int, row: Mapping[str, Any], rate: int) -> int:
    """The first sample of a clip's frame, counted from the clip's first sample."""
    fps = _fps(row)
    first = _first_frame(row, fps)
    return sample_at(first + frame, fps, rate) - sample_at(first, fps, rate)


def _fps(row: Mapping[str, Any]) -> Fraction:
    return Fraction(row["fps"]).limit_denominator(1001)


def _first_frame(row: Mapping[str, Any], fps: Fraction) -> int:
    """The number of a clip's first frame among those at its frame rate; its time is kept to the microsecond."""
    return round(row["start_seconds"] * fps)


def without_sound(settings: Mapping[str, Any], reason: str) -> dict[str, Any]:
    """What schema.AUDIO_INDEX says about a clip that has no sound; `settings` are those of the column."""
    assert reason in REASONS, reason
    facts = {name: settings[name] for name in ("codec", "rate", "channels")}
    return facts | {"samples": 0, "has_audio": False, "reason": reason}


def decode(data: bytes | memoryview, begin: int, end: int, channels: int, name: str = "clip") -> np.ndarray:
    """Samples `begin` to `end` of a member, (channels, end - begin) float32 in [-1, 1]; no more than these is decoded.

    A part is that of the whole; in Opus, of which it needs what came before, it differs by less than 1e-3.

    Raises:
        Failure: it is not decodable, or has no such samples.
    """
    import av

    out, found = np.zeros((channels, end - begin), np.float32), begin
    try:
        for start, values in ogg.decoded(data, begin, end) if begin < end else ():
            first, last = max(begin, start), min(end, start + len(values[0]))
            if first < last:
                for room, channel in zip(out, values, strict=True):
                    room[first - begin : last - begin] = channel[first - start : last - start]
                found = last
    except (av.error.FFmpegError, ArithmeticError, IndexError, TypeError, ValueError) as e:
        raise Failure(f"{name}: cannot decode its sound ({e}); run `longtake dataset verify`") from e
    if found != end:
        raise Failure(f"{name}: has no samples {begin} to {end} of its sound; run `longtake dataset verify`")
    return np.clip(out, -1, 1, out=out)


def count(dataset: str) -> Count | None:
    """How many clips have sound; None without a column of sound. Its shards are written before those of their clips."""
    committed = {*index.committed(dataset)}
    shards = [s for split in schema.SPLITS for s in index.read_shards(dataset, split, COLUMN)]
    shards = [s for s in shards if (s.split, s.name.partition(".")[0]) in committed]
    if not shards:
        return None
    return Count(
        sum(pc.sum(s.table["has_audio"]).as_py() or 0 for s in shards),
        sum(len(index.read_shard(dataset, s.split, s.name.partition(".")[0]).table) for s in shards),
    )


def problems(dataset: str, shard: index.Shard) -> Iterator[str]:
    """A line for each contradiction between the index of a shard of sound and its base."""
    url = storage.join(dataset, shard.split, f"{shard.name}.parquet")
    if shard.table.schema.remove_metadata() != schema.AUDIO_INDEX:
        yield f"{url}: not an index of sound; {REMEDY}"
        return
    base = index.read_shard(dataset, shard.split, shard.name.partition(".")[0]).table.to_pylist()
    if len(base) != len(shard.table):
        return  # reported as belonging to other clips
    for row, clip in zip(shard.table.to_pylist(), base, strict=True):
        begin, end = span(clip, row["rate"]) if row["has_audio"] else (0, 0)
        whole = bool(row["size"]) == row["has_audio"] == (row["reason"] is None)
        if row["samples"] != end - begin or not whole:
            yield f"{url}: {row['key']}: {row['samples']} samples, its clip has {end - begin}; {REMEDY}"
