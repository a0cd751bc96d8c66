"""How well a prior has learned what videos there are: its loss on held-out clips, and generated videos to look at."""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
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
from longtake.training.models.common.condition import Condition, of_classes
from longtake.training.models.common.flow import TIMES, clip_rng, losses_over_time
from longtake.training.models.common.video import video_file
from longtake.training.models.generator import Settings
from longtake.training.models.latte.model import Latte
from longtake.training.models.latte.sample import generate_latents, generate_videos

_SHOWN = 12
_LONGER = 3  # windows in a longer video, without what they share
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


class Held(NamedTuple):
    """A held-out window: its number, what the prior is to generate, normalised (1, C, T, H, W), its condition, index in its clip."""

    number: int
    x0: Tensor
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
    """The flow's loss `(clips, times)` of clips `(1, C, T, H, W)`, normalised, from their first frame on, with their conditions.

    Times are spread evenly over 0..1, no frame is clean, and clip n, counted from `first`, always gets the same noise: so
    values compare between trainings on the same latents. `scale` `(1, C, 1, 1, 1)` is the unit of errors where models
    normalise by different statistics.
    """
    rows = []
    for number, (clip, condition) in enumerate(clips, first):
        velocity = partial(_velocity, latte, condition)
        rows.append(losses_over_time(velocity, clip, clip_rng(seed, number), scale=scale))
    return np.stack(rows) if rows else np.empty((0, TIMES))


def _velocity(latte: Callable[..., Tensor], condition: Condition | None, x: Tensor, t: Tensor) -> Tensor:
    return latte(x, t, condition and condition.expand(len(x)))


class Videos(NamedTuple):
    """How to generate: `frames` of each, at `fps`, `videos` of them from `seed` on, `batch` at a time on each rank."""

    frames: int
    fps: float
    videos: int
    seed: int
    settings: Settings
    classes: Sequence[str] = ()
    batch: int = 8

    def of(self, number: int) -> tuple[int, int | None]:
        """Seed and class of a video."""
        return self.seed + number, number % len(self.classes) if self.classes else None


def generated(latte: Latte, codec: Codec, how: Videos) -> Iterator[tuple[int, Tensor, Tensor]]:
    """This rank's videos: number, latent (1, C, T, h, w), pixels (1, 3, T, H, W) uint8; every rank must take all of its own.

    The ranks take whole batches in turn, so a video is the same to the bit on any number of them. Latents are sampled in
    batches, videos decoded one by one: of memory it takes a batch of latents and one video.
    """
    for block in mine(math.ceil(how.videos / how.batch), "generate", "batch"):
        numbers = range(block * how.batch, min(how.videos, (block + 1) * how.batch))
        seeds, ids = zip(*map(how.of, numbers), strict=True)
        condition = of_classes(ids) if how.classes else None
        chunks = generate_latents(latte, codec, how.frames, seeds, condition, how.settings)
        latents = torch.cat(list(chunks), dim=2)
        for number, latent in zip(numbers, latents.split(1), strict=True):
            yield number, latent, decoded(codec, latent)


