"""Whether content and movement are apart: what of a video made of the one of a and the other of b is like a, what like b.

The probes are independent of the model: colours of all frames for content, block matching (see `motion`) for movement.
Neither is learned, and neither sees what the other measures: colours do not say where things are, and directions do not
say how they look. Where videos have labels, closed-form classifiers of the same numbers name them. The measures are
ours [assumption]; the paper (arXiv 2512.21776, figure 8) shows interpolated movement to look at.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from longtake.training.metrics.motion import dense_flow

_LEVELS = 4  # of each colour
_DIRECTIONS = 8
_LEAST_CHANGE = 0.05  # of a pixel that moves, in [-1, 1]: where nothing does, block matching is off by parts of a pixel


def content(video: Tensor) -> Tensor:
    """The colours of all frames together, `(B, 3, T, H, W)` in [-1, 1] -> `(B, 64)`: roots of their shares (Hellinger)."""
    levels = ((video.float().clamp(-1, 1) + 1) / 2 * _LEVELS).long().clamp_max(_LEVELS - 1)
    codes = (levels[:, 0] * _LEVELS + levels[:, 1]) * _LEVELS + levels[:, 2]
    counts = torch.zeros(len(video), _LEVELS**3, dtype=torch.float64, device=video.device)
    flat = codes.flatten(1)
    counts.scatter_add_(1, flat, torch.ones_like(flat, dtype=torch.float64))
    return (counts / flat.shape[1]).sqrt()


def movement(video: Tensor) -> Tensor:
    """How much moves in which direction, `(B, 3, T, H, W)` -> `(B, 8)`: pixels a frame, summed over those that change, and
    divided by the number of all.

    Directions begin with that of rising x and turn towards rising y, downwards. A direction between two counts for both.
    """
    first, second = (part.transpose(1, 2).flatten(0, 1) for part in (video[:, :, :-1], video[:, :, 1:]))
    flow = dense_flow(first, second).double()
    moved = (second - first).abs().amax(1) > _LEAST_CHANGE
    length = flow.norm(dim=1) * moved
    turn = torch.atan2(flow[:, 1], flow[:, 0]) / (2 * torch.pi) * _DIRECTIONS
    low = turn.floor()
    weights = torch.zeros(len(flow), _DIRECTIONS, dtype=torch.float64, device=video.device)
    for which, share in ((low, 1 - (turn - low)), (low + 1, turn - low)):
        weights.scatter_add_(1, (which.long() % _DIRECTIONS).flatten(1), (length * share).flatten(1))
    return (weights / length[0].numel()).unflatten(0, (len(video), -1)).mean(1)


def nearer(made: Tensor, of: Tensor, other: Tensor) -> Tensor:
    """Whether each row `(N, D)` is nearer to that of the video that it should be like than to the other's; chance is .5.

    Rows that are as far from both count half: `(N,)` float64.
    """
    gap = (made - other).norm(dim=1) - (made - of).norm(dim=1)
    return (gap.sign().double() + 1) / 2


@dataclass(frozen=True)
class Classes:
    """A linear classifier: scores are `(rows - mean) / scale @ weights`, with a class for each column."""

    mean: Tensor
    scale: Tensor
    weights: Tensor

    def __call__(self, rows: Tensor) -> Tensor:
        """The likeliest class of each row `(N, D)`: `(N,)`."""
        return ((rows.double() - self.mean) / self.scale @ self.weights).argmax(1)


def fit_classes(rows: Tensor, labels: Tensor, ridge: float = 1e-2) -> Classes:
    """Ridge regression of centred indicators of the classes on standardised rows; closed form, no seed.

    Args:
        rows: `(N, D)`; labels: `(N,)`, from 0 on.
        ridge: penalty of the squared weights, a share of the number of rows; > 0.

    Raises:
        ValueError: fewer than two classes, or rows that never change.
    """
    rows, targets = rows.double(), torch.nn.functional.one_hot(labels).double()
    if targets.shape[1] < 2:
        raise ValueError("a classifier needs two classes at least")
    if ridge <= 0:
        raise ValueError(f"ridge must be above 0, got {ridge}")
    mean, scale = rows.mean(0), rows.std(0, unbiased=False)
    if not (scale > 0).any():
        raise ValueError("the rows never change: there is nothing to fit a classifier to")
    scale = torch.where(scale > 0, scale, 1)
    scaled = (rows - mean) / scale
    strength = ridge * len(rows) * torch.eye(rows.shape[1]).to(scaled)
    # equal classes whatever their number of rows: each indicator is centred, and so is each score
    weights = torch.linalg.solve(scaled.T @ scaled + strength, scaled.T @ (targets - targets.mean(0)))
    return Classes(mean, scale, weights)


def steady(values: Tensor) -> float:
    """The share of steps of paths `(N, k)` that go the way from the path's first value to its last; chance is .5.

    Raises:
        ValueError: paths of fewer than three values, which always go that way.
    """
    if values.ndim != 2 or values.shape[1] < 3:
        raise ValueError(f"a path has three values at least, got {tuple(values.shape)}")
    values = values.double()
    way = (values[:, -1:] - values[:, :1]).sign()
    return float(((values.diff(dim=1).sign() * way) > 0).double().mean())
