"""How well a prior has learned a distribution of videos: its loss on held-out clips, and generated videos to look at."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.metrics import look, probes
from longtake.training.metrics.distance import Sample, heldout_distance
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.share import gathered, mine, place, united
from longtake.training.metrics.trivial import FLOW, Against, Gaussian, Still, comparisons
from longtake.training.models.common.codec import Codec, decoded
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.flow import TIMES, clip_rng, losses_over_time
from longtake.training.models.common.video import video_file
from longtake.training.models.common.wanted import Wanted
from longtake.training.models.generator import Settings
from longtake.training.models.latte.model import Latte
from longtake.training.models.latte.sample import generate_latents, generate_videos

_SHOWN = 12
_LONGER = 3  # windows in the longer video, overlaps left out
_AGAINST = (
    *FLOW,
    Against(
        "Fréchet distance of generated videos",
        "frechet",
        "that of the training videos' mean",
        "frechet_mean_video",
        "",
        False,
    ),
    *probes.AGAINST,
)


class HeldoutWindow(NamedTuple):
    """A held-out window: its number, its normalised data, its condition, and the index of its first frame in its clip."""

    number: int
    x0: Tensor  # (1, C, T, H, W)
    condition: Condition | None
    start: int


@torch.no_grad()
def heldout_losses(
    latte: Callable[..., Tensor],
    clips: Iterable[tuple[Tensor, Condition | None]],
    seed: int,
    scale: Tensor | float = 1.0,
    first: int = 0,
) -> np.ndarray[Any, Any]:
    """The flow's loss `(clips, times)` of normalised clips `(1, C, T, H, W)`, from their first frame on, with conditions.

    Times are spread evenly over 0..1, no frame is clean, and clip n, counted from `first`, always gets the same noise: so
    values of trainings on the same latents can be compared. `scale` `(1, C, 1, 1, 1)` is the unit of errors, for models
    with different normalisation.
    """
    rows = []
    for number, (clip, condition) in enumerate(clips, first):
        velocity = partial(_velocity, latte, condition)
        rows.append(losses_over_time(velocity, clip, clip_rng(seed, number), scale=scale))
    return np.stack(rows) if rows else np.empty((0, TIMES))


def _velocity(latte: Callable[..., Tensor], condition: Condition | None, x: Tensor, t: Tensor) -> Tensor:
    return latte(x, t, condition and condition.expand(len(x)))


class VideoPlan(NamedTuple):
    """Videos to generate: their number, the frames and rate of each, the first seed, and the number in a batch of a rank.

    `wanted` says what each of them is to show.
    """

    frames: int
    fps: float
    videos: int
    seed: int
    settings: Settings
    wanted: Wanted = Wanted()
    batch: int = 8


def generated(latte: Latte, codec: Codec, plan: VideoPlan) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Generate this rank's videos: number, latent (1, C, T, h, w), pixels (1, 3, T, H, W) uint8.

    Every rank must use up its iterator. Ranks take whole batches in turn, so a video is the same to the bit on any number
    of ranks. Latents are sampled in batches and decoded one by one, so memory holds a batch of latents and one video.
    """
    for block in mine(math.ceil(plan.videos / plan.batch), "generate", "batch"):
        numbers = range(block * plan.batch, min(plan.videos, (block + 1) * plan.batch))
        seeds, condition = [plan.seed + number for number in numbers], plan.wanted.condition(numbers)
        chunks = generate_latents(latte, codec, plan.frames, seeds, condition, plan.settings)
        latents = torch.cat(list(chunks), dim=2)
        for number, latent in zip(numbers, latents.split(1), strict=True):
            yield number, latent, decoded(codec, latent)


@torch.no_grad()
def evaluate(
    latte: Latte,
    codec: Codec,
    clips: Iterable[HeldoutWindow],
    folder: Path,
    plan: VideoPlan,
    trivial: tuple[Still, Gaussian],
    *,
    latents: bool = False,
    network: FeatureNetwork | None = None,
    real: Iterable[Tensor] = (),
    train: Iterable[Tensor] = (),
    probed: tuple[probes.Pairs, probes.Pairs] | None = None,
) -> dict[str, Any]:
    """Measure held-out losses and generate videos: some as NAME.mp4 in `folder`, all figures in `generated.json`.

    `heldout_loss` is that of windows that start their clips, as generated videos do. `heldout_loss_later` is that of other
    windows, None if there are none. `heldout_loss_mean` and `heldout_loss_gaussian` are those of the `trivial` velocities.
    If the model can continue beyond a window, one more video is longer. With a network, the Fréchet and kernel distances of
    the generated to the `real` videos are measured, and the Fréchet distances of the `train` videos and of their mean.
    Without one `distance` is None, and only videos to look at are generated. Every rank of the process group calls it with
    its share of the iterables, which it uses up.

    Args:
        trivial: velocities that know only the mean of the data, or its mean and variance.
        latents: also examine latents of held-out and generated videos (`look.looked_at`), for a prior of latents.
        real, train: videos (1, 3, T, H, W) in [-1, 1].
        probed: `features` and videos of training and held-out clips, for `probes.scores`.

    Raises:
        UserError: the network does not take such videos, or there are too few.
    """
    losses, heldout_latents = _losses(latte, codec, clips, plan.seed, trivial, latents)

    # generated videos
    if network is None:
        plan = plan._replace(videos=min(plan.videos, _SHOWN))
    generated_latents, sample = look.Latents(), Sample("generated", network) if network else None
    shown = dict[int, dict[str, Any]]()
    for number, latent, video in generated(latte, codec, plan):
        if number < _SHOWN:
            shown[number] = _write(folder, f"seed-{plan.seed + number}", plan, number, [video])
        if latents:
            generated_latents.add(number, latent, partial(to_model, video))
        if sample:
            sample.add(to_model(video))
    if _can_continue(latte, plan) and place()[0] == 0:
        longer = plan._replace(frames=1 + _LONGER * (plan.frames - 1))
        shown[_SHOWN] = _write(folder, "longer", longer, 0, _longer_video(latte, codec, longer))

    # figures
    summary: dict[str, Any] = losses | {"videos": plan.videos, "frames": plan.frames, "split": "val", "seed": plan.seed}
    summary |= {"distance": None, "series": {}}
    if network and sample:
        summary |= _distances(network, real, train, sample, plan)
    if latents:
        summary["latents"] = look.looked_at({"heldout": heldout_latents, "generated": generated_latents}, folder)
        summary |= look.figures(summary["latents"])
        summary["series"] = look.series(summary["latents"])
    if probed:
        summary |= {f"probe_{name}": value for name, value in probes.scores(*probed).items()}
    summary["against"] = comparisons(_AGAINST, summary)
    entries = list(united(shown).values())
    if place()[0] == 0:
        (folder / "generated.json").write_text(json.dumps({"summary": summary, "videos": entries}, indent=2))
    return summary