@torch.no_grad()
def evaluate(
    latte: Latte,
    codec: Codec,
    clips: Iterable[Held],
    folder: Path,
    how: Videos,
    trivial: tuple[Still, Gaussian],
    *,
    latents: bool = False,
    network: FeatureNetwork | None = None,
    real: Iterable[Tensor] = (),
    train: Iterable[Tensor] = (),
    probed: tuple[probes.Pairs, probes.Pairs] | None = None,
) -> dict[str, Any]:
    """`heldout_losses`, and generated videos: some as NAME.mp4 in `folder`, all that was found in `generated.json`.

    `heldout_loss` is of windows that start their clips, as generated videos do, `heldout_loss_later` of those that do not,
    None where there are none; `heldout_loss_mean` and `heldout_loss_gaussian` are those of the `trivial` velocities. Where the
    model can go on beyond a window, one more video is longer. With a network the Fréchet and kernel distance of the
    generated videos to the `real` ones is measured, and the Fréchet distances of the `train` videos and of their mean;
    without one `distance` is None, and no more videos are made than are shown. Every rank of the process group, where
    there is one, calls it with its share of the iterables, and must find all of them used up.

    Args:
        trivial: what the mean of the data, or its mean and variance, tell of the velocity.
        latents: also look at those of held-out and generated videos, see `look.looked_at`; of a prior of latents.
        real, train: (1, 3, T, H, W) in [-1, 1].
        probed: `features` and videos of training and held-out clips, for `probes.scores`.

    Raises:
        UserError: the network does not take such videos, or there are too few.
    """
    losses, held = _losses(latte, codec, clips, how.seed, trivial, latents)
    if network is None:
        how = how._replace(videos=min(how.videos, _SHOWN))
    made, fake = look.Latents(), Sample("generated", network) if network else None
    shown = dict[int, dict[str, Any]]()
    for number, latent, video in generated(latte, codec, how):
        if number < _SHOWN:
            shown[number] = _show(folder, f"seed-{how.of(number)[0]}", how, number, [video])
        if latents:
            made.add(number, latent, partial(to_model, video))
        if fake:
            fake.add(to_model(video))
    if _goes_on(latte, how) and place()[0] == 0:
        longer = how._replace(frames=1 + _LONGER * (how.frames - 1))
        shown[_SHOWN] = _show(folder, "longer", longer, 0, _longer(latte, codec, longer))
    summary: dict[str, Any] = losses | {"videos": how.videos, "frames": how.frames, "split": "val", "seed": how.seed}
    summary |= {"distance": None, "series": {}}
    if network and fake:
        summary |= _distances(network, real, train, fake, how)
    if latents:
        summary["latents"] = look.looked_at({"heldout": held, "generated": made}, folder)
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
    latte: Latte, codec: Codec, clips: Iterable[Held], seed: int, trivial: tuple[Still, Gaussian], latents: bool
) -> tuple[dict[str, Any], look.Latents]:
    """The losses over all ranks, and this rank's held-out latents."""
    held, rows = look.Latents(), dict[int, dict[str, Any]]()
    for number, x0, condition, start in clips:
        models: dict[str, Callable[..., Tensor]] = {"later": partial(latte, start=1)}
        if not start:
            models = {"": latte, "mean": trivial[0].__call__, "gaussian": trivial[1].__call__}
            if latents:
                latent = latte.denormalise(x0)
                held.add(number, latent, lambda latent=latent: to_model(decoded(codec, latent)))  # type: ignore[misc]
        # a clip has one window of either kind, with noise of the same number
        rows[2 * number + bool(start)] = {
            name: heldout_losses(model, [(x0, condition)], seed, first=number)[0] for name, model in models.items()
        }
    each = list(united(rows).values())
    found = {name: [row[name] for row in each if name in row] for name in ("", "mean", "gaussian", "later")}
    names = {name: f"heldout_loss_{name}".rstrip("_") for name in found}
    losses: dict[str, Any] = {names[name]: float(np.mean(some)) if some else None for name, some in found.items()}
    return losses | {"heldout_loss_by_time": np.mean(found[""], 0).tolist(), "clips": len(found[""])}, held


def _distances(
    network: FeatureNetwork, real: Iterable[Tensor], train: Iterable[Tensor], fake: Sample, how: Videos
) -> dict[str, Any]:
    """Of the generated videos, the training videos and their mean to the real ones; over all ranks."""
    truth, learned = Sample("real", network), Sample("train", network, kernel=False)
    for video in real:
        truth.add(video)
    total, at = torch.zeros(1, 0), torch.device("cpu")
    for video in train:
        learned.add(video)
        total, at = video.cpu() + (total.view_as(video) if learned.videos > 1 else 0), video.device
    fake, truth, learned = (side.of_all_ranks() for side in (fake, truth, learned))
    mean = Sample("mean", network, kernel=False)
    whole = gathered(total.flatten()[None] if total.numel() else torch.empty(0, 0)).sum(0) / max(1, learned.videos)
    if learned.shape:
        mean.add(whole.view(1, 3, *learned.shape).to(at), max(2, how.videos))
    found = heldout_distance(truth, fake, how.seed)
    others = {
        f"frechet_{name}": heldout_distance(truth, side, how.seed)
        for name, side in (("train", learned), ("mean_video", mean))
    }
    return {"distance": found, "frechet": found["frechet"], "kernel": found["kernel"]} | {
        name: other["frechet"] for name, other in others.items()
    }


def _goes_on(latte: Latte, how: Videos) -> bool:
    config = latte.config
    return bool(config.conditioning and config.shape and how.settings.overlap < config.shape[0])


def _longer(latte: Latte, codec: Codec, how: Videos) -> Iterator[Tensor]:
    seed, class_id = how.of(0)
    condition = None if class_id is None else of_classes([class_id])
    for chunk in generate_videos(latte, codec, how.frames, [seed], condition, how.settings):
        yield torch.from_numpy(chunk).permute(0, 4, 1, 2, 3)


def _show(folder: Path, name: str, how: Videos, number: int, chunks: Iterable[Tensor]) -> dict[str, Any]:
    """Write a video `(1, 3, t, H, W)` uint8, and say what it is."""
    with video_file(folder / f"{name}.mp4", how.fps) as write:
        for chunk in chunks:
            write(chunk[0].permute(1, 2, 3, 0).cpu().numpy())
    seed, class_id = how.of(number)
    entry = {"file": f"{name}.mp4", "seed": seed, "frames": how.frames}
    return entry | {"class": None if class_id is None else how.classes[class_id]}
