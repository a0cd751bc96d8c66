"""How well a VQGAN reconstructs held-out clips, how it uses its codes, and whether tokens move with their video."""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import Loader, to_model
from longtake.training.metrics import equivariance, look, probes
from longtake.training.metrics.distance import Sample, heldout_distance
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.perceptual import Perceptual, lpips
from longtake.training.metrics.reconstruction import psnr, ssim
from longtake.training.metrics.share import batches, gathered, place, united
from longtake.training.metrics.trivial import Against, comparisons, mean_colour, scaled_down
from longtake.training.models.common.video import write_panels
from longtake.training.models.tats.vqgan import VQGAN

Seen = Callable[[Mapping[str, Any]], Tensor]  # the videos of a batch, on the model's device

_PANELS = ("source", "reconstructed")
_SHOWN = 12
_AGAINST = (
    Against("reconstruction", "psnr", "the clip's mean colour", "psnr_mean_colour"),
    Against("reconstruction", "psnr", "the clip scaled down to as many bits", "psnr_scaled_down"),
    Against("equal tokens a latent frame later, above chance", "kappa", "chance", "kappa_chance", ""),
    *probes.AGAINST,
)


@torch.inference_mode()
def evaluate(
    model: VQGAN,
    loader: Loader,
    folder: Path,
    seed: int,
    most: int,
    perceptual: Perceptual | None = None,
    *,
    seen: Seen | None = None,
    shifted: Loader | None = None,
    network: FeatureNetwork | None = None,
    latents: bool = False,
    probed: Loader | None = None,
    probe_clips: int = 0,
) -> dict[str, Any]:
    """Measure reconstructions of the first `most` clips of a loader; writes `reconstructed.json` and some KEY.mp4 to `folder`.

    `l1` is of pixels in 0..1. `latent_error` is the squared distance of latents from their codes, over their variance.
    `usage` is the share of codes that some token has, `perplexity` that of all tokens. Every rank of the process group calls
    it with the same loaders and measures its share.

    Args:
        loader: batches of one clip.
        seen: what the model sees of a batch; None: its pixels.
        shifted: clips that are longer by a latent frame, for `score`, `score_paper` and `kappa` (`metrics.equivariance`).
        network: for `reconstruction_frechet` and `reconstruction_kernel` (with I3D rFVD and rKVD).
        latents: also examine the latents (`look.looked_at`).
        probed: training clips, to whose latents linear probes are fitted; at most `probe_clips`.

    Raises:
        UserError: the network does not take such videos, or there are too few.
        ValueError: nothing to probe.
    """
    count, codes, seen = min(most, loader.samples), model.config.codes, seen or partial(_pixels, model)
    rows, heldout_latents = dict[int, dict[str, Any]](), look.Latents()
    histogram = torch.zeros(codes, dtype=torch.int64)
    sources, copies = (Sample(n, network) if network else None for n in ("sources", "copies"))
    for number, batch in batches(loader, count, "evaluate"):
        video = seen(batch)
        z = model.encode(video).mode()
        tokens = model.codebook.tokens(z)
        made = model.decode_tokens(tokens).float().clamp(-1, 1)
        histogram += equivariance.histogram(codes, tokens).cpu()
        row = {"key": batch["key"][0], "frames": video.shape[2], **compared(model.whole(made), model.whole(video))}
        row |= {f"psnr_{name}": psnr(copy, video).item() for name, copy in _trivial(model, video).items()}
        row |= _moments(z.float(), model.codebook.embed(tokens))
        if perceptual:
            row["lpips"] = lpips(perceptual, made, video).item()
        if latents:
            heldout_latents.add(number, z, partial(_at_latents, model, video))
        if sources and copies:
            sources.add(video)
            copies.add(made)
        if number < _SHOWN:
            row["file"] = f"{row['key']}.mp4"
            write_panels(folder / row["file"], [panel.expand(-1, 3, -1, -1, -1) for panel in (video, made)])
        rows[number] = row

    # figures over all ranks
    entries = list(united(rows).values())
    names = [name for name in entries[0] if name.startswith(("l1", "psnr", "ssim", "lpips"))]
    summary: dict[str, Any] = {name: float(np.mean([row[name] for row in entries])) for name in names}
    summary |= {"latent_error": _latent_error(entries), **_usage(gathered(histogram[None]).sum(0))}
    summary |= {"clips": len(entries), "frames": entries[0]["frames"], "split": "val", "seed": seed, "series": {}}
    summary |= {"perceptual": perceptual.record() if perceptual else None}
    if shifted:
        figures, by_step = moved(model, shifted, min(most, shifted.samples), seen)
        summary |= figures
        summary["series"]["equal_tokens_by_step"] = by_step
    if sources and copies:
        distance = heldout_distance(sources.of_all_ranks(), copies.of_all_ranks(), seed)
        summary |= {f"reconstruction_{name}": distance[name] for name in ("frechet", "kernel")} | {"distance": distance}
    if latents:
        summary["latents"] = look.looked_at({"heldout": heldout_latents}, folder)
        summary |= look.figures(summary["latents"])
        summary["series"] |= look.series(summary["latents"])
    if probed:
        pairs = (_pairs(model, clips, min(probe_clips, clips.samples)) for clips in (probed, loader))
        summary |= {f"probe_{name}": value for name, value in probes.scores(*pairs).items()}
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        clips = [{k: v for k, v in row.items() if k not in ("mean", "square")} for row in entries if "file" in row]
        record = {"panels": _PANELS, "summary": summary, "clips": clips}
        (folder / "reconstructed.json").write_text(json.dumps(record, indent=2))
    return summary


