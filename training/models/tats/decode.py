"""From logits to a token: temperature, then top-k, then top-p, then a draw. Pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check(temperature: float, top_k: int, top_p: float) -> None:
    """ValueError for settings that leave nothing to draw from."""
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature is {temperature:g}; it must be a number above 0, and 1 changes nothing")
    if top_k < 0:
        raise ValueError(f"top_k is {top_k}; it must be 1 or more, or 0 for all codes")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p is {top_p:g}; it must be above 0 and at most 1, which leaves out none")


def candidates(logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0) -> tuple[Tensor, Tensor]:
    """The tokens that may be drawn, the likeliest first: their probabilities, and their ids, both `(B, n)`.

    Of the `top_k` likeliest (0: of all), scaled to a sum of 1, those are kept that together reach `top_p`: up to and with the
    first by which their sum exceeds it. The others have a probability of 0; kept ones have a sum of 1.

    Args:
        logits: `(B, codes)`.
    """
    check(temperature, top_k, top_p)
    count = min(top_k or logits.shape[-1], logits.shape[-1])
    values, ids = logits.topk(count, dim=-1)
    chances = (values.double() / temperature).softmax(dim=-1)
    if top_p < 1:
        before = chances.cumsum(dim=-1) - chances
        # the likeliest is kept whatever rounding does
        kept = before <= top_p
        kept[:, 0] = True
        chances = chances * kept
    return chances / chances.sum(dim=-1, keepdim=True), ids


def draw(chances: Tensor, ids: Tensor, uniform: Tensor) -> Tensor:
    """One of the ids `(B, n)` of each row with these probabilities, by a number `(B,)` from [0, 1): `(B,)`.

    Which one it is depends on the row and its number alone.
    """
    sums = chances.cumsum(dim=-1)
    places = torch.searchsorted(sums, uniform.to(sums)[:, None] * sums[:, -1:], right=True)
    # rounding may end behind the last that has a chance
    last = (chances > 0).sum(dim=-1, keepdim=True) - 1
    return ids.gather(1, torch.minimum(places, last))[:, 0]
