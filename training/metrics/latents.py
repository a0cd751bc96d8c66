"""What the latents of videos are like over time: temporal distance (LTD), pictures of principal components, paths."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.metrics.distance import Moments

PICTURE_SPAN = 2.0  # standard deviations from the mean to black or white; ours


def latent_temporal_distance(batches: Iterable[Tensor]) -> dict[str, Any]:
    """LTD: the mean distance of latents that are D apart in time, for each D (PV-VAE, arXiv 2605.02134, analysis).

    The better latents follow time, the steadier the curve rises. The paper gives no formula; our assumption [A]: the
    L2 norm over all channels and positions of a latent, the mean over all pairs and all videos. `normalised`
    is divided by the mean L2 norm of a latent [A], so that latents of any scale and size compare.

    Args:
        batches: latents (B, C, T, h, w), T >= 2, of one T.

    Returns:
        For JSON: `raw` and `normalised`, the curves for D = 1..T-1; `norm`; `rising`, the share of D -> D+1
        on which the curve rises (1 where T is 2); `spearman`, the rank correlation of D and the curve, ties at their
        mean rank, 0 for a flat curve; `curve_roughness`, mean |second difference| of the curve over its mean
        |first difference|, 0 for a line; `path_roughness`, the mean norm of the latents' second differences in time
        over that of their first ones, 0 for steady motion and about sqrt(2) for independent latents; `videos`.

    Raises:
        ValueError: no videos, unequal T, fewer than two latents.
    """
    rows: list[Tensor] = []
    for batch in batches:
        if rows and rows[0].shape[1] != batch.shape[2] + 1:
            raise ValueError(f"LTD needs latents of one T, {rows[0].shape[1] - 1}, got {tuple(batch.shape)}")
        rows.append(distances(batch))
    if not rows:
        raise ValueError("LTD needs at least one video")
    return temporal_distance(torch.cat(rows))


def distances(latents: Tensor) -> Tensor:
    """What LTD needs of each video (B, C, T, h, w), T >= 2: (B, T + 1) float64, on the CPU.

    The mean distances of latents 1..T-1 apart, the mean norm of a latent, and that of the second differences in time.
    """
    if latents.ndim != 5 or latents.shape[2] < 2:
        raise ValueError(f"LTD needs latents (B, C, T, h, w) with T at least 2, got {tuple(latents.shape)}")
    z = latents.double().transpose(1, 2).flatten(2).cpu()  # B T D
    apart = [(z[:, gap:] - z[:, :-gap]).norm(dim=2).mean(1) for gap in range(1, z.shape[1])]
    bends = z.diff(n=2, dim=1).norm(dim=2).mean(1) if z.shape[1] > 2 else z.new_zeros(len(z))
    return torch.stack([*apart, z.norm(dim=2).mean(1), bends], dim=1)


def temporal_distance(rows: Tensor) -> dict[str, Any]:
    """`latent_temporal_distance` of the `distances` (V, T + 1) of V videos."""
    *apart, norm, bends = rows.mean(0)
    raw = torch.stack(apart)
    return {
        "raw": raw.tolist(),
        "normalised": (raw / norm.clamp_min(1e-12)).tolist(),
        "norm": float(norm),
        "rising": float((raw.diff() > 0).double().mean()) if len(raw) > 1 else 1.0,
        "spearman": spearman(torch.arange(len(raw)), raw),
        "curve_roughness": _ratio(raw.diff(n=2).abs(), raw.diff().abs()),
        "path_roughness": float(bends / raw[0].clamp_min(1e-12)),
        "videos": len(rows),
    }


def spearman(x: Tensor, y: Tensor) -> float:
    """Rank correlation of two vectors, ties at their mean rank; 0 where either is constant.

    Our own, since scipy.stats.spearmanr has other last bits, and warns of a constant vector and refuses a single number.
    """
    ranks = [(v[:, None] > v).double().sum(1) + (v[:, None] == v).double().sum(1) / 2 for v in (x, y)]
    a, b = (r - r.mean() for r in ranks)
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if scale > 0 else 0.0


@dataclass(frozen=True)
class Components:
    """Principal directions (C, k) of vectors (C,), strongest first, with their mean (C,) and standard deviations (k,)."""

    mean: Tensor
    directions: Tensor
    deviations: Tensor

    def project(self, rows: Tensor) -> Tensor:
        """(..., C) -> (..., k), float64."""
        return (rows.double().cpu() - self.mean) @ self.directions


def components(total: Moments, count: int) -> Components:
    """The `count` strongest principal components. The largest entry of each direction is positive, so signs are fixed."""
    if count > len(total.mean):
        raise ValueError(f"{count} components of vectors with {len(total.mean)} entries")
    values, vectors = torch.linalg.eigh(total.covariance().cpu())
    directions = vectors.flip(1)[:, :count]
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    return Components(total.mean.cpu(), directions * largest.sign(), values.flip(0)[:count].clamp_min(0).sqrt())


def pca_pictures(latents: Tensor, pca: Components) -> Tensor:
    """Latents (B, C, T, h, w) as colours: three components -> uint8 (B, T, h, w, 3).

    A component at its mean is mid-grey; PICTURE_SPAN standard deviations reach black and white. A component of no
    variance stays grey.
    """
    if pca.directions.shape[1] != 3:
        raise ValueError(f"pictures need 3 components, got {pca.directions.shape[1]}")
    scores = pca.project(latents.detach().movedim(1, -1))
    reach = PICTURE_SPAN * pca.deviations
    share = torch.where(reach > 1e-12, scores / reach.clamp_min(1e-12), 0)
    return (127.5 + 127.5 * share).round().clamp(0, 255).to(torch.uint8)


def draw_trajectories(paths: Tensor, file: Path | str) -> None:
    """A PNG of the paths (V, T, 2), a line a video, a dot at each latent, a ring at its first; UserError without matplotlib."""
    try:
        from matplotlib import colormaps
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError('drawing needs matplotlib: pip install "longtake[training]"') from error
    figure = Figure(figsize=(6, 6), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for index, path in enumerate(paths.tolist()):
        x, y = zip(*path, strict=True)
        colour = colormaps["viridis"](index / max(1, len(paths) - 1))
        axes.plot(x, y, marker=".", linewidth=1, markersize=4, color=colour)
        axes.plot(x[:1], y[:1], marker="o", markersize=8, fillstyle="none", color=colour)
    axes.set_xlabel("first component")
    axes.set_ylabel("second component")
    figure.savefig(file, metadata={"Software": None})


def _ratio(above: Tensor, below: Tensor) -> float:
    """Mean over mean; 0 where there is nothing above."""
    return float(above.mean() / below.mean().clamp_min(1e-12)) if above.numel() else 0.0
