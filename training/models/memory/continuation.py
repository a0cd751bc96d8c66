"""How well a model continues a history: its loss on held-out segments, and how far generated video drifts from its beginning.

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
from longtake.training.models.memory.history import Segment, memory_of, posterior_of
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.retrieval import Video, trim_to_groups
from longtake.training.models.memory.tokens import Memory, repeated

_AGAINST = (*FLOW, Against("the next segment", "psnr_next", "repeating the last frame", "psnr_next_copy_last"))

Clips = Iterable[tuple[int, Segment, Condition | None]]  # each with its number


@torch.no_grad()
def heldout_losses(
    model: Any,
    clips: Iterable[tuple[Segment, Condition | None]],
    seed: int,
    scale: Tensor | float = 1.0,
    first: int = 0,
) -> np.ndarray[Any, Any]:
    """The flow's loss `(clips, times)` of held-out segments, one a batch, given their history and conditions.

    Times are spread evenly over 0..1, and clip n, counted from `first`, always gets the same noise: so values compare
    between trainings on the same latents, whatever the memory. `scale` `(1, C, 1, 1, 1)` is the unit of errors where
    models normalise by different statistics.
    """
    rows = []
    for number, (segment, condition) in enumerate(clips, first):
        memory = segment.history and memory_of(model, segment.history)
        copies, draws = condition and condition.expand(flow.TIMES), flow.clip_rng(seed, number)
        velocity = partial(velocity_of_copies, model, segment, memory, condition=copies)
        rows.append(flow.losses_over_time(velocity, segment.x0, draws, segment.recent, scale))
    return np.stack(rows)


def velocity_of_copies(
    model: Any, segment: Segment, memory: Memory | None, x: Tensor, t: Tensor, condition: Condition | None
) -> Tensor:
    """The velocity of noised copies `x` of one segment, given its memory, and a condition for each."""
    count = len(x)
    seen = None if segment.seen is None else segment.seen.expand(count, -1)
    memory, times = memory and repeated(memory, count), segment.times.expand(count, -1)
    velocity: Tensor = model(x, t, times, memory, condition, None, segment.first, seen)
    return velocity


def losses_of_all_ranks(model: Any, clips: Clips, seed: int) -> np.ndarray[Any, Any]:
    """`heldout_losses` of all ranks' clips, in order. Every rank must call it."""
    rows = {n: heldout_losses(model, [(segment, condition)], seed, first=n)[0] for n, segment, condition in clips}
    return np.stack(list(united(rows).values()))


def trivial_losses(model: MemoryModel, clips: Clips, seed: int) -> dict[str, float]:
    """The mean loss over all ranks of velocities that know only the latents' mean, or only their mean and variance."""
    blind = [(number, segment._replace(history=None), None) for number, segment, _ in clips]
    still, gaussian = unit(model.config.channels, model.latent_mean)
    return {
        "heldout_loss_mean": float(losses_of_all_ranks(still, blind, seed).mean()),
        "heldout_loss_gaussian": float(losses_of_all_ranks(gaussian, blind, seed).mean()),
    }


class Continuation(NamedTuple):
    """How held-out videos are continued.

    frames     last frames of each video that truly come next, and are hidden from the model
    segments   segments to generate
    fps        of the files
    seed       of video 0; video n has seed + n
    posterior  what of each latent the model has learned, and is given of a video
    """

    frames: int
    segments: int
    fps: float
    seed: int
    settings: Settings
    posterior: Literal["sample", "mean"]


