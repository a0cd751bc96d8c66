"""How well a model goes on from a history: its loss on held-out segments, and how far what it generates drifts away."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training import flow, sampling, segments
from longtake.training.history import Given, remembered
from longtake.training.metrics.features import FeatureNetwork, features
from longtake.training.metrics.retrieval import posterior_of, whole_groups
from longtake.training.metrics.trivial import FLOW, comparisons, unit
from longtake.training.models.memory import repeated
from longtake.training.models.memory_dit import MemoryDiT
from longtake.training.models.pv_vae import PVVAE

_TIMES = 8  # of the flow, at which the loss is measured


@torch.no_grad()
def heldout_losses(
    model: Any,
    clips: Iterable[tuple[Given, Tensor | None]],
    seed: int,
    scale: Tensor | float = 1.0,
) -> np.ndarray[Any, Any]:
    """The flow's loss `(clips, times)` of held-out segments, one a batch, given their history; with class ids or None.

    Times are spread evenly over 0..1, and clip n always gets the same noise: so values compare between trainings on the
    same latents, whatever the memory. `scale` `(1, C, 1, 1, 1)` is the unit of errors where models normalise by
    different statistics.
    """
    rows = []
    for number, (given, ids) in enumerate(clips):
        times = (torch.arange(_TIMES, device=given.x0.device) + 0.5) / _TIMES
        x0 = given.x0.expand(_TIMES, -1, -1, -1, -1)
        counted = flow.noised_frames(torch.full((_TIMES,), given.window, device=x0.device), x0.shape[2])
        t = times[:, None] * counted
        draws = torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))
        segment = torch.randn(_TIMES, *x0.shape[1:2], x0.shape[2] - given.window, *x0.shape[3:], generator=draws)
        noise = torch.cat([torch.zeros_like(x0[:, :, : given.window]), segment.to(x0.device)], dim=2)
        memory = None if given.memory is None else repeated(remembered(model, given.memory), _TIMES)
        rows_of = None if ids is None else ids.expand(_TIMES)
        steps, seen = (
            given.times.expand(_TIMES, -1),
            given.seen if given.seen is None else given.seen.expand(_TIMES, -1),
        )
        velocity = model(flow.interpolate(x0, noise, t), t, steps, memory, rows_of, None, given.first, seen)
        rows.append(flow.loss(velocity * scale, x0 * scale, noise * scale, counted).cpu().numpy())
    return np.stack(rows)


def trivial_losses(model: MemoryDiT, clips: Iterable[tuple[Given, Tensor | None]], seed: int) -> dict[str, float]:
    """The mean of `heldout_losses` for velocities that know the latents' mean, or their mean and variance, alone."""
    held = [(given._replace(memory=None), None) for given, _ in clips]
    still, gaussian = unit(model.config.channels, model.latent_mean)
    return {
        "heldout_loss_mean": float(heldout_losses(still, held, seed).mean()),
        "heldout_loss_gaussian": float(heldout_losses(gaussian, held, seed).mean()),
    }


def evaluate(
    model: MemoryDiT,
    vae: PVVAE,
    videos: Iterable[tuple[Tensor, Tensor | None]],
    folder: Path,
    *,
    losses: np.ndarray[Any, Any],
    starts: np.ndarray[Any, Any],
    by_history: Mapping[int, np.ndarray[Any, Any]],
    trivial: Mapping[str, float],
    frames: int,
    count: int,
    fps: float,
    seed: int,
    posterior: Literal["sample", "mean"],
    settings: sampling.Settings,
    network: FeatureNetwork | None = None,
) -> dict[str, Any]:
    """Go on with held-out videos: `continued-N.mp4` and `continued.json` in `folder`, and the distance to their beginning.

    The distance of a generated segment is 1 - cosine of its features, averaged over its frames, and those of the first
    segment of its history (of the first generated one where there is none). Without a network none is measured.

    Args:
        videos: uint8 `(1, 3, T, H, W)` with class ids or None; the last `frames` of each are what truly came next.
        losses: of `heldout_losses`, of segments with as much history as there is.
        starts: the same of segments that begin their streams.
        by_history: the same of later ones, given so many steps of what came before them, alike for each number.
        trivial: of `trivial_losses`.
        count: segments to generate.
        posterior: what of each latent the model has learned, and is given of a video that it goes on with.

    Returns:
        `heldout_loss`, also by time and by history, of video starts and of what comes later;
        `distance`, its mean, and `distance_by_segment`; `distance_true`, of what truly came
        next.

    Raises:
        UserError: the network does not take such videos.
    """
    assert model.config.shape
    length = model.config.shape[0] * vae.config.temporal_stride
    each, true, entries = list[list[float]](), list[float](), list[dict[str, Any]]()
    for number, (video, ids) in enumerate(videos):
        past = video[:, :, :-frames]
        start = None
        if past.shape[2]:
            past = whole_groups(past, vae.config.temporal_stride, 1)
            start = segments.drawn(posterior_of(vae, past), [seed + number], posterior)
        known = ids is not None and int(ids) != flow.NO_CLASS
        story = [(0, [int(ids)])] if ids is not None and known else []
        how = settings if known else replace(settings, guidance=1.0)
        steps = count * model.config.shape[0]
        made = list(segments.generate(model, vae, steps, [seed + number], start=start, story=story, settings=how))
        name = f"continued-{number}.mp4"
        with sampling.video_file(folder / name, fps) as write:
            if past.shape[2]:
                write(past[0, :, max(0, past.shape[2] - length) :].permute(1, 2, 3, 0).cpu().numpy())
            for chunk in made:
                write(chunk[0])
        entries.append({"file": name, "seed": seed + number, "given_frames": min(length, past.shape[2])})
        if network is None:
            continue
        shown = [torch.from_numpy(chunk).permute(0, 4, 1, 2, 3) for chunk in made]
        try:
            first = _features(model, network, past[:, :, :length] if start is not None else shown[0])
            each.append([_apart(first, _features(model, network, some)) for some in shown])
            true.append(_apart(first, _features(model, network, video[:, :, -frames:])))
        except ValueError as e:
            raise UserError(f"features: {e}") from e
    later = [float(some.mean()) for begin, some in by_history.items() if begin]
    summary: dict[str, Any] = {
        "heldout_loss": float(losses.mean()),
        "heldout_loss_by_history": [(begin, float(some.mean())) for begin, some in by_history.items()],
        "heldout_loss_start": float(starts.mean()),
        "heldout_loss_later": float(np.mean(later)) if later else None,
        **trivial,
        "heldout_loss_by_time": losses.mean(0).tolist(),
        "clips": len(losses),
        "videos": len(entries),
        "segments": count,
        "distance": float(np.mean(each)) if each else None,
        "distance_by_segment": np.mean(each, axis=0).tolist() if each else None,
        "distance_true": float(np.mean(true)) if true else None,
        "features": network.record() if network else None,
        "split": "val",
        "seed": seed,
    }
    summary["against"] = comparisons(FLOW, summary)
    (folder / "continued.json").write_text(json.dumps({"summary": summary, "videos": entries}, indent=2))
    return summary


def _features(model: MemoryDiT, network: FeatureNetwork, video: Tensor) -> Tensor:
    """One row of features (D,) of a video, uint8 `(1, 3, T, H, W)`."""
    return features(network, to_model(video.to(model.latent_mean.device))).mean(0)


def _apart(one: Tensor, other: Tensor) -> float:
    return 1 - float(F.cosine_similarity(one, other, dim=0))
