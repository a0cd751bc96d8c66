"""How far two sets of videos are apart, as distributions of features: Fréchet and kernel distance.

Values compare only if network, preprocessing, frames, counts, split and seed agree: `video_distance` puts all of
them beside the value.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.metrics.features import FeatureNetwork, features
from longtake.training.metrics.share import gathered

_BLOCK = 4096  # rows of a kernel matrix at a time


@dataclass(frozen=True)
class Moments:
    """Count, mean (D,) and scatter (D, D), the sum of outer products about the mean; float64, any number of rows."""

    count: int
    mean: Tensor
    scatter: Tensor

    def covariance(self) -> Tensor:
        """Unbiased (D, D); ValueError for fewer than two rows."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 samples, got {self.count}")
        return self.scatter / (self.count - 1)


def moments(rows: Tensor) -> Moments:
    """The moments of rows (N, D), N >= 1, on their device."""
    if rows.ndim != 2 or not len(rows):
        raise ValueError(f"moments are of (N, D) with N at least 1, got {tuple(rows.shape)}")
    values = rows.double()
    mean = values.mean(0)
    centred = values - mean
    return Moments(len(rows), mean, centred.T @ centred)


def merge(parts: Iterable[Moments]) -> Moments:
    """Moments of all rows together, in one pass and without cancellation (Chan, Golub, LeVeque 1979, eq. 2.1)."""
    total: Moments | None = None
    for part in parts:
        if total is None or not total.count:
            total = part
            continue
        count = total.count + part.count
        shift = part.mean - total.mean
        total = Moments(
            count,
            total.mean + shift * (part.count / count),
            total.scatter + part.scatter + torch.outer(shift, shift) * (total.count * part.count / count),
        )
    if total is None:
        raise ValueError("no samples at all")
    return total


def frechet_distance(first: Moments, second: Moments) -> float:
    """|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^1/2) (Heusel et al., arXiv 1706.08500, eq. 6; of videos arXiv 1812.01717).

    tr (S1 S2)^1/2 is the sum of the singular values of S1^1/2 S2^1/2, with symmetric roots by eigendecomposition.
    Unlike the root of the product, which is not symmetric, that stays exact for singular matrices.
    """
    _same_width(first.mean, second.mean)
    a, b = first.covariance(), second.covariance()
    cross = torch.linalg.svdvals(_root(a) @ _root(b)).sum()
    value = (first.mean - second.mean).square().sum() + a.trace() + b.trace() - 2 * cross
    return max(0.0, float(value))


def kernel_distance(first: Tensor, second: Tensor) -> float:
    """Unbiased squared MMD with the kernel (x.y / D + 1)^3 (Bińkowski et al., arXiv 1801.01401, §4; KVD).

    Over all rows of (N, D) and (M, D), not over random subsets, so that there is no seed. Around 0, also below, where
    both sets are of one distribution.
    """
    _same_width(first, second)
    for rows in (first, second):
        if len(rows) < 2:
            raise ValueError(f"a kernel distance needs at least 2 samples, got {len(rows)}")
    within = sum(
        (_kernel_sum(rows, rows) - float(_kernel(rows.double().square().sum(1), rows.shape[1]).sum()))
        / (len(rows) * (len(rows) - 1))
        for rows in (first, second)
    )
    return within - 2 * _kernel_sum(first, second) / (len(first) * len(second))


def kernel_sums(first: Tensor, first_units: Tensor, second: Tensor, second_units: Tensor) -> Tensor:
    """The kernel of `kernel_distance` over all pairs of rows (N, D) and (M, D), summed by their units: (U, V) float64."""
    sums = torch.zeros(int(first_units.max()) + 1, int(second_units.max()) + 1, dtype=torch.float64)
    for a, u in zip(first.split(_BLOCK), first_units.split(_BLOCK), strict=True):
        for b, v in zip(second.split(_BLOCK), second_units.split(_BLOCK), strict=True):
            pairs = _kernel(b.double() @ a.double().T, a.shape[1])  # so that rows are added up, which is faster
            columns = pairs.new_zeros(sums.shape[1], len(a)).index_add_(0, v, pairs)
            sums.index_add_(0, u, columns.T)
    return sums


def gathered_moments(part: Moments | None) -> Moments:
    """The moments of all ranks together; `part` is None on a rank without rows. Every rank must call it.

    Raises:
        ValueError: no rank has any.
    """
    packed = torch.empty((0, 0), dtype=torch.float64)
    if part is not None:
        part = Moments(part.count, part.mean.cpu(), part.scatter.cpu())
        packed = torch.cat([part.mean.new_tensor([part.count]), part.mean, part.scatter.flatten()])[None]
    rows = gathered(packed)
    width = math.isqrt(rows.shape[1])  # of 1 + D + D^2
    return merge(Moments(int(row[0]), row[1 : width + 1], row[width + 1 :].view(width, width)) for row in rows)


