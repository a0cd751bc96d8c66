"""Retrieval of latents from a memory alone, and how much of a video a memory holds by that measure.

A video is encoded in one stream, as at inference, the memory is made of all of it, and each latent is retrieved once, a
few random ones at a time, as in training; the decoded frames are compared with the true pixels. What the autoencoder alone
gives is the bound. All ranks of a process group measure, each its share.
"""

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import to_model, to_pixels
from longtake.training.metrics.reconstruction import psnr, ssim
from longtake.training.metrics.share import place, united
from longtake.training.metrics.trivial import Against, comparisons
from longtake.training.models.common import flow
from longtake.training.models.common.codec import Codec
from longtake.training.models.common.condition import Condition, of_batch
from longtake.training.models.common.video import video_file
from longtake.training.models.memory.history import encode_video, memory_of
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.stretch import Stretch
from longtake.training.models.memory.tokens import Memory, repeated

AT_ONCE = 4  # latents that are retrieved together, by a model that has learned to retrieve as many

_SHOWN = 4  # clips in retrieved.mp4
_PICTURES = "shown-{}.npy"  # the frames of a video, which a rank leaves for rank 0 to join
_MEANS = ("psnr", "ssim", "psnr_bound", "ssim_bound", "psnr_copy_last", "psnr_copy_nearest")
_AGAINST = (
    Against("retrieval", "psnr", "copying the last frame", "psnr_copy_last"),
    Against("retrieval", "psnr", "repeating as many whole frames as fit into the memory", "psnr_copy_nearest"),
)


class Video(NamedTuple):
    """A held-out video: its number, pixels uint8 `(1, 3, T, H, W)`, its condition, and its caption where texts are learned."""

    number: int
    pixels: Tensor
    condition: Condition | None
    caption: str | None = None

    @classmethod
    def of_batch(cls, number: int, batch: Mapping[str, Any]) -> "Video":
        """The video of a batch of one: the frames that it truly has before its segment, and the segment's."""
        before = batch["history_video"]
        begin = before.shape[2] - int(batch["history_frames"])
        caption = batch["caption"][0] if "caption" in batch else None
        return cls(number, torch.cat([before[:, :, begin:], batch["video"]], dim=2), of_batch(batch), caption)


def learned_at_once(facts: Mapping[str, Any]) -> int:
    """How many latents a model retrieves together: what its training retrieved at most, where its config.json says so."""
    return min(AT_ONCE, int(facts.get("retrieved", AT_ONCE)))


@torch.no_grad()
def retrieve(
    model: MemoryModel,
    memory: Memory,
    times: Sequence[int],
    shape: tuple[int, int],
    rng: torch.Generator,
    solver_steps: int = 50,
    shift: float = 1.0,
    condition: Condition | None = None,
    at_once: int = AT_ONCE,
    first: int | None = 0,
) -> Tensor:
    """The latents that a memory holds at some times: `(B, C, len(times), H, W)`, normalised, fp32, in the order of `times`.

    Args:
        times: true times of the latents, on the scale that the memory was made with.
        shape: height and width of a latent.
        rng: on the CPU: the same noise on every device.
        solver_steps: Euler steps.
        at_once: latents that are denoised together; a model has learned as many as its training retrieved.
        first: the time of the video's first latent, None where the memory begins later.
    """
    batch, device = memory.tokens.shape[0], model.latent_mean.device
    latents = []
    for part in torch.tensor(times, device=device).split(at_once):
        noise = torch.randn(batch, model.config.channels, len(part), *shape, generator=rng).to(device)
        is_first = None if first is None else (part == first)[None]
        velocity = partial(model, times=part, memory=memory, condition=condition, first=is_first)
        latents.append(flow.euler(velocity, noise, solver_steps, shift))
    return torch.cat(latents, dim=2)


def retrieve_all(
    model: MemoryModel,
    stretch: Stretch,
    seed: int,
    solver_steps: int,
    shift: float,
    at_once: int,
    condition: Condition | None = None,
) -> Tensor:
    """All latents of a stretch, retrieved from its memory, `at_once` random ones at a time: `(1, C, T, H, W)`, normalised."""
    rng = torch.Generator().manual_seed(seed)
    order = torch.randperm(stretch.high.shape[2], generator=rng)
    times = torch.cat([part.sort().values for part in order.split(at_once)])
    shape = (stretch.high.shape[3], stretch.high.shape[4])
    with torch.no_grad():
        memory = memory_of(model, stretch)
    numbers = (stretch.start + times).tolist()
    latents = retrieve(model, memory, numbers, shape, rng, solver_steps, shift, condition, at_once)
    return latents[:, :, times.argsort().to(latents.device)]


