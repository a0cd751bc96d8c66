"""Scores of a clip from its planes, with the names and order of `datasets.schema.SCORES`: shares, or values scaled to about 0..1."""

from itertools import pairwise

import numpy as np

from longtake.pipeline.decode import chroma, luma

_STILL = 0.5 / 255
_DARK = 36  # (limited-range) luma that still counts as black
_LIT_SHARE = 0.01  # a row with no more pixels above black is part of a bar: they are coding noise


def score(clip: list[np.ndarray]) -> dict[str, float]:
    """Scores of T frames of planes.

    motion: mean |luma difference| of neighbours. still: share of neighbours that hardly differ.
    brightness, contrast: mean and mean spatial deviation of luma. sharpness: mean |Laplacian| of luma.
    saturation: mean distance of chroma from grey. dark: share of nearly black pixels. letterbox: share of the picture
    that is black bars in all frames of the sample.
    """
    y = np.stack([luma(p) for p in clip])
    # sums of integers are exact, and differences of bytes are a quarter as wide
    sums = [int((np.maximum(a, b) - np.minimum(a, b)).sum(dtype=np.int64)) for a, b in pairwise(y)]
    changes = [total / y[0].size / 255 for total in sums]
    sample = y[:: max(1, len(y) // 8)].astype(np.int16)
    laplacian = np.diff(sample, 2, 1)[:, :, 1:-1] + np.diff(sample, 2, 2)[:, 1:-1]
    colour = np.stack([chroma(p) for p in clip[:: max(1, len(clip) // 8)]]).astype(np.int16) - 128
    return {
        "motion": float(np.mean(changes)) if changes else 0.0,
        "still": float(np.mean([change < _STILL for change in changes])) if changes else 1.0,
        "brightness": float(np.clip((y.mean() - 16) / 219, 0, 1)),
        "contrast": float(sample.std((1, 2)).mean() / 219),
        "sharpness": float(np.abs(laplacian).mean() / 255),
        "saturation": float(np.abs(colour).mean() / 128),
        "dark": float((sample <= _DARK).mean()),
        "letterbox": _bars(sample.max(0)),
    }


def _bars(brightest: np.ndarray) -> float:
    """The share of the picture in rows and columns at the edges that are never brighter than black."""
    shown = 1.0
    for side in (0, 1):
        lit = np.flatnonzero((brightest > _DARK).mean(1 - side) > _LIT_SHARE)
        shown *= (lit[-1] - lit[0] + 1) / brightest.shape[side] if len(lit) else 0
    return 1 - shown


_SIDE, _FREQUENCIES = 32, 8
# The first rows of the type-II cosine transform.
_COSINES = np.cos(np.pi / _SIDE * (np.arange(_SIDE) + 0.5) * np.arange(_FREQUENCIES)[:, None])


def perceptual_hash(planes: np.ndarray) -> int:
    """64 bits of a frame that change little under scaling, recoding and brightness.

    The signs, against their median, of the 8 x 8 lowest frequencies of the luma shrunk to 32 x 32 (pHash).
    """
    y = luma(planes).astype(np.float64)
    rows, columns = (np.arange(_SIDE + 1) * side // _SIDE for side in y.shape)
    sums = np.pad(y.cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    boxes = np.diff(np.diff(sums[np.ix_(rows, columns)], axis=0), axis=1)
    small = boxes / (np.diff(rows)[:, None] * np.diff(columns))
    spectrum = (_COSINES @ small @ _COSINES.T).reshape(-1)
    return int(np.packbits(spectrum > np.median(spectrum[1:])).view(">u8")[0])
