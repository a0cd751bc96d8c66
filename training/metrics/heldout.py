"""How well a video autoencoder reconstructs and predicts clips that it has not learned from, with pictures to look at."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from longtake.datasets import clip
from longtake.datasets.loader import Loader, to_model, to_pixels
from longtake.training.metrics.perceptual import Perceptual, lpips
from longtake.training.metrics.reconstruction import psnr, ssim
from longtake.training.models.pv_vae import PVVAE, frames_of, latent_groups

_PANELS = ("source", "seen by the encoder", "predicted", "reconstructed, all seen")
_SHOWN = 12


@torch.inference_mode()
def evaluate(
    model: PVVAE, loader: Loader, folder: Path, seed: int, most: int, perceptual: Perceptual | None = None
) -> dict[str, Any]:
    """PSNR, SSIM and LPIPS on the first `most` clips of a loader, and pictures of some as `heldout.json` and KEY.mp4 in `folder`.

    The encoder sees the first half of the latent groups. Predicted frames are compared with the last visible frame,
    repeated; `psnr_all`, `ssim_all` and `lpips_all` are of a reconstruction with every frame visible. LPIPS only with a
    network, whose record goes into the summary.
    """
    at = next(model.parameters()).device
    rows: list[dict[str, Any]] = []
    frames = seen = 0
    count = min(most, loader.samples)
    for batch in tqdm(islice(loader, count), "evaluate", count, unit="clip"):
        video = to_model(batch["video"].to(at))
        frames = video.shape[2]
        found, full, half = compared(model, video)
        seen = int(found.pop("frames_visible"))
        row: dict[str, Any] = {"key": batch["key"][0], "frames_visible": seen, **found}
        if perceptual:
            row["lpips_all"] = lpips(perceptual, full, video).item()
        if seen < frames:
            copied = video[:, :, seen - 1 : seen].expand_as(video)
            row["psnr_copy_last"] = psnr(copied[:, :, seen:], video[:, :, seen:]).item()
        if len(rows) < _SHOWN:
            masked = torch.where(
                torch.arange(frames, device=at).view(1, 1, -1, 1, 1) < seen, video, torch.zeros_like(video)
            )
            row["file"] = f"{row['key']}.mp4"
            _write_panels(folder / row["file"], [video, masked, half, full])
        rows.append(row)
    measured = [name for name in rows[0] if name.startswith(("psnr", "ssim", "lpips"))]
    summary: dict[str, Any] = {name: float(np.mean([row[name] for row in rows])) for name in measured}
    summary |= {"clips": len(rows), "frames": frames, "frames_visible": seen, "split": "val", "seed": seed}
    summary |= {"perceptual": perceptual.record() if perceptual else None}
    shown = [row for row in rows if "file" in row]
    (folder / "heldout.json").write_text(json.dumps({"panels": _PANELS, "summary": summary, "clips": shown}, indent=2))
    return summary


def compared(model: PVVAE, video: Tensor) -> tuple[dict[str, float], Tensor, Tensor]:
    """A clip `(1, 3, T, H, W)` in [-1, 1] against what is made of it with every frame visible, and with the first half.

    Returns:
        `frames_visible` of the half, `psnr_all`, `ssim_all`, `psnr_visible` and, where frames are left to predict,
        `psnr_predicted`; both reconstructions, fp32.

    Raises:
        ValueError: the model cannot divide the clip.
    """
    stride = model.config.temporal_stride
    seen = frames_of((latent_groups(video.shape[2], stride) + 1) // 2, stride)
    full, half = model.reconstruct(video).float(), model.reconstruct(video, seen).float()
    found = {
        "frames_visible": float(seen),
        "psnr_all": psnr(full, video).item(),
        "ssim_all": ssim(full, video).item(),
        "psnr_visible": psnr(half[:, :, :seen], video[:, :, :seen]).item(),
    }
    if seen < video.shape[2]:
        found["psnr_predicted"] = psnr(half[:, :, seen:], video[:, :, seen:]).item()
    return found, full, half


def _write_panels(path: Path, panels: list[Tensor], scale: int = 3) -> None:
    """One video of panels side by side, each (1, 3, T, H, W) in [-1, 1], enlarged without smoothing."""
    wide = torch.cat(panels, dim=4)[0].permute(1, 2, 3, 0)
    pixels = to_pixels(wide).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    clip.write(path, pixels.cpu().numpy(), fps=6)