def _losses(
    latte: Latte,
    codec: Codec,
    clips: Iterable[HeldoutWindow],
    seed: int,
    trivial: tuple[Still, Gaussian],
    latents: bool,
) -> tuple[dict[str, Any], look.Latents]:
    """The losses over all ranks, and this rank's held-out latents."""
    heldout_latents, rows = look.Latents(), dict[int, dict[str, Any]]()
    for number, x0, condition, start in clips:
        models: dict[str, Callable[..., Tensor]] = {"later": partial(latte, start=1)}
        if not start:
            models = {"": latte, "mean": trivial[0].__call__, "gaussian": trivial[1].__call__}
            if latents:
                latent = latte.denormalise(x0)
                heldout_latents.add(number, latent, lambda latent=latent: to_model(decoded(codec, latent)))  # type: ignore[misc]
        # the window that starts a clip and the later one have the same noise
        rows[2 * number + bool(start)] = {
            name: heldout_losses(model, [(x0, condition)], seed, first=number)[0] for name, model in models.items()
        }
    all_rows = list(united(rows).values())
    values = {name: [row[name] for row in all_rows if name in row] for name in ("", "mean", "gaussian", "later")}
    losses: dict[str, Any] = {
        f"heldout_loss_{name}".rstrip("_"): float(np.mean(curves)) if curves else None
        for name, curves in values.items()
    }
    return losses | {"heldout_loss_by_time": np.mean(values[""], 0).tolist(), "clips": len(values[""])}, heldout_latents


def _distances(
    network: FeatureNetwork, real: Iterable[Tensor], train: Iterable[Tensor], generated: Sample, plan: VideoPlan
) -> dict[str, Any]:
    """Distances of the generated videos, the training videos and their mean to the real ones; over all ranks."""
    truth, training = Sample("real", network), Sample("train", network, kernel=False)
    for video in real:
        truth.add(video)
    total, device = torch.zeros(1, 0), torch.device("cpu")
    for video in train:
        training.add(video)
        total, device = video.cpu() + (total.view_as(video) if training.videos > 1 else 0), video.device
    generated, truth, training = (side.of_all_ranks() for side in (generated, truth, training))

    # the mean of all ranks' training videos, as a sample of its own
    mean = Sample("mean", network, kernel=False)
    total = gathered(total.flatten()[None] if total.numel() else torch.empty(0, 0)).sum(0) / max(1, training.videos)
    if training.shape:
        mean.add(total.view(1, 3, *training.shape).to(device), max(2, plan.videos))

    distance = heldout_distance(truth, generated, plan.seed)
    figures = {"distance": distance, "frechet": distance["frechet"], "kernel": distance["kernel"]}
    for name, side in (("train", training), ("mean_video", mean)):
        figures[f"frechet_{name}"] = heldout_distance(truth, side, plan.seed)["frechet"]
    return figures


def _can_continue(latte: Latte, plan: VideoPlan) -> bool:
    config = latte.config
    return bool(config.conditioning and config.shape and plan.settings.overlap < config.shape[0])


def _longer_video(latte: Latte, codec: Codec, plan: VideoPlan) -> Iterator[Tensor]:
    for chunk in generate_videos(latte, codec, plan.frames, [plan.seed], plan.wanted.condition([0]), plan.settings):
        yield torch.from_numpy(chunk).permute(0, 4, 1, 2, 3)


def _write(folder: Path, name: str, plan: VideoPlan, number: int, chunks: Iterable[Tensor]) -> dict[str, Any]:
    """Write chunks `(1, 3, t, H, W)` uint8 as a video; returns its entry for `generated.json`."""
    with video_file(folder / f"{name}.mp4", plan.fps) as write:
        for chunk in chunks:
            write(chunk[0].permute(1, 2, 3, 0).cpu().numpy())
    entry = {"file": f"{name}.mp4", "seed": plan.seed + number, "frames": plan.frames}
    return entry | plan.wanted.words(number)