def trim_to_groups(video: Tensor, factor: int, group: int) -> Tensor:
    """The end of a video `(B, C, T, H, W)` whose latents, `factor` frames each but for the first, make whole groups.

    ValueError where it is too short for one.
    """
    latents = 1 + (video.shape[2] - 1) // factor
    count = latents // group * group
    if not count:
        raise ValueError(f"the video has {latents} steps, the memory takes {group} at a time")
    return video[:, :, video.shape[2] - 1 - (count - 1) * factor :]


@torch.no_grad()
def heldout_losses(
    model: MemoryModel,
    clips: Iterable[tuple[Stretch, Condition | None]],
    seed: int,
    scale: Tensor | float = 1.0,
    at_once: int = AT_ONCE,
) -> np.ndarray[Any, Any]:
    """The flow's loss `(clips, times)` of latents of held-out videos, one video a batch, given the memory of all of it.

    The stretches are in whole groups. Of each, some random latents are to be retrieved, `at_once` together. Times are spread
    evenly over 0..1, and clip n always has the same latents and noise: so values compare between trainings on the same
    latents. `scale` `(1, C, 1, 1, 1)` is the unit of errors where models normalise by different statistics.
    """
    rows = []
    for number, (stretch, condition) in enumerate(clips):
        rng = flow.clip_rng(seed, number)
        omega = torch.randperm(stretch.high.shape[2], generator=rng)[:AT_ONCE].sort().values.to(stretch.high.device)
        velocity = _velocity_of(model, stretch, omega, condition, at_once)
        rows.append(flow.losses_over_time(velocity, stretch.high[:, :, omega], rng, scale=scale))
    return np.stack(rows)


def _velocity_of(
    model: MemoryModel, stretch: Stretch, omega: Tensor, condition: Condition | None, at_once: int
) -> flow.Velocity:
    """The velocity of the latents `omega` of a stretch, given the memory of all of it, for a batch of `flow.TIMES` times."""
    memory = repeated(memory_of(model, stretch), flow.TIMES)
    told = condition and condition.expand(flow.TIMES)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        parts = zip(x.split(at_once, dim=2), omega.split(at_once), strict=True)
        made = [
            model(part, t, stretch.start + which, memory, told, first=stretch.first[:, which]) for part, which in parts
        ]
        return torch.cat(made, dim=2)

    return velocity


def evaluate(
    model: MemoryModel,
    vae: Codec,
    videos: Iterable[Video],
    folder: Path,
    *,
    fps: float,
    seed: int,
    solver_steps: int = 50,
    shift: float = 1.0,
    at_once: int = AT_ONCE,
) -> dict[str, Any]:
    """PSNR and SSIM of held-out videos, retrieved: `retrieved.json` and `retrieved.mp4`, true above retrieved, in `folder`.

    Every rank calls it with its share of the videos and returns the same; the folder is on a disk that they share.

    Args:
        solver_steps: Euler steps.
        at_once: latents of the video that are retrieved together.

    Returns:
        `psnr`, `ssim` and `psnr_bound`, `ssim_bound` of the autoencoder alone, means over the videos; `psnr_copy_last` of
        the last frame, repeated, and `psnr_copy_nearest` of as many true frames, evenly spread and each repeated for those
        around it, as have no more tokens than the memory (one at least); `psnr_by_step`, by latent from the oldest on, of
        as many latents as the shortest video has; `tokens` of a memory, and the settings of the measurement.
    """
    records = dict[int, dict[str, Any]]()
    for number, pixels, condition, _ in videos:
        video = trim_to_groups(pixels, vae.config.temporal_stride, model.config.group)
        stretch = encode_video(model, vae, video)
        latents = retrieve_all(model, stretch, seed + number, solver_steps, shift, at_once, condition)
        pictures: list[np.ndarray[Any, Any]] | None = [] if number < _SHOWN else None
        records[number] = _compare(model, vae, video, latents, stretch.high, pictures)
        records[number]["tokens"] = model.config.tokens((stretch.high.shape[2], *stretch.high.shape[3:]))
        if pictures:
            np.save(folder / _PICTURES.format(number), np.concatenate(pictures))
    records = united(records)
    rows = list(records.values())
    by_latent = [row["psnr_by_step"] for row in rows]
    curve = np.mean([values[: min(map(len, by_latent))] for values in by_latent], axis=0).tolist()
    summary: dict[str, Any] = {name: float(np.mean([row[name] for row in rows])) for name in _MEANS} | {
        "psnr_by_step": curve,
        "series": {"psnr_by_step": list(enumerate(curve))},
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "clips": len(rows),
        "steps": float(np.mean([len(values) for values in by_latent])),
        "memory": model.config.memory,
        "rates": list(model.config.rates),
        "branches": model.config.branches,
        "sample_steps": solver_steps,
        "at_once": at_once,
        "split": "val",
        "seed": seed,
    }
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        (folder / "retrieved.json").write_text(json.dumps({"summary": summary, "clips": rows}, indent=2))
        with video_file(folder / "retrieved.mp4", fps) as write:
            for path in (folder / _PICTURES.format(number) for number in records if number < _SHOWN):
                write(np.load(path, mmap_mode="r"))
                path.unlink()
    return summary