class Sample:
    """Videos of one kind, added batch by batch, as a distribution of a network's features.

    With `kernel` all features are kept, 4 bytes a number; else only moments, for any number of videos.
    """

    def __init__(self, name: str, network: FeatureNetwork, kernel: bool = True) -> None:
        self.name, self.network, self.kernel = name, network, kernel
        self.videos = 0
        self.shape: tuple[int, ...] | None = None  # T, H, W
        self.moments: Moments | None = None
        self._rows: list[Tensor] = []

    def add(self, batch: Tensor, times: int = 1) -> None:
        """Add videos (B, 3, T, H, W) in [-1, 1], on the network's device, each `times` times. ValueError for another T, H, W."""
        self.shape = self.shape or tuple(batch.shape[2:])
        _alike(self.name, tuple(batch.shape[2:]), self.shape)
        rows = features(self.network, batch).repeat(times, 1)
        part = moments(rows)
        self.moments = part if self.moments is None else merge([self.moments, part])
        self.videos += times * len(batch)
        if self.kernel:
            self._rows.append(rows.cpu())

    def rows(self) -> Tensor:
        """All features (N, D), on the CPU."""
        return torch.cat(self._rows) if self._rows else torch.empty(0, 0)

    def of_all_ranks(self) -> "Sample":
        """The videos of all ranks; a rank may have none. Every rank must call it."""
        total = Sample(self.name, self.network, self.kernel)
        counts = gathered(torch.tensor([[self.videos, *(self.shape or (0, 0, 0))]]))
        total.videos = int(counts[:, 0].sum())
        for row in counts[counts[:, 0] > 0].tolist():
            total.shape = total.shape or tuple(row[1:])
            _alike(self.name, tuple(row[1:]), total.shape)
        if total.videos:
            total.moments = gathered_moments(self.moments)
            total._rows = [gathered(self.rows())] if self.kernel else []
        return total


def distance(real: Sample, fake: Sample, *, split: str, seed: int) -> dict[str, Any]:
    """Fréchet (and kernel) distance of two samples, as `video_distance` gives it, which also says what raises."""
    for side in (real, fake):
        if side.moments is None:
            raise ValueError(f"{side.name}: no videos")
        if side.moments.count < 2:
            raise ValueError(
                f"{side.name}: {side.moments.count} sample; a distance between distributions needs at least 2"
            )
    assert real.moments and fake.moments and real.shape and fake.shape
    _alike(fake.name, fake.shape, real.shape)
    fewest, width = min(real.moments.count, fake.moments.count), len(real.moments.mean)
    few = f"{fewest} samples for {width} features: the covariance is singular and the value depends on their number"
    return {
        "frechet": frechet_distance(real.moments, fake.moments),
        "kernel": kernel_distance(real.rows(), fake.rows()) if real.kernel and fake.kernel else None,
        **real.network.record(),
        "features": width,
        "frames": real.shape[0],
        "height": real.shape[1],
        "width": real.shape[2],
        "videos_real": real.videos,
        "videos_fake": fake.videos,
        "samples_real": real.moments.count,
        "samples_fake": fake.moments.count,
        "split": split,
        "seed": seed,
        "warning": few if fewest <= width else None,
    }


def heldout_distance(real: Sample, fake: Sample, seed: int) -> dict[str, Any]:
    """`distance` to held-out videos; UserError where that raises ValueError."""
    try:
        return distance(real, fake, split="val", seed=seed)
    except ValueError as e:
        raise UserError(f"features: {e}") from e


def video_distance(
    real: Iterable[Tensor],
    fake: Iterable[Tensor],
    network: FeatureNetwork,
    *,
    split: str,
    seed: int,
    kernel: bool = True,
    across_ranks: bool = False,
) -> dict[str, Any]:
    """Fréchet (and kernel) distance between real and generated videos, with all facts that make the value comparable.

    With StyleGAN-V's I3D it is FVD and KVD, with a network of images the distance over single frames.

    Args:
        real, fake: batches (B, 3, T, H, W) in [-1, 1], on the device of the network, all of one T, H and W.
        split, seed: which data the real videos are of, and what the fake ones were drawn with; for the record.
        kernel: also the kernel distance, which keeps all features in memory (4 bytes a number).
        across_ranks: every rank gives its share, which may be empty, and gets the value over all.

    Returns:
        A flat dict for JSON. `warning` is None, or says that there are too few samples for the covariance.

    Raises:
        ValueError: fewer than two samples on a side; clips of unequal shape.
    """
    sides = [Sample("real", network, kernel), Sample("fake", network, kernel)]
    for side, batches in zip(sides, (real, fake), strict=True):
        for batch in batches:
            side.add(batch)
    total_real, total_fake = (side.of_all_ranks() if across_ranks else side for side in sides)
    return distance(total_real, total_fake, split=split, seed=seed)


def _alike(name: str, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
    if shape != first:
        raise ValueError(f"{name}: clips of {shape} (T, H, W) beside clips of {first}; make them alike first")


def _same_width(first: Tensor, second: Tensor) -> None:
    if first.shape[-1] != second.shape[-1]:
        raise ValueError(f"features of two networks: {first.shape[-1]} and {second.shape[-1]} wide")


def _root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return (vectors * values.clamp_min(0).sqrt()) @ vectors.T


def _kernel(products: Tensor, width: int) -> Tensor:
    shifted = products / width + 1
    return shifted * shifted * shifted


def _kernel_sum(first: Tensor, second: Tensor) -> float:
    blocks = (
        _kernel(a.double() @ b.double().T, a.shape[1]).sum() for a in first.split(_BLOCK) for b in second.split(_BLOCK)
    )
    return math.fsum(float(block) for block in blocks)
