"""How well a model fills gaps: the flow's loss in held-out ones, and filled ones beside what takes no model, by length."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader
from longtake.training.data import on_device
from longtake.training.metrics import transitions
from longtake.training.metrics.distance import Sample, heldout_distance
from longtake.training.metrics.features import FeatureNetwork, checked_network
from longtake.training.metrics.perceptual import Perceptual, checked_perceptual
from longtake.training.metrics.share import batches, place, united
from longtake.training.metrics.trivial import Against, comparisons
from longtake.training.models.common.codec import Codec
from longtake.training.models.common.video import write_panels
from longtake.training.models.generator import InfillSettings
from longtake.training.models.mavin.guidance import checked_encoder
from longtake.training.models.mavin.measures import MeasuredConfig
from longtake.training.models.mavin.model import Mavin
from longtake.training.models.mavin.windows import Window, cut, filled, filled_without, framed, gap_losses
from longtake.training.pictures import ClipFrames, ImageEncoder

SUMMARY = "gaps.json"

_SHOWN = 3
_WAYS = ("held", "faded", "latent")  # of filling a gap without a model
_BESIDE = 2  # frames on each side of the longest gap in windows that reach over both joints: how it moves on is seen
_AGAINST = (
    Against("held-out loss", "heldout_loss", "predicting the mean velocity", "heldout_loss_mean", "", False),
    Against("PSNR of filled gaps", "middle_psnr", "a cross-fade", "middle_psnr_faded"),
    Against("PSNR of filled gaps", "middle_psnr", "hold and cut", "middle_psnr_held"),
    Against("PSNR of filled gaps", "middle_psnr", "a linear way between latents", "middle_psnr_latent"),
    Against("LPIPS of filled gaps", "middle_lpips", "a cross-fade", "middle_lpips_faded", "", False),
    Against("LPIPS of filled gaps", "middle_lpips", "a linear way between latents", "middle_lpips_latent", "", False),
    Against("smoothness of filled gaps (CLIP-RS)", "clip_rs", "a cross-fade", "clip_rs_faded", ""),
    Against("smoothness of filled gaps (CLIP-RS)", "clip_rs", "hold and cut", "clip_rs_held", ""),
    Against("distance over both joints", "frechet_seam", "a cross-fade", "frechet_seam_faded", "", False),
    Against("distance over both joints", "frechet_seam", "hold and cut", "frechet_seam_held", "", False),
)


class Judges(NamedTuple):
    """Networks that measure filled gaps; each may be missing.

    embedder    CLIP-RS; with CLIP's model of pictures also the released variant
    perceptual  LPIPS
    network     distances of windows that reach over both joints
    """

    embedder: ImageEncoder | None = None
    perceptual: Perceptual | None = None
    network: FeatureNetwork | None = None


def judges_of(config: MeasuredConfig, encoder: ImageEncoder | None, reach: int, size: tuple[int, int]) -> Judges:
    """The networks that a config names, each after it has seen what it will; CLIP-RS is by `encoder` where none is named.

    Raises:
        UserError: there is no such network, or it does not take videos of `reach` frames of this size.
    """
    return Judges(
        checked_encoder(config.embedder, size, "embedder") if config.embedder else encoder,
        checked_perceptual(config.perceptual, config.perceptual_linear, size),
        checked_network(config.features, reach, size),
    )


class Plan(NamedTuple):
    """What is measured.

    window    of a batch of one held-out clip and a span
    spans     each is a gap's length, in latents of a window
    settings  of filled gaps
    clips     windows for losses, at most
    videos    windows whose gaps are filled, at most
    draws     times that each is filled
    reach     frames of windows over both joints (see `reach_of`)
    least     similarity of neighbouring frames below which a window has a cut, and is not measured
    """

    window: Callable[[dict[str, Any], tuple[int, int]], Window]
    spans: Sequence[tuple[int, int]]
    settings: InfillSettings
    clips: int
    videos: int
    draws: int
    seed: int
    reach: int
    judges: Judges
    least: float


def reach_of(frames: int, longest: int) -> int:
    """The frames of windows over both joints, of windows of so many frames whose longest gap has so many."""
    return min(frames, longest + 2 * _BESIDE)


@torch.no_grad()
def evaluate(model: Mavin, codec: Codec, loader: Loader, plan: Plan, folder: Path) -> dict[str, Any]:
    """Measure held-out windows, and fill some: figures in `gaps.json`, some videos as filled-N.mp4, in `folder`.

    Of all windows but those with a cut, whose share is `cuts`: `heldout_loss`, the flow's in a gap, and
    `heldout_loss_mean`, that of the mean velocity. Of filled gaps, without the frames that are given: `middle_psnr`,
    `middle_ssim`, `middle_lpips` (see `transitions.middle`); `clip_rs` and `clip_rs_code`; `seam_ratio` and `bend_ratio`, the
    mean change and turn at both joints, divided by that of all other frames; `joint_error`; `closeness`, the mean difference
    to the nearer frame beside the gap; `diversity`, the deviation of several draws. A network adds `frechet_seam`,
    `kernel_seam` and `distance`, of windows over both joints of gaps of all lengths.

    The same follows with `_held`, `_faded` and `_latent` of gaps filled without a model (see `windows.filled_without`), and
    with `_true` of the real frames. The series `NAME_by_gap` are over frames of a gap, and the figures their means. Every
    rank of the process group must call it, and measures its share.

    Args:
        model: in evaluation mode.
        loader: held-out windows one by one.

    Raises:
        UserError: all windows have a cut; too few windows for a distance.
    """
    rows, shown = dict[int, list[dict[str, Any]]](), dict[int, dict[str, Any]]()
    samples = dict[str, Sample]()
    for number, loaded in batches(loader, min(max(plan.clips, plan.videos), loader.samples), "evaluate"):
        batch = on_device(loaded)
        windows = [plan.window(batch, span) for span in plan.spans]
        rows[number] = []
        if cut(windows[0].video, plan.least).any():
            continue
        if number < plan.clips:
            rows[number] += [_losses(model, window, plan.seed, number) for window in windows]
        if plan.judges.network:
            places = {_start(window, plan.reach) for window in windows}
            _add(samples, plan, "true", [(windows[0].video, start) for start in sorted(places)])
        if number >= plan.videos:
            continue
        for window in windows:
            made = [filled(model, codec, window, plan.settings, (plan.seed + n, number)) for n in range(plan.draws)]
            ways = {"": made[0], **filled_without(codec, window)}
            rows[number].append(_figures(plan.judges, window, ways, torch.cat(made)))
            if plan.judges.network:
                start = _start(window, plan.reach)
                for way, gap in ways.items():
                    _add(samples, plan, way, [(window.joined(gap), start)])
        if number < _SHOWN:
            shown[number] = _show(folder / f"filled-{number}.mp4", window, ways, batch["key"][0])

    # figures over all ranks
    of_windows = list(united(rows).values())
    if not any(of_windows):
        raise UserError("least_similarity: all held-out windows have a cut; lower it, or hold out more clips")
    table = transitions.by_length(row for of_window in of_windows for row in of_window)
    endings = [_named("", way) for way in ("", *_WAYS, "true")]
    table = {length: transitions.with_ratios(figures, endings) for length, figures in table.items()}
    counts = {"clips": min(plan.clips, loader.samples), "videos": min(plan.videos, loader.samples)}
    summary: dict[str, Any] = {"series": {}, "split": "val", "seed": plan.seed, **counts, **_record(plan.judges)}
    summary["cuts"] = sum(not of_window for of_window in of_windows) / len(of_windows)
    for name in sorted({name for figures in table.values() for name in figures}):
        points = [(length, figures[name]) for length, figures in table.items() if name in figures]
        summary["series"][f"{name}_by_gap"] = points
        summary[name] = float(np.mean([value for _, value in points]))
    summary |= _distances(samples, plan, summary)
    summary["against"] = comparisons(_AGAINST, summary)
    videos = list(united(shown).values())
    if place()[0] == 0:
        (folder / SUMMARY).write_text(json.dumps({"summary": summary, "videos": videos}, indent=2))
    return summary


def _losses(model: Mavin, window: Window, seed: int, number: int) -> dict[str, Any]:
    ours, mean = gap_losses(model, window, seed, number)
    return {"length": window.length, "heldout_loss": ours, "heldout_loss_mean": mean}


def _figures(judges: Judges, window: Window, ways: dict[str, Tensor], draws: Tensor) -> dict[str, Any]:
    """A row of one gap: the figures of each way to fill it, by name and way, and of the model's draws (S, 3, n, H, W)."""
    begin, stop = window.frames
    sides = window.video[:, :, begin - 1], window.video[:, :, stop]
    true = window.truth
    seen = _seen(judges.embedder, window, true)
    row: dict[str, Any] = {"length": window.length}
    for way, gap in (*ways.items(), ("true", true)):
        found: dict[str, float | None] = dict(transitions.joints(window.joined(gap), begin, window.length))
        found["closeness"] = float(transitions.closeness(gap, *sides).mean())
        if way != "true":
            middle = transitions.middle(gap, true, judges.perceptual)
            found |= {f"middle_{name}": value for name, value in middle.items()}
            found["joint_error"] = transitions.joint_error(gap, true)
            for (name, measure), ours, theirs in zip(_CLIP_RS, _seen(judges.embedder, window, gap), seen, strict=False):
                found[name] = measure(ours, theirs)
        row |= {_named(name, way): value for name, value in found.items()}
    if len(draws) > 1:
        row["diversity"] = float(transitions.diversity(draws).mean())
    return row


