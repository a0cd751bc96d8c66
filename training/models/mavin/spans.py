"""Which latents of a training window are noised, and the loss on them (arXiv 2405.18003, consecutive noising).

A window of T latents is A | M | B; M, the span, is noised, and A and B enter as they are. There is no channel that says
which is which. Beside the paper's spans, of any length at any place, are two to compare with: spans of one length, and
latents drawn one by one, as BERT draws words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from longtake.training.models.common import flow

_PAPER = 32  # frames of the paper's windows, whose spans start at 5 to 15 and end at 17 to 27
_STARTS, _ENDS = (5, 15), (17, 27)


@dataclass(frozen=True)
class Spans:
    """How spans of windows of `latents` are drawn.

    kind     variable: start and end are drawn each for itself; fixed: the length is `length`, its place is drawn; random:
             each latent is noised by itself, as many on average as with variable
    latents  of a window
    starts   the first and the last start of a span
    ends     the first and the last end, the number of the latent after the span
    length   of fixed spans
    """

    kind: Literal["variable", "fixed", "random"]
    latents: int
    starts: tuple[int, int]
    ends: tuple[int, int]
    length: int = 0

    def __post_init__(self) -> None:
        (first, last), (least, most) = self.starts, self.ends
        if not 1 <= first <= last < least <= most < self.latents:
            raise ValueError(
                f"spans: starts {first} to {last} and ends {least} to {most} do not fit a window of {self.latents} latents;"
                f" they need 1 <= starts < ends <= {self.latents - 1}"
            )
        if self.kind == "fixed" and not 1 <= self.length <= most - first:
            raise ValueError(f"spans: length {self.length} does not fit between {first} and {most}")

    @property
    def sides(self) -> tuple[int, int]:
        """The fewest and the most latents on a side of a span; of random ones, as of variable ones."""
        (first, last), (least, most) = self.starts, self.ends
        if self.kind == "fixed":
            last, least = most - self.length, first + self.length
        return min(first, self.latents - most), max(last, self.latents - least)

    @property
    def gap(self) -> tuple[int, int]:
        """The shortest and the longest span."""
        if self.kind == "fixed":
            return self.length, self.length
        if self.kind == "random":
            return 1, self.latents - 1
        return self.ends[0] - self.starts[1], self.ends[1] - self.starts[0]


def spans_of(
    kind: Literal["variable", "fixed", "random"],
    latents: int,
    starts: tuple[int, int] | None = None,
    ends: tuple[int, int] | None = None,
    length: int | None = None,
) -> Spans:
    """Spans of a window, by default the paper's, scaled to its length. ValueError where they do not fit it."""
    if latents < 3:
        raise ValueError(f"a window of {latents} latents has no gap between two clips; it needs at least 3")

    def scaled(place: int) -> int:
        return round(place * latents / _PAPER)

    # the last start and the first end are two apart at most, so that short windows have room
    last = min(max(1, scaled(_STARTS[1])), latents - 2)
    first, least = max(1, min(scaled(_STARTS[0]), last)), max(last + 1, min(scaled(_ENDS[0]), latents - 1))
    most = max(least, min(scaled(_ENDS[1]), latents - 1))
    chosen = Spans("variable", latents, starts or (first, last), ends or (least, most))
    if kind == "variable":
        return chosen
    return Spans(kind, latents, chosen.starts, chosen.ends, length or sum(chosen.gap) // 2)


def draw_span(spans: Spans, rng: np.random.Generator) -> tuple[int, int]:
    """The span of one window, (start, end): latents start to end - 1. Of random ones, see `draw_mask`."""
    if spans.kind == "fixed":
        start = int(rng.integers(spans.starts[0], spans.ends[1] - spans.length + 1))
        return start, start + spans.length
    return int(rng.integers(*spans.starts, endpoint=True)), int(rng.integers(*spans.ends, endpoint=True))


def draw_mask(spans: Spans, rng: np.random.Generator) -> np.ndarray:
    """Which latents of one window are noised, bool (latents,): a span, or latents one by one, neither none nor all."""
    start, end = draw_span(spans, rng)
    places = np.arange(spans.latents)
    if spans.kind != "random":
        mask: np.ndarray = (places >= start) & (places < end)
        return mask
    mask = rng.random(spans.latents) < (end - start) / spans.latents
    if mask.all() or not mask.any():
        mask[int(rng.integers(spans.latents))] ^= True
    return mask


def spans_to_measure(spans: Spans) -> list[tuple[int, int]]:
    """Spans in the middle of a window: of the shortest, the middle and the longest length."""
    low, high = spans.gap
    high = min(high, spans.latents - 2)
    lengths = sorted({min(low, high), (low + high) // 2, high})
    return [((spans.latents - length) // 2, (spans.latents - length) // 2 + length) for length in lengths]


def mask_of(spans: Sequence[tuple[int, int]], latents: int) -> Tensor:
    """Which latents of each window are its span, bool (B, latents)."""
    places = torch.arange(latents)
    return torch.stack([(places >= start) & (places < end) for start, end in spans])


def times_of(t: Tensor, mask: Tensor, clean_time: Literal["zero", "same"]) -> Tensor:
    """The times (B, T) that a model is given where latents of `mask` (B, T) are at t (B,)."""
    return t[:, None] * mask if clean_time == "zero" else t[:, None].expand(mask.shape)


def noised(x0: Tensor, noise: Tensor, t: Tensor, mask: Tensor) -> Tensor:
    """X_t of the latents of the mask, and all others to the bit as they came, (B, C, T, h, w) fp32."""
    return torch.where(_over(mask, x0), flow.interpolate(x0, noise, t), x0.float())


def loss(velocity: Tensor, x0: Tensor, noise: Tensor, mask: Tensor) -> Tensor:
    """The flow's loss on the mask alone, (B,) fp32."""
    return flow.loss(velocity, x0, noise, mask.float())


def _over(mask: Tensor, x: Tensor) -> Tensor:
    return mask.view(mask.shape[0], 1, -1, 1, 1).expand_as(x)
