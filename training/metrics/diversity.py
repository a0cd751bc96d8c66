"""How unlike videos are that were made of the same wish: distances between pairs of them."""

from collections.abc import Callable

import torch
from torch import Tensor

Distance = Callable[[Tensor, Tensor], Tensor]  # (B, 3, T, H, W) in [-1, 1] twice -> (B,)


def pixels(first: Tensor, second: Tensor) -> Tensor:
    """The root of the mean squared difference of videos, in 0..1: `(B,)`."""
    return (first.float() - second.float()).div(2).square().flatten(1).mean(1).sqrt()


def pairs(videos: Tensor, distance: Distance = pixels) -> Tensor:
    """The distance of each video `(S, 3, T, H, W)` to each other one: `(S, S)` float64, symmetric, 0 to itself."""
    found = torch.zeros(len(videos), len(videos), dtype=torch.float64)
    for number in range(1, len(videos)):
        others = videos[:number]
        found[number, :number] = distance(videos[number : number + 1].expand_as(others), others).double().cpu()
    return found + found.T


def mean_pairs(distances: Tensor, times: Tensor) -> Tensor:
    """The mean distance of two different videos that count so often, `(S, S)` and `(R, S)`: `(R,)`; nan where only one counts."""
    pairs = times.sum(1).square() - times.square().sum(1)
    return ((times @ distances) * times).sum(1) / pairs
