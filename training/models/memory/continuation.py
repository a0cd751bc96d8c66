"""How well a model goes on from a history: its loss on held-out segments, and how far what it generates drifts away.

All ranks of a process group measure, each its share; without one, a process measures all of it.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_model
from longtake.training.metrics.features import FeatureNetwork, features
from longtake.training.metrics.reconstruction import psnr
from longtake.training.metrics.share import place, united
from longtake.training.metrics.trivial import FLOW, Against, comparisons, unit
from longtake.training.models.common import flow
from longtake.training.models.common.codec import Codec
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.video import video_file
from longtake.training.models.generator import Settings
from longtake.training.models.memory import segments
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.history import Given, posterior_of, remembered
from longtake.training.models.memory.retrieval import Video, whole_groups
from longtake.training.models.memory.tokens import repeated

_AGAINST = (*FLOW, Against("the next segment", "psnr_next", "repeating the last frame", "psnr_next_copy_last"))

Clips = Iterable[tuple[int, Given, Condition | None]]  # numbers, segments with what they are given, conditions


@torch.no_grad()
def heldout_losses(
    model: Any,
    clips: Iterable[tuple[Given, Condition | None]],
    seed: int,
    scale: Tensor | float = 1.0,
    first: int = 0,
) -> np.ndarray[Any, Any]:
    """The flow's loss `(clips, times)` of held-out segments, one a batch, given their history; with their conditions.

    Times are spread evenly over 0..1, and clip n, counted from `first`, always gets the same noise: so values compare
    between trainings on the same latents, whatever the memory. `scale` `(1, C, 1, 1, 1)` is the unit of errors where
    models normalise by different statistics.
    """
    rows = []
    for number, (given, condition) in enumerate(clips, first):
        velocity = partial(_velocity, model, given, condition)
        rows.append(flow.losses_over_time(velocity, given.x0, flow.clip_rng(seed, number), given.window, scale))
    return np.stack(rows)


def _velocity(model: Any, given: Given, condition: Condition | None, x: Tensor, t: Tensor) -> Tensor:
    """Of one segment, for a batch of its noised copies."""
    count = len(x)
    memory = None if given.memory is None else repeated(remembered(model, given.memory), count)
    seen = None if given.seen is None else given.seen.expand(count, -1)
    velocity: Tensor = model(
        x, t, given.times.expand(count, -1), memory, condition and condition.expand(count), None, given.first, seen
    )
    return velocity


def losses_of_all_ranks(model: Any, clips: Clips, seed: int) -> np.ndarray[Any, Any]:
    """`heldout_losses` of all ranks' clips, in order. Every rank must call it."""
    rows = {number: heldout_losses(model, [(given, asked)], seed, first=number)[0] for number, given, asked in clips}
    return np.stack(list(united(rows).values()))


def trivial_losses(model: MemoryDiT, clips: Clips, seed: int) -> dict[str, float]:
    """The mean loss over all ranks for velocities that know the latents' mean, or their mean and variance, alone."""
    held = [(number, given._replace(memory=None), None) for number, given, _ in clips]
    still, gaussian = unit(model.config.channels, model.latent_mean)
    return {
        "heldout_loss_mean": float(losses_of_all_ranks(still, held, seed).mean()),
        "heldout_loss_gaussian": float(losses_of_all_ranks(gaussian, held, seed).mean()),
    }


class Continuing(NamedTuple):
    """How to go on: by `segments` of them, at `fps`, from `seed` on; `frames` of each video are what truly came next.

    `posterior` is what of each latent the model has learned, and is given of a video that it goes on with.
    """

    frames: int
    segments: int
    fps: float
    seed: int
    settings: Settings
    posterior: Literal["sample", "mean"]


@torch.no_grad()
def evaluate(
    model: MemoryDiT,
    vae: Codec,
    batches: Iterable[Sequence[Video]],
    folder: Path,
    how: Continuing,
    *,
    losses: np.ndarray[Any, Any],
    starts: np.ndarray[Any, Any],
    by_history: Mapping[int, np.ndarray[Any, Any]],
    trivial: Mapping[str, float],
    network: FeatureNetwork | None = None,
) -> dict[str, Any]:
    """Go on with held-out videos: `continued-N.mp4` and `continued.json` in `folder`, and the distance to their beginning.

    The distance of a generated segment is 1 - cosine of its features, averaged over its frames, and those of the first
    segment of its history (of the first generated one where there is none). Without a network none is measured.

    Every rank calls it with its share of the batches, and finds the same; a video is the same to the bit on any number of
    ranks.

    Args:
        batches: of videos to go on with at once; the last `frames` of each are what truly came next.
        losses: of `losses_of_all_ranks`, of segments with as much history as there is.
        starts: the same of segments that begin their streams.
        by_history: the same of later ones, given so many steps of what came before them, alike for each number.
        trivial: of `trivial_losses`.

    Returns:
        `heldout_loss`, also by time and by history, of video starts and of what comes later; `psnr_next` of the generated
        frames to those that truly came next, where there is a history, and `psnr_next_copy_last` of its last frame,
        repeated; `distance`, its mean, and `distance_by_segment`; `distance_true`, of what truly came next.

    Raises:
        UserError: the network does not take such videos.
    """
    mine = dict[int, dict[str, Any]]()
    for batch in batches:
        for group in _alike(vae, batch, how):
            mine |= _continued(model, vae, group, folder, how, network)
    found = list(united(mine).values())

    def mean(name: str) -> Any:
        """Over the videos that have it; None where none has."""
        values = [one[name] for one in found if one[name] is not None]
        return np.mean(values, axis=0).tolist() if values else None

    later = [float(some.mean()) for begin, some in by_history.items() if begin]
    by_segment = mean("distance")
    summary: dict[str, Any] = {
        "heldout_loss": float(losses.mean()),
        "heldout_loss_by_history": [(begin, float(some.mean())) for begin, some in by_history.items()],
        "heldout_loss_start": float(starts.mean()),
        "heldout_loss_later": float(np.mean(later)) if later else None,
        **{f"heldout_loss_{begin}_steps": float(some.mean()) for begin, some in by_history.items()},
        **trivial,
        "heldout_loss_by_time": losses.mean(0).tolist(),
        "clips": len(losses),
        "videos": len(found),
        "segments": how.segments,
        "psnr_next": mean("psnr_next"),
        "psnr_next_copy_last": mean("psnr_next_copy_last"),
        "distance": float(np.mean(by_segment)) if by_segment else None,
        "distance_by_segment": by_segment,
        "distance_true": mean("distance_true"),
        "features": network.record() if network else None,
        "split": "val",
        "seed": how.seed,
        "series": {"distance_by_segment": list(enumerate(by_segment))} if by_segment else {},
    }
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        record = {"summary": summary, "videos": [one["entry"] for one in found]}
        (folder / "continued.json").write_text(json.dumps(record, indent=2))
    return summary


