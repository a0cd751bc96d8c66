"""How well a video autoencoder reconstructs and predicts clips that it has not learned from, with pictures to look at."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets import clip
from longtake.datasets.loader import Loader, to_model, to_pixels
from longtake.training.metrics import look, probes
from longtake.training.metrics.distance import Sample, heldout_distance
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual, lpips
from longtake.training.metrics.reconstruction import psnr, ssim
from longtake.training.metrics.share import batches, mine, place, united
from longtake.training.metrics.trivial import Against, comparisons, mean_colour, scaled_down
from longtake.training.models.common.codec import frames_of, latent_groups, reconstruct_video
from longtake.training.models.pv_vae.model import PVVAE

Frames = Callable[[], Iterator[np.ndarray[Any, Any]]]  # of a clip, (H, W, 3) uint8, from its start at each call

_PANELS = ("source", "seen by the encoder", "predicted", "reconstructed, all seen")
_SHOWN = 12
_AGAINST = (
    Against("prediction of hidden frames", "psnr_predicted", "copying the last visible frame", "psnr_copy_last"),
    Against("prediction of hidden frames", "psnr_predicted", "the mean of the visible frames", "psnr_mean_visible"),
    Against("reconstruction", "psnr_all", "the clip's mean colour", "psnr_mean_colour"),
    Against("reconstruction", "psnr_all", "the clip scaled down to as many numbers", "psnr_scaled_down"),
    *probes.AGAINST,
)


@torch.inference_mode()
def evaluate(
    model: PVVAE,
    loader: Loader,
    folder: Path,
    seed: int,
    most: int,
    perceptual: Perceptual | None = None,
    *,
    network: FeatureNetwork | None = None,
    latents: bool = False,
    whole: Sequence[Frames] = (),
    probed: Loader | None = None,
    probe_clips: int = 0,
) -> dict[str, Any]:
    """PSNR, SSIM and LPIPS on the first `most` clips of a loader, and pictures of some as `heldout.json` and KEY.mp4 in `folder`.

    The encoder sees the first half of the latent groups. Predicted frames stand beside the last visible frame, repeated,
    and the mean of the visible ones; `psnr_all`, `ssim_all` and `lpips_all`, of a reconstruction with every frame visible,
    beside the clip's mean colour and the clip scaled down to as many numbers as its latent has. LPIPS only with a
    perceptual network, whose record goes into the summary. Every rank of the process group, where there is one, calls it
    with the same loader and measures its share.

    Args:
        loader: a clip a batch.
        network: for `reconstruction_frechet` and `reconstruction_kernel`, the distances of the full reconstructions to
            their sources (with I3D rFVD and rKVD).
        latents: also look at them, see `look.looked_at`.
        whole: clips longer than the loader's, for `by_position`.
        probed: of training clips, to whose latents linear probes are fitted, at most `probe_clips`; they are scored on
            as many held-out ones.

    Raises:
        UserError: the network does not take such videos, or there are too few.
        ValueError: nothing to probe.
    """
    at = next(model.parameters()).device
    count = min(most, loader.samples)
    rows: dict[int, dict[str, Any]] = {}
    held, sources, copies = look.Latents(), *(Sample(n, network) if network else None for n in ("sources", "copies"))
    for number, batch in batches(loader, count, "evaluate"):
        video = to_model(batch["video"].to(at))
        latent = model.encode(video).mode()
        found, full, half = compared(model, video, latent)
        seen = int(found.pop("frames_visible"))
        row = {"key": batch["key"][0], "frames": video.shape[2], "frames_visible": seen, **found}
        row |= _trivial(model, video, seen)
        if perceptual:
            row["lpips_all"] = lpips(perceptual, full, video).item()
        if latents:
            held.add(number, latent, partial(torch.clone, video))
        if sources and copies:
            sources.add(video)
            copies.add(full)
        if number < _SHOWN:
            masked = video.clone()
            masked[:, :, seen:] = 0
            row["file"] = f"{row['key']}.mp4"
            _write_panels(folder / row["file"], [video, masked, half, full])
        rows[number] = row
    each = list(united(rows).values())
    measured = [name for name in each[0] if name.startswith(("psnr", "ssim", "lpips"))]
    summary: dict[str, Any] = {name: float(np.mean([row[name] for row in each])) for name in measured}
    summary |= {"clips": len(each), "frames": each[0]["frames"], "frames_visible": each[0]["frames_visible"]}
    summary |= {"split": "val", "seed": seed, "perceptual": perceptual.record() if perceptual else None, "series": {}}
    if sources and copies:
        apart = heldout_distance(sources.of_all_ranks(), copies.of_all_ranks(), seed)
        summary |= {f"reconstruction_{name}": apart[name] for name in ("frechet", "kernel")} | {"distance": apart}
    if latents:
        summary["latents"] = look.looked_at({"heldout": held}, folder)
        summary |= look.figures(summary["latents"])
        summary["series"] |= look.series(summary["latents"])
    if whole:
        found, series = by_position(model, whole, summary["frames"])
        summary |= found
        summary["series"] |= series
    if probed:
        pairs = (_latents(model, some, min(probe_clips, some.samples)) for some in (probed, loader))
        summary |= {f"probe_{name}": value for name, value in probes.scores(*pairs).items()}
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        record = {"panels": _PANELS, "summary": summary, "clips": [row for row in each if "file" in row]}
        (folder / "heldout.json").write_text(json.dumps(record, indent=2))
    return summary


def compared(model: PVVAE, video: Tensor, latent: Tensor | None = None) -> tuple[dict[str, float], Tensor, Tensor]:
    """A clip `(1, 3, T, H, W)` in [-1, 1] against what is made of it with every frame visible, and with the first half.

    Args:
        latent: of all of it, where it is known.

    Returns:
        `frames_visible` of the half, `psnr_all`, `ssim_all`, `psnr_visible` and, where frames are left to predict,
        `psnr_predicted`; both reconstructions, fp32.

    Raises:
        ValueError: the model cannot divide the clip.
    """
    stride = model.config.temporal_stride
    seen = frames_of((latent_groups(video.shape[2], stride) + 1) // 2, stride)
    latent = model.encode(video).mode() if latent is None else latent
    full, half = model.decode(latent).float().clamp(-1, 1), model.reconstruct(video, seen).float()
    found = {
        "frames_visible": float(seen),
        "psnr_all": psnr(full, video).item(),
        "ssim_all": ssim(full, video).item(),
        "psnr_visible": psnr(half[:, :, :seen], video[:, :, :seen]).item(),
    }
    if seen < video.shape[2]:
        found["psnr_predicted"] = psnr(half[:, :, seen:], video[:, :, seen:]).item()
    return found, full, half


def _trivial(model: PVVAE, video: Tensor, seen: int) -> dict[str, float]:
    """What `compared` gives for predictions that take no training."""
    found = {
        "psnr_mean_colour": psnr(mean_colour(video), video).item(),
        "psnr_scaled_down": psnr(scaled_down(video, model.config), video).item(),
    }
    visible, hidden = video[:, :, :seen], video[:, :, seen:]
    if hidden.shape[2]:
        found["psnr_copy_last"] = psnr(visible[:, :, -1:].expand_as(hidden), hidden).item()
        found["psnr_mean_visible"] = psnr(visible.mean(2, keepdim=True).expand_as(hidden), hidden).item()
    return found


def by_position(model: PVVAE, clips: Sequence[Frames], window: int) -> tuple[dict[str, float], dict[str, look.Points]]:
    """PSNR of clips of any length, reconstructed in one stream, by latent step; and of the same in pieces of `window` frames.

    A clip that is encoded whole, as `cache_latents` does, has latents with more before them than any in training: where
    the curve falls below that of the pieces, long clips suffer. Memory does not grow with a clip's length. Every rank
    calls it with the same clips and takes its share.

    Returns:
        Figures `psnr_long` and `psnr_long_pieces`, the means over what lies beyond the first window, `long_clips` and
        `long_frames`, the longest one's; nothing where no clip is longer than a window. And by step, of the clips that
        reach so far, `psnr_by_step`, `psnr_by_step_pieces` and `clips_by_step`.
    """
    rows = dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]()
    for number in mine(len(clips), "evaluate whole", "clip"):
        frames, pieces = clips[number](), list[np.ndarray[Any, Any]]()
        while some := list(islice(frames, window)):
            pieces.append(_errors(model, some))
        rows[number] = _errors(model, clips[number]()), np.concatenate(pieces)
    each = [row for row in united(rows).values() if len(row[0]) > window]
    if not each:
        return {}, {}
    stride = model.config.temporal_stride
    by_step = [[_by_step(errors, stride) for errors in row] for row in each]
    counts = [float(sum(len(row[0]) > step for row in by_step)) for step in range(max(len(row[0]) for row in by_step))]
    curves = [
        [float(np.mean([row[kind][step] for row in by_step if len(row[0]) > step])) for step in range(len(counts))]
        for kind in (0, 1)
    ]
    beyond = [float(np.mean([_decibels(row[kind][window:].mean()) for row in each])) for kind in (0, 1)]
    found = {"psnr_long": beyond[0], "psnr_long_pieces": beyond[1]}
    found |= {"long_clips": float(len(each)), "long_frames": float(max(len(row[0]) for row in each))}
    names = ("psnr_by_step", "psnr_by_step_pieces", "clips_by_step")
    return found, {name: list(enumerate(curve)) for name, curve in zip(names, [*curves, counts], strict=True)}


def _errors(model: PVVAE, frames: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The mean squared error (T,) of each frame, in units of the whole range."""
    pairs = reconstruct_video(model, frames)
    return np.concatenate([np.square((a - b.astype(np.float32)) / 255).mean((1, 2, 3)) for a, b in pairs])


def _by_step(errors: np.ndarray[Any, Any], stride: int) -> list[float]:
    """Frame by frame to PSNR by latent step, the first of which is one frame."""
    return [_decibels(errors[:1].mean())] + [
        _decibels(errors[n : n + stride].mean()) for n in range(1, len(errors), stride)
    ]


def _decibels(error: float) -> float:
    return float(-10 * np.log10(max(error, 1e-10)))


def _latents(model: PVVAE, loader: Loader, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's latents and videos of the first `count` clips."""
    for _, batch in batches(loader, count, "probe"):
        video = to_model(batch["video"].to(next(model.parameters()).device))
        yield model.encode(video).mode().float(), video


def _write_panels(path: Path, panels: list[Tensor], scale: int = 3) -> None:
    """One video of panels side by side, each (1, 3, T, H, W) in [-1, 1], enlarged without smoothing."""
    wide = torch.cat(panels, dim=4)[0].permute(1, 2, 3, 0)
    pixels = to_pixels(wide).repeat_interleave(scale, 1).repeat_interleave(scale, 2)
    clip.write(path, pixels.cpu().numpy(), fps=6)
