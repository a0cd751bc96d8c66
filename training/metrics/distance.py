"""How far two sets of videos are apart, as distributions of features: Fréchet and kernel distance.

Values compare only if network, preprocessing, frames, counts, split and seed agree: `video_distance` puts all of
them beside the value.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from longtake.training.metrics.features import FeatureNetwork, features

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
    """Of (N, D), N >= 1, on the device of `rows`."""
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
        if total is None:
            total = part
            continue
        count = total.count + part.count
        step = part.mean - total.mean
        total = Moments(
            count,
            total.mean + step * (part.count / count),
            total.scatter + part.scatter + torch.outer(step, step) * (total.count * part.count / count),
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


def gathered(rows: Tensor) -> Tensor:
    """The rows (N, D) of all ranks, in order of rank; N may differ, also be 0. Every rank must call it."""
    counts = [torch.zeros(1, dtype=torch.int64, device=rows.device) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, torch.tensor([len(rows)], device=rows.device))
    padded = rows.new_zeros(max(int(n) for n in counts), rows.shape[1])
    padded[: len(rows)] = rows
    held = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(held, padded)
    return torch.cat([part[: int(n)] for part, n in zip(held, counts, strict=True)])


def gathered_moments(part: Moments) -> Moments:
    """The moments of all ranks together. Every rank must call it, with at least one row."""
    width = len(part.mean)
    packed = torch.cat([part.mean.new_tensor([part.count]), part.mean, part.scatter.flatten()])[None]
    return merge(
        Moments(int(row[0]), row[1 : width + 1], row[width + 1 :].view(width, width)) for row in gathered(packed)
    )


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
    """Fréchet (and kernel) distance between real and generated videos, with all that makes the value comparable.

    With StyleGAN-V's I3D it is FVD and KVD, with a network of images the distance over single frames.

    Args:
        real, fake: batches (B, 3, T, H, W) in [-1, 1], on the device of the network, all of one T, H and W.
        split, seed: which data the real videos are of, and what the fake ones were drawn with; for the record.
        kernel: also the kernel distance, which keeps all features in memory (4 bytes a number).
        across_ranks: every rank gives its share, at least one clip of each kind, and gets the value over all of them.

    Returns:
        A flat dict for JSON. `warning` is None, or says that there are too few samples for the covariance.

    Raises:
        ValueError: fewer than two samples on a side; clips of unequal shape.
    """
    shape: tuple[int, ...] | None = None
    sides: list[tuple[int, Moments, Tensor]] = []
    for name, batches in (("real", real), ("fake", fake)):
        clips, total, kept = 0, None, []
        for batch in batches:
            shape = shape or tuple(batch.shape[2:])
            if tuple(batch.shape[2:]) != shape:
                raise ValueError(
                    f"{name}: clips of {tuple(batch.shape[2:])} (T, H, W) beside clips of {shape}; make them alike first"
                )
            rows = features(network, batch)
            part = moments(rows)
            total = part if total is None else merge([total, part])
            clips += len(batch)
            if kernel:
                kept.append(rows.cpu() if not across_ranks else rows)
        if total is None:
            raise ValueError(f"{name}: no videos")
        stacked = torch.cat(kept) if kernel else torch.empty(0)
        if across_ranks:
            clips = int(gathered(total.mean.new_tensor([[clips]])).sum())
            total, stacked = gathered_moments(total), gathered(stacked).cpu() if kernel else stacked
        if total.count < 2:
            raise ValueError(f"{name}: {total.count} sample; a distance between distributions needs at least 2")
        sides.append((clips, total, stacked))
    assert shape is not None
    (clips_real, moments_real, rows_real), (clips_fake, moments_fake, rows_fake) = sides
    fewest, width = min(moments_real.count, moments_fake.count), len(moments_real.mean)
    few = f"{fewest} samples for {width} features: the covariance is singular and the value depends on their number"
    return {
        "frechet": frechet_distance(moments_real, moments_fake),
        "kernel": kernel_distance(rows_real, rows_fake) if kernel else None,
        **network.record(),
        "features": width,
        "frames": shape[0],
        "height": shape[1],
        "width": shape[2],
        "videos_real": clips_real,
        "videos_fake": clips_fake,
        "samples_real": moments_real.count,
        "samples_fake": moments_fake.count,
        "split": split,
        "seed": seed,
        "warning": few if fewest <= width else None,
    }


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
