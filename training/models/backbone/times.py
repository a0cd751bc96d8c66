"""Times of the flow in training: logit-normal, shifted, and inside of an expert's range; and what happens at which times."""

import math
from collections.abc import Sequence
from itertools import pairwise
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.training.models.common.flow import TIMES, shifted


class Times(NamedTuple):
    """How times are drawn: sigmoid of N(mean, std²), then `shifted`, of which only those from `low` to `high` count."""

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0
    low: float = 0.0
    high: float = 1.0

    def below(self, t: float) -> float:
        """The probability of a time below `t`, were there no range (the inverse of eq. 23 in 2403.03206 is that of 1 / shift)."""
        if t in (0.0, 1.0):
            return t
        before = t / (self.shift - (self.shift - 1) * t)
        return NormalDist(self.mean, self.std).cdf(math.log(before / (1 - before)))

    def draw(self, batch: int, rng: torch.Generator | None = None, device: torch.device | str = "cpu") -> Tensor:
        """`(batch,)` fp32; `rng` on `device`."""
        first, last = self.below(self.low), self.below(self.high)
        chance = first + (last - first) * torch.rand(batch, generator=rng, device=device, dtype=torch.float64)
        t = shifted(torch.sigmoid(self.mean + self.std * torch.special.ndtri(chance)), self.shift)
        return t.float().clamp(self.low, self.high)

    def shares(self) -> list[float]:
        """The probability of each of `TIMES` equal parts of the range."""
        edges = [self.below(self.low + (self.high - self.low) * n / TIMES) for n in range(TIMES + 1)]
        return [(high - low) / (edges[-1] - edges[0]) for low, high in pairwise(edges)]


def by_time(t: Tensor, losses: Tensor, low: float, high: float) -> dict[str, Tensor]:
    """Of each of `TIMES` equal parts of a range the share of the times `(B,)` in it, and the mean of their losses, NaN for none."""
    parts = ((t - low) / (high - low) * TIMES).long().clamp(0, TIMES - 1)
    terms = {}
    for number in range(TIMES):
        inside = parts == number
        terms[f"times/{number}"] = inside.float().mean()
        terms[f"loss_by_time/{number}"] = torch.where(inside, losses, 0.0).sum() / inside.sum()
    return terms


def grid(low: float, high: float, device: torch.device) -> Tensor:
    """`(TIMES,)` times spread evenly over a range, at which held-out losses are measured."""
    return low + (high - low) * (torch.arange(TIMES, device=device) + 0.5) / TIMES


def described(shares: Sequence[float]) -> str:
    """The shares of equal parts of a range as words."""
    return ", ".join(f"{share:.0%}" for share in shares)
