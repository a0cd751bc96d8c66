"""Latents that follow each other in a video, as a memory is made of them."""

from typing import NamedTuple

import torch
from torch import Tensor


class Steps(NamedTuple):
    """Steps that follow each other: of the full latents, of the low-res branch's, and the time of the first.

    high   (B, C, T, H, W) normalised, fp32
    low    (B, C, T, h, w) normalised with its own statistics, or None without such a branch
    start  in steps; times are absolute, and whatever is cut off at the front, what is left keeps its own
    first  (B, T) bool, which of them are a video's first latent
    skip   (B,), so many in front of each sample are not there; None: all are
    """

    high: Tensor
    low: Tensor | None
    start: int
    first: Tensor
    skip: Tensor | None = None

    def ending(self, end: int, late: Tensor, count: int, known: Tensor) -> "Steps":
        """Of each sample the `count` steps that end `late` `(B,)` steps before step `end`; it has the last `known` of them.

        All have the times of those that end at `end`: what is seen beside a sample that ends earlier must be that much later.
        """
        index = (end - late[:, None] - count + torch.arange(count, device=late.device)).clamp(min=0)
        low = None if self.low is None else picked(self.low, index)
        start = self.start + end - count
        return Steps(picked(self.high, index), low, start, self.first.gather(1, index), some(count - known))


def some(skip: Tensor) -> Tensor | None:
    """`skip` `(B,)` where any sample lacks some, else None."""
    return skip if bool(skip.any()) else None


def picked(steps: Tensor, omega: Tensor) -> Tensor:
    """The steps Ω `(B, k)` of `(B, C, T, H, W)`: `(B, C, k, H, W)`."""
    return steps.gather(2, omega[:, None, :, None, None].expand(-1, steps.shape[1], -1, *steps.shape[3:]))