@torch.no_grad()
def evaluate(
    model: MemoryModel,
    vae: Codec,
    batches: Iterable[Sequence[Video]],
    folder: Path,
    how: Continuation,
    *,
    losses: np.ndarray[Any, Any],
    starts: np.ndarray[Any, Any],
    by_history: Mapping[int, np.ndarray[Any, Any]],
    trivial: Mapping[str, float],
    network: FeatureNetwork | None = None,
) -> dict[str, Any]:
    """Continue held-out videos: `continued-N.mp4` and `continued.json` in `folder`, and the distance to their beginning.

    The distance of a generated segment is 1 - cosine of its features, averaged over its frames, and those of the first
    segment of its history (of the first generated one where there is none). Without a network none is measured.

    Every rank calls it with its share of the batches and returns the same; a video is the same to the bit on any number of
    ranks.

    Args:
        batches: videos to continue at once; the last `frames` of each are what truly came next.
        losses: `losses_of_all_ranks` of segments with as much history as there is.
        starts: the same of segments that begin their streams.
        by_history: the same of later segments, by the number of latents of history that they are given.
        trivial: `trivial_losses`.

    Returns:
        `heldout_loss`, also by time and by history, of video starts and of later segments; `psnr_next` of the generated
        frames to those that truly came next, where there is a history, and `psnr_next_copy_last` of its last frame,
        repeated; `distance`, its mean, and `distance_by_segment`; `distance_true`, of what truly came next.

    Raises:
        UserError: the network does not take such videos.
    """
    records = dict[int, dict[str, Any]]()
    for batch in batches:
        for group in _groups(vae, batch, how):
            records |= _continue(model, vae, group, folder, how, network)
    rows = list(united(records).values())

    def mean(name: str) -> Any:
        """The mean over the videos that have it; None where none has."""
        values = [row[name] for row in rows if row[name] is not None]
        return np.mean(values, axis=0).tolist() if values else None

    means = {latents: float(values.mean()) for latents, values in by_history.items()}
    later = [loss for latents, loss in means.items() if latents]
    by_segment = mean("distance")
    summary: dict[str, Any] = {
        "heldout_loss": float(losses.mean()),
        "heldout_loss_by_history": list(means.items()),
        "heldout_loss_start": float(starts.mean()),
        "heldout_loss_later": float(np.mean(later)) if later else None,
        **{f"heldout_loss_{latents}_steps": loss for latents, loss in means.items()},
        **trivial,
        "heldout_loss_by_time": losses.mean(0).tolist(),
        "clips": len(losses),
        "videos": len(rows),
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
        content = {"summary": summary, "videos": [row["entry"] for row in rows]}
        (folder / "continued.json").write_text(json.dumps(content, indent=2))
    return summary


class _Start(NamedTuple):
    """A video, the frames of it that are given `(1, 3, T, H, W)`, and their latents; None where no frame is given."""

    video: Video
    frames: Tensor
    latents: Tensor | None


def _groups(vae: Codec, videos: Iterable[Video], how: Continuation) -> Iterable[list[_Start]]:
    """Groups of videos that can be continued at once: of as much history, with a condition or without."""
    groups = dict[tuple[int, bool], list[_Start]]()
    for video in videos:
        frames, latents = video.pixels[:, :, : -how.frames], None
        if frames.shape[2]:
            frames = trim_to_groups(frames, vae.config.temporal_stride, 1)
            latents = segments.draw_latents(posterior_of(vae, frames), [how.seed + video.number], how.posterior)
        asks = video.condition is not None and video.condition.asks
        groups.setdefault((frames.shape[2], asks), []).append(_Start(video, frames, latents))
    return groups.values()


def _continue(
    model: MemoryModel,
    vae: Codec,
    group: Sequence[_Start],
    folder: Path,
    how: Continuation,
    network: FeatureNetwork | None,
) -> dict[int, dict[str, Any]]:
    """Continue videos of one length, write them segment by segment, and measure them: records by their numbers."""
    assert model.config.shape
    length = model.config.shape[0] * vae.config.temporal_stride
    starts = [start.latents for start in group if start.latents is not None]
    conditions = [condition for start in group if (condition := start.video.condition) and condition.asks]
    chunks = segments.generate(
        model,
        vae,
        how.segments * model.config.shape[0],
        [how.seed + start.video.number for start in group],
        start=torch.cat(starts) if starts else None,
        story=[(0, reduce(Condition.join, conditions))] if conditions else [],
        settings=how.settings if conditions else replace(how.settings, guidance=1.0),
    )
    vectors: list[list[Tensor]] = [[] for _ in group]
    rows: list[dict[str, Any]] = [
        {"psnr_next": None, "psnr_next_copy_last": None, "distance": None, "distance_true": None} for _ in group
    ]
    with ExitStack() as files:
        # The end of what is given comes first in each file.
        writers = []
        for start, row in zip(group, rows, strict=True):
            number, count = start.video.number, min(length, start.frames.shape[2])
            row["entry"] = {"file": f"continued-{number}.mp4", "seed": how.seed + number, "given_frames": count}
            row["entry"] |= {} if start.video.caption is None else {"prompt": start.video.caption}
            writers.append(files.enter_context(video_file(folder / row["entry"]["file"], how.fps)))
            if count:
                writers[-1](start.frames[0, :, -count:].permute(1, 2, 3, 0).cpu().numpy())

        for segment, chunk in enumerate(chunks):
            for n, start in enumerate(group):
                writers[n](chunk[n])
                frames = torch.from_numpy(chunk[n]).permute(3, 0, 1, 2)[None]
                if not segment and start.latents is not None:
                    rows[n] |= _psnr_next(start, frames[:, :, : how.frames])
                if network:
                    vectors[n].append(_features(model, network, frames))

    if network:
        for start, row, generated in zip(group, rows, vectors, strict=True):
            beginning = generated[0]
            if start.latents is not None:
                beginning = _features(model, network, start.frames[:, :, :length])
            true = _features(model, network, start.video.pixels[:, :, -how.frames :])
            row["distance"] = [_distance(beginning, vector) for vector in generated]
            row["distance_true"] = _distance(beginning, true)
    return {start.video.number: row for start, row in zip(group, rows, strict=True)}


def _psnr_next(start: _Start, frames: Tensor) -> dict[str, float]:
    """PSNR of the first generated frames, uint8 `(1, 3, T, H, W)`, and of the last given frame, repeated."""
    true = to_model(start.video.pixels[:, :, -frames.shape[2] :].cpu())
    last = to_model(start.frames[:, :, -1:].cpu())
    return {
        "psnr_next": float(psnr(to_model(frames), true)),
        "psnr_next_copy_last": float(psnr(last.expand_as(true), true)),
    }


def _features(model: MemoryModel, network: FeatureNetwork, video: Tensor) -> Tensor:
    """One row of features (D,) of a video, uint8 `(1, 3, T, H, W)`. Raises UserError where the network does not take it."""
    try:
        return features(network, to_model(video.to(model.latent_mean.device))).mean(0)
    except ValueError as e:
        raise UserError(f"features: {e}") from e


def _distance(one: Tensor, other: Tensor) -> float:
    return 1 - float(F.cosine_similarity(one, other, dim=0))
