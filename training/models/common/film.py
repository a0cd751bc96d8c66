"""Films with holes that a model fills: where they are, what is seen beside them, and the film with what was made.

Frames are counted in the source, for several clips as if one followed the other. All frames outside of the holes pass as
they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from longtake.datasets.errors import UserError
from longtake.training.models.generator import Gap


class Hole(NamedTuple):
    """Before frame `at` of the source, `dropped` of its frames are left out and `frames` new ones come in their place."""

    at: int
    dropped: int
    frames: int


def joining(lengths: Sequence[int], frames: int) -> list[Hole]:
    """Holes between clips of these lengths, with all of their frames kept."""
    return connecting(lengths, 0, frames)


def connecting(lengths: Sequence[int], cut: int, frames: int) -> list[Hole]:
    """Holes in place of the last `cut` frames of each clip and the first of the next one."""
    return [Hole(end - cut, 2 * cut, frames) for end in list(accumulate(lengths))[:-1]]


def smoothing(joints: Sequence[int], reach: int) -> list[Hole]:
    """Holes in place of `reach` frames on both sides of the joints, the first frames of new clips.

    Raises:
        UserError: a joint has fewer frames before it; joints do not rise.
    """
    if wrong := [joint for joint in joints if joint <= reach]:
        raise UserError(f"joint {wrong[0]}: {reach} frames before it are remade, and there must be others before them")
    if any(later <= joint for joint, later in pairwise(joints)):
        raise UserError(f"joints {', '.join(map(str, joints))}: each must be above the one before")
    return [Hole(joint - reach, 2 * reach, 2 * reach) for joint in joints]


def reachable(joints: Sequence[int], reach: int, frames: int, least: int) -> list[int]:
    """Those of some rising joints of a film of so many frames that have `least` frames beside what is remade, the first first."""
    kept, end = list[int](), 0
    for joint in joints:
        if joint - reach - end >= least and frames - joint - reach >= least:
            kept.append(joint)
            end = joint + reach
    return kept


def gaps_in(
    frames: Iterable[np.ndarray], holes: Sequence[Hole], context: tuple[int, int], prompt: str | None = None
) -> list[Gap]:
    """The gaps of a film, `frames` `(H, W, 3)` in order, with what is seen beside them: never a frame of another hole.

    Args:
        context: the fewest and the most frames on a side.

    Raises:
        UserError: too few frames beside a hole.
    """
    least, most = context
    ends = [0, *(hole.at + hole.dropped for hole in holes)]  # where the source goes on
    before, after = [list[np.ndarray]() for _ in holes], [list[np.ndarray]() for _ in holes]
    which = 0  # the hole that comes next
    for number, frame in enumerate(frames):
        while which < len(holes) and number >= ends[which + 1]:
            which += 1
        if which < len(holes) and number >= holes[which].at:
            continue
        if which < len(holes) and number >= holes[which].at - most:
            before[which].append(frame)
        if which and number < ends[which] + most:
            after[which - 1].append(frame)
    for hole, *sides in zip(holes, before, after, strict=True):
        for side, seen in zip(("before", "after"), sides, strict=True):
            if len(seen) < least:
                raise UserError(
                    f"{side} the gap at frame {hole.at} there are {len(seen)} frames, and the model needs {least};"
                    " remake fewer frames, or name fewer joints"
                )
    return [
        Gap(np.stack(left), np.stack(right), hole.frames, prompt)
        for hole, left, right in zip(holes, before, after, strict=True)
    ]


def filled(frames: Iterable[np.ndarray], holes: Sequence[Hole], made: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The frames of a film whose holes, in order, are filled with `made`, each `(n, H, W, 3)`."""
    coming, left_out = list(zip(holes, made, strict=True)), 0
    for number, frame in enumerate(frames):
        if coming and number == coming[0][0].at:
            hole, new = coming.pop(0)
            left_out = hole.dropped
            yield from new
        if left_out:
            left_out -= 1
        else:
            yield frame
