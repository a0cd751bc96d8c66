"""Clips from differences: x_j = x_{j-1} + v_j from a reference at any index, and clips joined at the frame they share."""

from typing import Literal

import torch
from torch import Tensor

Merge = Literal["cut", "fade"]


def clip_of(differences: Tensor, reference: Tensor, index: int = 0) -> Tensor:
    """The clip with these differences of neighbours, forward and backward from its frame `index`.

    x_j = x_{j-1} + v_j after the reference, x_{j-1} = x_j - v_j before it (arXiv 2512.21776, section 3).

    Args:
        differences: v_1 ... v_{T-1}, `(B, T-1, ...)`.
        reference: frame `index`, `(B, ...)`; the clip has exactly it.

    Returns:
        `(B, T, ...)`.
    """
    assert 0 <= index <= differences.shape[1], f"index {index} of {differences.shape[1] + 1} frames"
    change = torch.cat([torch.zeros_like(differences[:, :1]), differences.cumsum(1)], dim=1)
    return reference.unsqueeze(1) + (change - change[:, index : index + 1])


def clip_around(differences: Tensor, reference: Tensor, index: int = 0) -> Tensor:
    """The clip whose frames differ from the reference by these: x_j = x_r + v_j [assumption, for comparison].

    An error stays in its frame, and neighbours need not agree.

    Args:
        differences: v_0 ... v_{T-1}, `(B, T, ...)`; that of the reference itself is left out.
        reference: frame `index`, `(B, ...)`; the clip has exactly it.

    Returns:
        `(B, T, ...)`.
    """
    assert 0 <= index < differences.shape[1], f"index {index} of {differences.shape[1]} frames"
    away = torch.ones(differences.shape[1], dtype=differences.dtype, device=differences.device)
    away[index] = 0
    return reference.unsqueeze(1) + away.reshape(-1, *[1] * (differences.dim() - 2)) * differences


def merged(first: Tensor, second: Tensor, overlap: int, reference: int, how: Merge = "cut") -> Tensor:
    """Two clips as one of T + T' - overlap frames.

    Args:
        first: `(B, T, ...)`.
        second: `(B, T', ...)`, whose first `overlap` frames are at the same time as the last of `first`.
        reference: frame of `first`, in the overlap, that both have.
        how: cut: the first clip up to the reference, then the second; fade: one becomes the other over the overlap,
            linearly, none of its frames being that of one clip alone.
    """
    start = first.shape[1] - overlap
    assert 0 < overlap <= second.shape[1] and start <= reference < first.shape[1]
    if how == "cut":
        return torch.cat([first[:, : reference + 1], second[:, reference + 1 - start :]], dim=1)
    share = torch.arange(1, overlap + 1, dtype=first.dtype, device=first.device) / (overlap + 1)
    between = torch.lerp(first[:, start:], second[:, :overlap], share.reshape(-1, *[1] * (first.dim() - 2)))
    return torch.cat([first[:, :start], between, second[:, overlap:]], dim=1)
