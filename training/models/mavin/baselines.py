"""Gaps filled without a model, of frames or of latents: hold and cut, and a linear way from one side to the other.

Sides and gaps are `(B, C, T, H, W)`. Of frames `faded` is a cross-fade of the last and the first frame; of latents it is
latent interpolation, to be decoded as a gap is.
"""

import torch
from torch import Tensor


def held(before: Tensor, after: Tensor, length: int) -> Tensor:
    """The first half shows what is before the gap, the second what is after it, with a cut between; an odd one cuts later."""
    first = (length + 1) // 2
    parts = [before[:, :, -1:].expand(-1, -1, first, -1, -1), after[:, :, :1].expand(-1, -1, length - first, -1, -1)]
    return torch.cat(parts, dim=2)


def faded(before: Tensor, after: Tensor, length: int) -> Tensor:
    """A linear way from the last of `before` to the first of `after`, both of which are beside it and not in it."""
    share = (torch.arange(1, length + 1) / (length + 1)).to(before)[:, None, None]
    return torch.lerp(before[:, :, -1:], after[:, :, :1], share)
