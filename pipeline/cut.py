"""Shot boundaries while frames stream by: hard cuts against an adaptive threshold, black stretches, gaps in time.

A cut is a frame whose distance to the one before stands out from its neighbours by a factor, not by an absolute
amount, so that fast motion and noise do not cut and a change between two dim scenes does. What it gives up: long
cross-dissolves stay in one shot.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from longtake.pipeline.decode import chroma, luma

_LOOK = 3  # frames on either side that the threshold adapts to
_RATIO = 3.0  # how far a cut stands out from its neighbours
_FLOOR = 0.06  # no cut below this distance
_BLACK_LUMA, _BLACK_SHARE = 36, 0.002  # a black frame has at most this share of pixels above this (limited-range) luma


@dataclass(frozen=True)
class Sampled:
    """A frame at the clips' rate: planes (see decode.to_planes), source frame number, seconds, whether time jumped before it."""

    planes: np.ndarray
    number: int
    seconds: float
    after_gap: bool


def is_black(planes: np.ndarray) -> bool:
    y = luma(planes)
    return bool(np.count_nonzero(y > _BLACK_LUMA) <= _BLACK_SHARE * y.size)


Signature = tuple[np.ndarray, np.ndarray]


def shots(frames: Iterator[Sampled]) -> Iterator[tuple[Sampled, bool, bool]]:
    """Each frame with (starts a shot, is black), after a look-ahead of a few frames.

    A source frame that is shown for several ticks counts once, or a low frame rate would look like a row of cuts.
    """
    window: deque[tuple[list[Sampled], float, Signature]] = deque(maxlen=2 * _LOOK + 1)
    was_black = True

    def verdict(at: int) -> Iterator[tuple[Sampled, bool, bool]]:
        nonlocal was_black
        shown, here, _ = window[at]
        others = sorted(d for i, (_, d, _) in enumerate(window) if i != at)
        # without the largest neighbour: a second cut nearby must not hide this one
        level = float(np.mean(others[:-1] or others or [0.0]))
        stands_out = here > _FLOOR and here > _RATIO * level
        # a flash comes back to where it was: the frame after it looks like the one before
        flash = 0 < at < len(window) - 1 and distance(window[at - 1][2], window[at + 1][2]) < here / 3
        black = is_black(shown[0].planes)
        starts = not black and (was_black or shown[0].after_gap or (stands_out and not flash))
        was_black = black
        for n, frame in enumerate(shown):
            yield frame, starts and n == 0, black

    waiting = 0
    for frame in frames:
        if window and frame.number == window[-1][0][0].number and not frame.after_gap:
            window[-1][0].append(frame)
            continue
        if waiting > _LOOK:
            yield from verdict(len(window) - waiting)
            waiting -= 1
        current = signature(frame.planes)
        window.append(([frame], distance(window[-1][2], current) if window else 0.0, current))
        waiting += 1
    for left in range(waiting, 0, -1):
        yield from verdict(len(window) - left)


def signature(planes: np.ndarray) -> Signature:
    """What a frame is compared by: an 8 x 8 grid of mean luma, and histograms of luma and chroma; both 0..1."""
    y = luma(planes)
    h, w = y.shape
    grid = y[: h // 8 * 8, : w // 8 * 8].reshape(8, h // 8, 8, w // 8).mean((1, 3)) / 255
    histograms = [np.bincount(y.reshape(-1) >> 3, minlength=32) / y.size]
    histograms += [np.bincount(c.reshape(-1) >> 3, minlength=32) / c.size for c in chroma(planes)]
    return grid, np.concatenate(histograms)


def distance(a: Signature, b: Signature) -> float:
    """0 for equal signatures; about 0.1 to 1 across a cut."""
    return float(np.abs(a[0] - b[0]).mean() + np.abs(a[1] - b[1]).sum() / 6)
