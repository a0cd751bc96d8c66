"""Films with holes that a model fills: where they are, what is seen beside them, and the film with what was made.

Frames are counted in the source, for several clips as if one followed the other. All frames outside of the holes pass as
they are.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, islice, pairwise
from typing import NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.training.models.generator import Gap


class Hole(NamedTuple):
    """Before frame `at` of the source, `dropped` of its frames are left out and `frames` new ones come in their place."""

    at: int
    dropped: int
    frames: int


def connecting(lengths: Sequence[int], cut: int, frames: int) -> list[Hole]:
    """Holes in place of the last `cut` frames of each clip and the first of the next one; with 0, all frames are kept."""
    return [Hole(end - cut, 2 * cut, frames) for end in list(accumulate(lengths))[:-1]]


def smoothing(joints: Sequence[int], reach: int) -> list[Hole]:
    """Holes in place of `reach` frames on both sides of the joints, the first frames of new clips.

    Raises:
        UserError: a joint has fewer frames before it; joints do not rise.
    """
    if wrong := [joint for joint in joints if joint <= reach]:
        raise UserError(f"joint {wrong[0]}: {reach} frames before it are remade, and there must be others before them")
    for joint, later in pairwise(joints):
        if later <= joint:
            raise UserError(f"joints {joint}, {later}: each must be above the one before")
    return [Hole(joint - reach, 2 * reach, 2 * reach) for joint in joints]


def reachable(joints: Sequence[int], reach: int, frames: int, least: int) -> list[int]:
    """Those of some rising joints of a film of so many frames that have `least` frames beside what is remade, the first first."""
    kept, end = list[int](), 0
    for joint in joints:
        if joint - reach - end >= least and frames - joint - reach >= least:
            kept.append(joint)
            end = joint + reach
    return kept


def check_room(holes: Sequence[Hole], frames: int, least: int) -> None:
    """Refuse a hole with fewer than `least` frames on a side, of a film of so many: UserError."""
    ends = [0, *(hole.at + hole.dropped for hole in holes)]  # where the source goes on
    starts = [*(hole.at for hole in holes), frames]
    stretches = [start - end for start, end in zip(starts, ends, strict=True)]
    for hole, *sides in zip(holes, stretches, stretches[1:], strict=False):
        for side, length in zip(("before", "after"), sides, strict=True):
            if length < least:
                raise UserError(
                    f"{side} the gap at frame {hole.at} there are {max(length, 0)} frames, and the model needs {least};"
                    " remake fewer frames, or name fewer joints"
                )


def gaps_in(frames: Iterable[np.ndarray], holes: Sequence[Hole], most: int, prompt: str | None = None) -> Iterator[Gap]:
    """The gaps of a film, `frames` `(H, W, 3)` in order, with what is seen beside them: never a frame of another hole.

    One gap and `most` frames, at most, on its sides are in memory.
    """
    source = iter(frames)

    def stretch(count: int | None) -> tuple[list[np.ndarray], deque[np.ndarray]]:
        """The first and the last of the next `count` frames; of None, the first of all that are left."""
        first = list(islice(source, most if count is None else min(most, count)))
        last = deque(first, maxlen=most)
        last.extend(islice(source, 0 if count is None else count - len(first)))
        return first, last

    before = stretch(holes[0].at)[1]
    for hole, later in zip(holes, [*holes[1:], None], strict=True):
        end = hole.at + hole.dropped
        deque(islice(source, hole.dropped), maxlen=0)
        after, last = stretch(None if later is None else later.at - end)
        yield Gap(np.stack(before), np.stack(after), hole.frames, prompt)
        before = last


def filled(frames: Iterable[np.ndarray], holes: Sequence[Hole], made: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames of a film whose holes, in order, are filled with `made`, each `(n, H, W, 3)`, taken when its hole comes."""
    coming, new, left_out = deque(holes), iter(made), 0
    for number, frame in enumerate(frames):
        if coming and number == coming[0].at:
            left_out = coming.popleft().dropped
            yield from next(new)
        if left_out:
            left_out -= 1
        else:
            yield frame