_CLIP_RS = (("clip_rs", transitions.clip_rs), ("clip_rs_code", transitions.clip_rs_code))  # in the order of `_seen`


def _seen(embedder: ImageEncoder | None, window: Window, gap: Tensor) -> list[Tensor]:
    """A gap and the frame on each side as an encoder sees them: embeddings (n + 2, E), and of CLIP also its tokens."""
    if embedder is None:
        return []
    begin, stop = window.frames
    frames = window.joined(gap)[0, :, begin - 1 : stop + 1]
    found = [transitions.embedded(embedder.embeddings, frames)]
    # the released variant is of CLIP's hidden states: channels of others may be 0 everywhere
    return [*found, embedder.tokens(frames.transpose(0, 1))] if isinstance(embedder, ClipFrames) else found


def _start(window: Window, reach: int) -> int:
    """The first frame of as many around the gap, which is in their middle where the window has room."""
    return min(max(0, sum(window.frames) // 2 - reach // 2), window.video.shape[2] - reach)


def _add(samples: dict[str, Sample], plan: Plan, way: str, parts: Sequence[tuple[Tensor, int]]) -> None:
    """Add windows over both joints, given as whole ones with their first frames, to the sample of a way."""
    assert plan.judges.network
    sample = samples.setdefault(way, Sample(way or "filled", plan.judges.network))
    for video, start in parts:
        sample.add(video[:, :, start : start + plan.reach])


def _distances(samples: dict[str, Sample], plan: Plan, summary: dict[str, Any]) -> dict[str, Any]:
    """Distances to real windows of those over both joints, over all ranks."""
    network = plan.judges.network
    if network is None:
        return {}
    # every rank in the same order, also one that has measured nothing
    ways = ["true", *(way for way in ("", *_WAYS) if _named("middle_psnr", way) in summary)]
    all_ranks = {way: samples.get(way, Sample(way or "filled", network)).of_all_ranks() for way in ways}
    real, found = all_ranks.pop("true"), dict[str, Any]()
    for way, sample in all_ranks.items():
        figures = heldout_distance(real, sample, plan.seed)
        found |= {_named(f"{name}_seam", way): figures[name] for name in ("frechet", "kernel")}
        found.setdefault("distance", figures)
    return found


def _named(name: str, way: str) -> str:
    return f"{name}_{way}" if way else name


def _record(judges: Judges) -> dict[str, Any]:
    """What makes two values comparable."""
    found = dict[str, Any]()
    if judges.embedder:
        found["embedder"] = {"embedding": judges.embedder.pooling, "digest": judges.embedder.digest}
    if judges.perceptual:
        found["perceptual"] = judges.perceptual.record()
    return found


def _show(path: Path, window: Window, ways: dict[str, Tensor], key: str) -> dict[str, Any]:
    """Write the window, and beside it the same filled and cross-faded, with what is made framed."""
    made = [framed(window.joined(ways[way]), window.frames) for way in ("", "faded")]
    write_panels(path, [framed(window.video), *made])
    what = f"held-out window, filled, cross-faded; {window.length} frames are made"
    return {"file": path.name, "what": what, "key": key}
