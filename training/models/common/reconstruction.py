"""How a video autoencoder is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.metrics.reconstruction import psnr, ssim
from longtake.training.models.common.autoencoder import VideoAutoencoder
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.draws import rng_of
from longtake.training.models.kind import Judge, Judged
from longtake.training.registry.gate import Better, Window

_BETTER: dict[str, Better] = {
    "psnr_all": "higher",
    "ssim_all": "higher",
    "psnr_visible": "higher",
    "psnr_predicted": "higher",
}


def judge(facts: Mapping[str, Any]) -> Judge:
    """The same for every autoencoder; `psnr_predicted` only of one that predicts, for windows of more than one frame."""
    return Judge(_BETTER, frozenset({"stride", "size"}), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    return {"columns": {"video": "video"}, "stride": window.stride, "size": window.size or (64, 64)}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    figures, _, _ = compared(judged.model, to_model(batch["video"]), rng=rng_of(seed))
    return {name: value for name, value in figures.items() if name in _BETTER}


def compared(
    model: VideoAutoencoder, video: Tensor, latent: Tensor | None = None, rng: torch.Generator | None = None
) -> tuple[dict[str, float], Tensor, Tensor]:
    """Compare a clip `(1, 3, T, H, W)` in [-1, 1] with its reconstructions from every frame and from those to predict from.

    Args:
        latent: of the whole clip; None encodes it.
        rng: of the noise that some models predict from; None is torch's own.

    Returns:
        `frames_visible` (see `VideoAutoencoder.shown_frames`), `psnr_all`, `ssim_all`, `psnr_visible` and, if there are
        hidden frames, `psnr_predicted`; then both reconstructions, fp32.

    Raises:
        ValueError: the model cannot divide the clip.
    """
    visible = model.shown_frames(video.shape[2])
    latent = model.encode(video).mode() if latent is None else latent
    full = model.decode(latent).float().clamp(-1, 1)
    half = full if visible == video.shape[2] else model.reconstruct(video, visible, rng).float()
    figures = {
        "frames_visible": float(visible),
        "psnr_all": psnr(full, video).item(),
        "ssim_all": ssim(full, video).item(),
        "psnr_visible": psnr(half[:, :, :visible], video[:, :, :visible]).item(),
    }
    if visible < video.shape[2]:
        figures["psnr_predicted"] = psnr(half[:, :, visible:], video[:, :, visible:]).item()
    return figures, full, half
