"""Distances of resampled videos: the errors of figures that are of all videos together.

A resample draws units, such as sources or prompts, with replacement, and a row counts as often as its unit was drawn. Rows
that count twice make a set smaller than it seems, and Fréchet distances of small sets are too large: the spread of the
replicates says how much the figure varies at this number of videos, their mean is beside it.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from longtake.training.metrics.distance import frechet_distance, kernel_distance, kernel_sums, moments

_EIGENVALUES = (
    8  # operations of a root, products and eigenvalues of matrices D wide, in D^3, beside those of singular values
)


class Rows(NamedTuple):
    """Features `(N, D)`, and the number of the unit that each is of, `(N,)` from 0 on."""

    values: Tensor
    units: Tensor


def times(draws: npt.NDArray[np.int64], units: int) -> Tensor:
    """How often each resample has each of the units: drawn numbers `(R, n)` -> `(R, units)` float64."""
    counts = torch.zeros(len(draws), units, dtype=torch.float64)
    drawn = torch.as_tensor(draws)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))


def frechet(real: Rows, fake: Rows) -> float:
    """The Fréchet distance of all rows."""
    return frechet_distance(*(moments(rows.values.cpu()) for rows in (real, fake)))


def frechet_replicates(real: Rows, fake: Rows, real_times: Tensor, fake_times: Tensor) -> Tensor:
    """The Fréchet distance of each resample, `(R,)` float64, from `times` of the units of both sides, `(R, U)` each.

    The trace of the root of the product of two covariances A^T A and B^T B is the sum of the singular values of A B^T,
    which has as many rows and columns as there are samples; where there are more samples than features, moments are
    cheaper.
    """
    sides = [(rows.values.double().cpu(), rows.units.cpu()) for rows in (real, fake)]
    found = []
    for weights in zip(real_times, fake_times, strict=True):
        parts = [_weighted(*side, of) for side, of in zip(sides, weights, strict=True)]
        found.append(_frechet(*parts[0], *parts[1]))
    return torch.tensor(found, dtype=torch.float64)


def kernel(real: Rows, fake: Rows) -> float:
    """The kernel distance of all rows."""
    return kernel_distance(real.values.cpu(), fake.values.cpu())


def kernel_replicates(real: Rows, fake: Rows, real_times: Tensor, fake_times: Tensor) -> Tensor:
    """The kernel distance of each resample, `(R,)` float64, without the pairs of a row with itself or its own copies.

    Arguments as of `frechet_replicates`. A resample whose rows are all one row's copies has none: nan.
    """
    within = [_within(rows, of) for rows, of in ((real, real_times), (fake, fake_times))]
    sums = kernel_sums(real.values.cpu(), real.units.cpu(), fake.values.cpu(), fake.units.cpu())
    totals = [of @ rows.units.cpu().bincount().double() for rows, of in ((real, real_times), (fake, fake_times))]
    return within[0] + within[1] - 2 * ((real_times @ sums) * fake_times).sum(1) / (totals[0] * totals[1])


def _within(rows: Rows, of: Tensor) -> Tensor:
    """The mean kernel of two different rows of each resample, `(R,)`."""
    values, units = rows.values.cpu(), rows.units.cpu()
    sums, size = kernel_sums(values, units, values, units), units.bincount().double()
    own = torch.zeros(len(size), dtype=torch.float64)
    own.index_add_(0, units, (values.double().square().sum(1) / values.shape[1] + 1) ** 3)
    squares = of.square()
    pairs = (of @ size).square() - squares @ size
    return (((of @ sums) * of).sum(1) - squares @ own) / pairs


def _weighted(values: Tensor, units: Tensor, of: Tensor) -> tuple[Tensor, Tensor]:
    """The mean `(D,)` of rows that count so often, and rows `A`, of which A^T A is their covariance."""
    weights = of[units]
    values, weights = values[weights > 0], weights[weights > 0]
    total = weights.sum()
    mean = weights @ values / total
    return mean, (values - mean) * (weights / (total - 1)).sqrt()[:, None]


def _frechet(first_mean: Tensor, first: Tensor, second_mean: Tensor, second: Tensor) -> float:
    """From means, and rows whose A^T A is the covariance."""
    few, many = sorted((len(first), len(second)))
    if few * few * many < _EIGENVALUES * first.shape[1] ** 3:
        cross = torch.linalg.svdvals(first @ second.T).sum()
    else:
        cross = _trace_of_root(first.T @ first, second.T @ second)
    apart = (first_mean - second_mean).square().sum()
    return max(0.0, float(apart + first.square().sum() + second.square().sum() - 2 * cross))


def _trace_of_root(first: Tensor, second: Tensor) -> Tensor:
    """tr (S1 S2)^1/2, by the eigenvalues of L^T S2 L, where S1 is L L^T."""
    half, fails = torch.linalg.cholesky_ex(first)
    if fails:  # S1 is singular
        values, vectors = torch.linalg.eigh(first)
        half = vectors * values.clamp_min(0).sqrt()
    return torch.linalg.eigvalsh(half.T @ second @ half).clamp_min(0).sqrt().sum()
