"""Which caption of a clip a sample gets: one of those about its window, the same for the text and for its token states."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Place(NamedTuple):
    """Where a sample's window is: its clip, and its part of it. A window over several clips is where most of it is."""

    row: int  # of the clip in its shard
    start: float  # seconds in the clip
    end: float
    chance: float | None  # 0 to 1, of the sample's own random numbers; None: nothing is drawn


def drawn(spans: Sequence[Mapping[str, Any]] | None, place: Place) -> int | None:
    """The number of the caption that a sample gets; None where none is about its window.

    Each caption whose span overlaps the window is as likely; without random numbers it is the first of them. Columns of one
    list of captions get the same number.

    Args:
        spans: the captions of the clip with their `start` and `end`, None for those of the clip.
    """
    about = [
        number
        for number, span in enumerate(spans or ())
        if (span["start"] is None or span["start"] < place.end) and (span["end"] is None or span["end"] > place.start)
    ]
    if not about:
        return None
    return about[0 if place.chance is None else int(place.chance * len(about))]


def place(clips: Sequence[tuple[int, Mapping[str, Any]]], first: int, end: int, chance: float | None) -> Place:
    """The place of a window.

    Args:
        clips: the clips that follow each other around the window, as (row number in the shard, row of the base).
        first, end: its first frame, and the one after its last, counted from the start of the first clip.
    """
    places, before = [], 0
    for number, row in clips:
        start, stop = max(first - before, 0), min(end - before, row["frame_count"])
        places.append((stop - start, Place(number, start / row["fps"], stop / row["fps"], chance)))
        before += row["frame_count"]
    return max(places, key=lambda found: found[0])[1]