def _pixels(model: VQGAN, batch: Mapping[str, Any]) -> Tensor:
    return to_model(batch["video"].to(next(model.parameters()).device))


def compared(made: Tensor, video: Tensor) -> dict[str, float]:
    """`psnr`, `ssim` and `l1` of a reconstruction `(1, channels, T, H, W)` in [-1, 1], each as `VQGAN.whole` gives it."""
    error = (made - video).abs().mean().item() / 2
    return {"l1": error, "psnr": psnr(made, video).item(), "ssim": ssim(made, video).item()}


def moved(model: VQGAN, loader: Loader, count: int, seen: Seen | None = None) -> tuple[dict[str, float], look.Points]:
    """Equivariance of the first clips, each as long as a clip and a latent frame: figures, and equal tokens by latent frame.

    Every rank calls it with the same loader and takes its share.
    """
    f, codes, seen = model.config.temporal_stride, model.config.codes, seen or partial(_pixels, model)
    shares, histogram = dict[int, Tensor](), torch.zeros(codes, dtype=torch.int64)
    for number, batch in batches(loader, count, "shift"):
        video = seen(batch)
        first, second = model.tokens(video[:, :, :-f]), model.tokens(video[:, :, f:])
        shares[number] = equivariance.matched(first, second).cpu()
        histogram += equivariance.histogram(codes, first, second).cpu()
    mean = torch.stack(list(united(shares).values())).mean(0)
    found = equivariance.scores(mean, gathered(histogram[None]).sum(0))
    figures = {name: found[name] for name in ("score", "score_paper", "kappa")} | {"kappa_chance": 0.0}
    return figures, list(enumerate(mean.tolist(), 1))


def _trivial(model: VQGAN, video: Tensor) -> dict[str, Tensor]:
    """Reconstructions that need no training. A token has log2(codes) bits, a number of a clip that is scaled down has 8."""
    config = model.config
    bits = SimpleNamespace(
        temporal_stride=config.temporal_stride,
        first_frames=config.first_frames,
        spatial_stride=config.spatial_stride,
        latent_channels=math.log2(config.codes) / 8,
    )
    return {"mean_colour": mean_colour(video), "scaled_down": scaled_down(video, bits)}


def _moments(z: Tensor, code: Tensor) -> dict[str, Any]:
    """Of a clip's latents: the mean by channel, the mean square, and the squared distance from their codes."""
    mean = z.mean((0, 2, 3, 4)).tolist()
    return {"mean": mean, "square": z.square().mean().item(), "to_codes": (z - code).square().mean().item()}


def _latent_error(rows: list[dict[str, Any]]) -> float:
    mean, square, to_codes = (np.mean([row[name] for row in rows], 0) for name in ("mean", "square", "to_codes"))
    return float(to_codes / max(square - np.square(mean).mean(), 1e-12))


def _usage(counts: Tensor) -> dict[str, float]:
    return {"usage": float((counts > 0).double().mean()), "perplexity": equivariance.perplexity(counts)}


def _at_latents(model: VQGAN, video: Tensor) -> Tensor:
    """From the last frame of the first latent on: the frames of a clip whose first latent stands for one."""
    return video[:, :, model.config.first_frames - 1 :].clone()


def _pairs(model: VQGAN, loader: Loader, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's latents and videos of the first `count` clips."""
    for _, batch in batches(loader, count, "probe"):
        video = _pixels(model, batch)
        yield model.encode(video).mode().float(), _at_latents(model, video)