def _compare(
    model: MemoryModel,
    vae: Codec,
    video: Tensor,
    latents: Tensor,
    true_latents: Tensor,
    pictures: list[np.ndarray[Any, Any]] | None,
) -> dict[str, Any]:
    """PSNR and SSIM of a video's retrieved latents, decoded, and of its true ones, latent by latent.

    True frames above retrieved ones are appended to `pictures`.
    """
    errors: dict[str, list[float]] = {"": [], "_bound": [], "_copy_last": [], "_copy_nearest": []}
    likeness: dict[str, float] = {"": 0.0, "_bound": 0.0}
    begin, sizes = 0, []
    count, copied = video.shape[2], _spread_frames(model, video.shape[2], latents.shape)
    for frames, bound in zip(_decode(model, vae, latents), _decode(model, vae, true_latents), strict=True):
        true = to_model(video[:, :, begin : begin + frames.shape[2]].to(frames.device))
        nearest = copied[(torch.arange(begin, begin + frames.shape[2])[:, None] - copied).abs().argmin(1)]
        copies = {"_copy_last": torch.full_like(nearest, count - 1), "_copy_nearest": nearest}
        begin += frames.shape[2]
        sizes.append(frames.shape[2])
        candidates = {"": frames, "_bound": bound}
        candidates |= {name: to_model(video[:, :, index].to(frames.device)) for name, index in copies.items()}
        for name, candidate in candidates.items():
            errors[name].append(10 ** (-psnr(candidate, true).item() / 10))
        for name in likeness:
            likeness[name] += ssim(candidates[name], true).item() * sizes[-1]
        if pictures is not None:
            pair = torch.cat([to_pixels(true), to_pixels(frames)], dim=3)
            pictures.append(pair[0].permute(1, 2, 3, 0).cpu().numpy())
    record: dict[str, Any] = {"psnr_by_step": [-10 * math.log10(error) for error in errors[""]]}
    for name, values in errors.items():
        record[f"psnr{name}"] = -10 * math.log10(np.average(values, weights=sizes))
    return record | {f"ssim{name}": total / begin for name, total in likeness.items()}


def _spread_frames(model: MemoryModel, frames: int, shape: Sequence[int]) -> Tensor:
    """Evenly spread frame numbers, as many as fit into the tokens of a memory of latents of this shape; one at least."""
    config, (latents, height, width) = model.config, shape[2:]
    count = max(1, config.tokens((latents, height, width)) // (height // config.patch * (width // config.patch)))
    return ((torch.arange(count) + 0.5) * frames / count).long()


@torch.no_grad()
def _decode(model: MemoryModel, vae: Codec, latents: Tensor) -> Iterator[Tensor]:
    """The frames `(1, 3, t, H, W)` of each latent, in [-1, 1]."""
    for frames in vae.decode_stream([model.denormalise(latents)], chunk=1):
        yield frames.float().clamp(-1, 1)