class _Begun(NamedTuple):
    """A video, what is given of it `(1, 3, T, H, W)`, and the latents of that; None where nothing is."""

    video: Video
    past: Tensor
    start: Tensor | None

    @property
    def asks(self) -> bool:
        """Whether anything is known of the video, such as its class."""
        return self.video.condition is not None and self.video.condition.asks


def _alike(vae: Codec, videos: Iterable[Video], how: Continuing) -> Iterable[list[_Begun]]:
    """Those that can be gone on with at once: of as much history, with a condition or without."""
    groups = dict[tuple[int, bool], list[_Begun]]()
    for video in videos:
        past, start = video.pixels[:, :, : -how.frames], None
        if past.shape[2]:
            past = whole_groups(past, vae.config.temporal_stride, 1)
            start = segments.drawn(posterior_of(vae, past), [how.seed + video.number], how.posterior)
        begun = _Begun(video, past, start)
        groups.setdefault((past.shape[2], begun.asks), []).append(begun)
    return groups.values()


def _continued(
    model: MemoryDiT,
    vae: Codec,
    group: Sequence[_Begun],
    folder: Path,
    how: Continuing,
    network: FeatureNetwork | None,
) -> dict[int, dict[str, Any]]:
    """Videos of one length, gone on with, written, and measured by their numbers; segment by segment."""
    assert model.config.shape
    length = model.config.shape[0] * vae.config.temporal_stride
    starts = [one.start for one in group if one.start is not None]
    asked = [one.video.condition for one in group if one.video.condition and one.asks]
    made = segments.generate(
        model,
        vae,
        how.segments * model.config.shape[0],
        [how.seed + one.video.number for one in group],
        start=torch.cat(starts) if starts else None,
        story=[(0, reduce(Condition.join, asked))] if asked else [],
        settings=how.settings if asked else replace(how.settings, guidance=1.0),
    )
    seen: list[list[Tensor]] = [[] for _ in group]
    rows: list[dict[str, Any]] = [
        {"psnr_next": None, "psnr_next_copy_last": None, "distance": None, "distance_true": None} for _ in group
    ]
    with ExitStack() as files:
        writers = []
        for one, row in zip(group, rows, strict=True):
            number, given = one.video.number, min(length, one.past.shape[2])
            row["entry"] = {"file": f"continued-{number}.mp4", "seed": how.seed + number, "given_frames": given}
            writers.append(files.enter_context(video_file(folder / row["entry"]["file"], how.fps)))
            if given:
                writers[-1](one.past[0, :, -given:].permute(1, 2, 3, 0).cpu().numpy())
        for segment, chunk in enumerate(made):
            for n, one in enumerate(group):
                writers[n](chunk[n])
                shown = torch.from_numpy(chunk[n]).permute(3, 0, 1, 2)[None]
                if not segment and one.start is not None:
                    rows[n] |= _next(one, shown[:, :, : how.frames])
                if network:
                    seen[n].append(_features(model, network, shown))
    for one, row, each in zip(group, rows, seen, strict=True):
        if network:
            first = each[0] if one.start is None else _features(model, network, one.past[:, :, :length])
            row["distance"] = [_apart(first, some) for some in each]
            row["distance_true"] = _apart(first, _features(model, network, one.video.pixels[:, :, -how.frames :]))
    return {one.video.number: row for one, row in zip(group, rows, strict=True)}


def _next(one: _Begun, made: Tensor) -> dict[str, float]:
    """PSNR of the generated frames that follow what is given, uint8 `(1, 3, T, H, W)`, and of the last given one, repeated."""
    true, copied = to_model(one.video.pixels[:, :, -made.shape[2] :].cpu()), to_model(one.past[:, :, -1:].cpu())
    return {
        "psnr_next": float(psnr(to_model(made), true)),
        "psnr_next_copy_last": float(psnr(copied.expand_as(true), true)),
    }


def _features(model: MemoryDiT, network: FeatureNetwork, video: Tensor) -> Tensor:
    """One row of features (D,) of a video, uint8 `(1, 3, T, H, W)`. Raises UserError where the network does not take it."""
    try:
        return features(network, to_model(video.to(model.latent_mean.device))).mean(0)
    except ValueError as e:
        raise UserError(f"features: {e}") from e


def _apart(one: Tensor, other: Tensor) -> float:
    return 1 - float(F.cosine_similarity(one, other, dim=0))
