"""The sound of a window, and of what came before it."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from longtake.datasets import audio
from longtake.datasets.errors import Failure
from longtake.datasets.loader.split import Split

Row = Mapping[str, Any]


def of_window(split: Split, shard: int, number: int, row: Row, first: int, frames: int) -> dict[str, Any]:
    """`audio` (channels, samples) float32 of `frames` frames from `first` on; `audio_mask`, whether the clip has sound.

    Only this part of the clip is decoded.
    """
    cached = _row(split, shard, number, row)
    begin = audio.offset_of(first, row, cached["rate"])
    count = audio.samples_of(frames, row, cached["rate"])
    if not cached["has_audio"]:
        return {"audio": np.zeros((cached["channels"], count), np.float32), "audio_mask": False}
    return {"audio": _decoded(split, shard, cached, begin, begin + count), "audio_mask": True}


def before_window(
    split: Split, shard: int, before: Iterable[tuple[int, Row]], row: Row, first: int, frames: int
) -> dict[str, Any]:
    """`history_audio` (channels, samples) of the `frames` frames before frame `first`, joined from a clip and those before it.

    Of these the last `history_samples` are true, and all before them is zero. A clip without sound ends it.

    Args:
        before: the numbers and rows of the clip and of those that it follows, latest first.
    """
    rate, channels = split.sound
    room = np.zeros((channels, audio.samples_of(frames, row, rate)), np.float32)
    missing = room.shape[1]
    for number, past in before:
        cached = _row(split, shard, number, past)
        if not cached["has_audio"] or not missing:
            break
        end = audio.offset_of(first, row, rate) if past["key"] == row["key"] else cached["samples"]
        if count := min(end, missing):
            room[:, missing - count : missing] = _decoded(split, shard, cached, end - count, end)
        missing -= count
    return {"history_audio": room, "history_samples": room.shape[1] - missing}


def _row(split: Split, shard: int, number: int, row: Row) -> dict[str, Any]:
    """A clip's row of the column. Raises Failure where its sound is in another form than that of the column's first clip."""
    cached = split.cache_row(audio.COLUMN, shard, number, row)
    if (cached["rate"], cached["channels"]) != split.sound:
        url = split.columns[audio.COLUMN].tar(shard)[0]
        raise Failure(
            f"{url}: has {cached['channels']} channels at {cached['rate']} Hz, other clips have {split.sound[1]} at"
            f" {split.sound[0]}; delete its index and run a `cache_audio` stage"
        )
    return cached


def _decoded(split: Split, shard: int, cached: Row, begin: int, end: int) -> np.ndarray:
    rows = split.columns[audio.COLUMN]
    data = split.reader.member(rows, shard, cached["offset"], cached["size"], cached["crc32"])
    return audio.decode(data, begin, end, cached["channels"], f"{rows.tar(shard)[0]}: {cached['key']}")
