"""How close a reconstruction is to its source."""

import torch
from torch import Tensor


def psnr(made: Tensor, source: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip, over all of its pixels.

    Args:
        made, source: (B, C, T, H, W) in [-1, 1].

    Returns:
        (B,) fp32; equal clips give 100.
    """
    error = (made.float() - source.float()).div(2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))
