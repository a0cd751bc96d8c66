"""How close a reconstruction is to its source, pixel by pixel. LPIPS is in perceptual.py."""

from typing import cast

import torch
from torch import Tensor

from longtake.datasets.errors import UserError

SSIM_SIGMA = 1.5  # of the Gaussian window in pixels, cut off at 5 pixels: 11x11
SSIM_REACH = 5


def psnr(output: Tensor, source: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each clip, over all of its pixels.

    Args:
        output, source: (B, C, T, H, W) in [-1, 1].

    Returns:
        (B,) fp32; equal clips give 100.
    """
    error = (output.float() - source.float()).div(2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp_min(1e-10))


def psnr_by_frame(output: Tensor, source: Tensor) -> Tensor:
    """The same of each frame: `(B, C, T, H, W)` in [-1, 1] each -> `(B, T)` fp32."""
    return psnr(*(video.transpose(1, 2).flatten(0, 1) for video in (output, source))).view(output.shape[0], -1)


def ssim(output: Tensor, source: Tensor) -> Tensor:
    """Structural similarity of each clip, (B,) fp32: the mean of `ssim_by_frame`, which says the rest."""
    return ssim_by_frame(output, source).mean(1)


def ssim_by_frame(output: Tensor, source: Tensor) -> Tensor:
    """Structural similarity of each frame (Wang et al., IEEE TIP 2004, eq. 13).

    torchmetrics computes it: Gaussian window of 11x11 with sigma 1.5, k1 0.01, k2 0.03, each colour channel by itself,
    borders reflected and counted. It is of pixels in 0..1: of signed ones a wrong sign of the means and another one of the
    structure would make a right one.

    Args:
        output, source: (B, C, T, H, W) in [-1, 1], values outside of which are clamped; H and W above 5.

    Returns:
        (B, T) fp32; equal frames give 1.

    Raises:
        ValueError: shapes that differ or are too small.
    """
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise UserError('SSIM needs torchmetrics: pip install "longtake[training]"') from error
    if output.shape != source.shape or output.ndim != 5 or min(output.shape[-2:]) <= SSIM_REACH:
        raise ValueError(
            f"SSIM needs two (B, C, T, H, W) of one shape with sides above {SSIM_REACH}, got {tuple(output.shape)} and"
            f" {tuple(source.shape)}"
        )
    first, second = ((video.float().clamp(-1, 1).transpose(1, 2).flatten(0, 1) + 1) / 2 for video in (output, source))
    each = structural_similarity_index_measure(first, second, sigma=SSIM_SIGMA, data_range=1.0, reduction="none")
    return cast(Tensor, each).view(output.shape[0], -1)
