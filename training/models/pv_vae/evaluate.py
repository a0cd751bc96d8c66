"""How well a video autoencoder reconstructs and predicts held-out clips, in figures and in videos to look at."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import Loader, to_model
from longtake.training.metrics import look, probes
from longtake.training.metrics.distance import Sample, heldout_distance
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual, lpips
from longtake.training.metrics.reconstruction import psnr
from longtake.training.metrics.share import batches, mine, place, united
from longtake.training.metrics.trivial import Against, comparisons, mean_colour, scaled_down
from longtake.training.models.common.autoencoder import VideoAutoencoder
from longtake.training.models.common.codec import reconstruct_video
from longtake.training.models.common.draws import rng_of
from longtake.training.models.common.reconstruction import compared
from longtake.training.models.common.video import write_panels

Frames = Callable[
    [], Iterator[np.ndarray[Any, Any]]
]  # each call yields the frames (H, W, 3) uint8 of a clip from its start

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
    model: VideoAutoencoder,
    loader: Loader,
    folder: Path,
    seed: int,
    most: int,
    perceptual: Perceptual | None = None,
    *,
    network: FeatureNetwork | None = None,
    latents: bool = False,
    long_clips: Sequence[Frames] = (),
    probed: Loader | None = None,
    probe_clips: int = 0,
) -> dict[str, Any]:
    """Measure PSNR, SSIM and LPIPS on the first `most` clips of a loader; writes `heldout.json` and some KEY.mp4 to `folder`.

    For predictions the encoder sees the first half of the latent groups, or all where the model does not predict. They are
    compared with repeating the last visible frame and with the mean of the visible frames. `psnr_all`, `ssim_all` and
    `lpips_all` are those of a reconstruction with every frame visible. It is compared with the clip's mean colour and with
    the clip scaled down to as many numbers as its latent has. LPIPS needs a perceptual network, whose record goes into the
    summary. Every rank of the process group calls it with the same loader and measures its share.

    Args:
        loader: batches of one clip.
        network: for `reconstruction_frechet` and `reconstruction_kernel`, the distances of the full reconstructions to
            their sources (with I3D rFVD and rKVD).
        latents: also examine the latents (`look.looked_at`).
        long_clips: clips longer than the loader's, for `by_position`.
        probed: training clips, to whose latents linear probes are fitted; at most `probe_clips`, and as many held-out
            clips to score them.

    Raises:
        UserError: the network does not take such videos, or there are too few.
        ValueError: nothing to probe.
    """
    device = next(model.parameters()).device
    count = min(most, loader.samples)
    rows, heldout_latents = dict[int, dict[str, Any]](), look.Latents()
    sources, copies = (Sample(n, network) if network else None for n in ("sources", "copies"))
    for number, batch in batches(loader, count, "evaluate"):
        video = to_model(batch["video"].to(device))
        latent = model.encode(video).mode()
        figures, full, half = compared(model, video, latent, rng_of(seed, number))
        visible = int(figures.pop("frames_visible"))
        row = {"key": batch["key"][0], "frames": video.shape[2], "frames_visible": visible, **figures}
        row |= _trivial_figures(model, video, visible)
        if perceptual:
            row["lpips_all"] = lpips(perceptual, full, video).item()
        if latents:
            heldout_latents.add(number, latent, partial(torch.clone, video))
        if sources and copies:
            sources.add(video)
            copies.add(full)
        if number < _SHOWN:
            masked = video.clone()
            masked[:, :, visible:] = 0
            row["file"] = f"{row['key']}.mp4"
            write_panels(folder / row["file"], [video, masked, half, full])
        rows[number] = row

    # figures over all ranks
    entries = list(united(rows).values())
    names = [name for name in entries[0] if name.startswith(("psnr", "ssim", "lpips"))]
    summary: dict[str, Any] = {name: float(np.mean([row[name] for row in entries])) for name in names}
    summary |= {"clips": len(entries), "frames": entries[0]["frames"], "frames_visible": entries[0]["frames_visible"]}
    summary |= {"split": "val", "seed": seed, "perceptual": perceptual.record() if perceptual else None, "series": {}}
    if sources and copies:
        distance = heldout_distance(sources.of_all_ranks(), copies.of_all_ranks(), seed)
        summary |= {f"reconstruction_{name}": distance[name] for name in ("frechet", "kernel")} | {"distance": distance}
    if latents:
        summary["latents"] = look.looked_at({"heldout": heldout_latents}, folder)
        summary |= look.figures(summary["latents"])
        summary["series"] |= look.series(summary["latents"])
    if long_clips:
        figures, series = by_position(model, long_clips, summary["frames"])
        summary |= figures
        summary["series"] |= series
    if probed:
        pairs = (_latents(model, clips, min(probe_clips, clips.samples)) for clips in (probed, loader))
        summary |= {f"probe_{name}": value for name, value in probes.scores(*pairs).items()}
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        record = {"panels": _PANELS, "summary": summary, "clips": [row for row in entries if "file" in row]}
        (folder / "heldout.json").write_text(json.dumps(record, indent=2))
    return summary


def _trivial_figures(model: VideoAutoencoder, video: Tensor, frames_visible: int) -> dict[str, float]:
    """The PSNR of reconstructions and predictions that need no training."""
    figures = {
        "psnr_mean_colour": psnr(mean_colour(video), video).item(),
        "psnr_scaled_down": psnr(scaled_down(video, model.config), video).item(),
    }
    visible, hidden = video[:, :, :frames_visible], video[:, :, frames_visible:]
    if hidden.shape[2]:
        figures["psnr_copy_last"] = psnr(visible[:, :, -1:].expand_as(hidden), hidden).item()
        figures["psnr_mean_visible"] = psnr(visible.mean(2, keepdim=True).expand_as(hidden), hidden).item()
    return figures


def by_position(
    model: VideoAutoencoder, clips: Sequence[Frames], window: int
) -> tuple[dict[str, float], dict[str, look.Points]]:
    """PSNR by latent of clips of any length, reconstructed in one stream and in pieces of `window` frames.

    In a clip that is encoded whole, as `cache_latents` does, latents have a longer past than in training: where the curve
    falls below that of the pieces, long clips suffer. Memory does not grow with a clip's length. Every rank calls it with
    the same clips and takes its share.

    Returns:
        Figures `psnr_long` and `psnr_long_pieces`, the means over frames beyond the first window, `long_clips`, and
        `long_frames` of the longest clip; empty if no clip is longer than a window. Then the series `psnr_by_step`,
        `psnr_by_step_pieces` and `clips_by_step` (a step is a latent), over the clips that are long enough.
    """
    rows = dict[int, tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]]()
    for number in mine(len(clips), "evaluate whole", "clip"):
        frames, pieces = clips[number](), list[np.ndarray[Any, Any]]()
        while piece := list(islice(frames, window)):
            pieces.append(_errors(model, piece))
        rows[number] = _errors(model, clips[number]()), np.concatenate(pieces)
    long = [row for row in united(rows).values() if len(row[0]) > window]
    if not long:
        return {}, {}

    # column 0 is a clip in one stream, column 1 in pieces
    beyond = [float(np.mean([_decibels(row[column][window:].mean()) for row in long])) for column in (0, 1)]
    figures = {"psnr_long": beyond[0], "psnr_long_pieces": beyond[1]}
    figures |= {"long_clips": float(len(long)), "long_frames": float(max(len(row[0]) for row in long))}

    by_latent = [[_psnr_by_latent(errors, model.config.temporal_stride) for errors in row] for row in long]
    counts = [float(sum(len(row[0]) > n for row in by_latent)) for n in range(max(len(row[0]) for row in by_latent))]
    curves = [
        [float(np.mean([row[column][n] for row in by_latent if len(row[0]) > n])) for n in range(len(counts))]
        for column in (0, 1)
    ]
    names = ("psnr_by_step", "psnr_by_step_pieces", "clips_by_step")
    return figures, {name: list(enumerate(curve)) for name, curve in zip(names, [*curves, counts], strict=True)}


def _errors(model: VideoAutoencoder, frames: Iterable[np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    """The mean squared error of each frame, (T,), for pixels in 0..1."""
    pairs = reconstruct_video(model, frames)
    return np.concatenate([np.square((a - b.astype(np.float32)) / 255).mean((1, 2, 3)) for a, b in pairs])


def _psnr_by_latent(errors: np.ndarray[Any, Any], stride: int) -> list[float]:
    """The PSNR of each latent's frames from the errors of frames; the first latent stands for one frame."""
    return [_decibels(errors[:1].mean())] + [
        _decibels(errors[n : n + stride].mean()) for n in range(1, len(errors), stride)
    ]


def _decibels(error: float) -> float:
    return float(-10 * np.log10(max(error, 1e-10)))


def _latents(model: VideoAutoencoder, loader: Loader, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's latents and videos of the first `count` clips."""
    for _, batch in batches(loader, count, "probe"):
        video = to_model(batch["video"].to(next(model.parameters()).device))
        yield model.encode(video).mode().float(), video
