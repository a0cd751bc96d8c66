"""How much of a video a memory holds: its steps, retrieved from the memory alone, against the true pixels.

A video is encoded in one stream, as at inference, the memory is made of all of it, and each of its steps is retrieved
once, a few random ones at a time, as in training. What the autoencoder alone would give is the bound. All ranks of a
process group measure, each its share.
"""

import json
import math
from collections.abc import Iterable, Iterator, Sequence
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
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.video import video_file
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.history import encoded, remembered, retrieve
from longtake.training.models.memory.latents import Steps
from longtake.training.models.memory.tokens import repeated

_SHOWN = 4  # clips in the video to look at
FIGURES = ("psnr", "ssim", "psnr_bound", "ssim_bound", "psnr_copy_last", "psnr_copy_nearest", "tokens")
_AGAINST = (
    Against("retrieval", "psnr", "copying the last frame", "psnr_copy_last"),
    Against("retrieval", "psnr", "repeating as many whole frames as fit into the memory", "psnr_copy_nearest"),
)
_AT_ONCE = 4  # steps that are retrieved together there


class Video(NamedTuple):
    """A held-out video: its number, pixels uint8 `(1, 3, T, H, W)`, its condition."""

    number: int
    pixels: Tensor
    condition: Condition | None


def whole_groups(video: Tensor, factor: int, group: int) -> Tensor:
    """The end of a video `(B, C, T, H, W)` whose steps, `factor` frames each but for the first, make whole groups.

    ValueError where it is too short for one.
    """
    steps = 1 + (video.shape[2] - 1) // factor
    kept = steps // group * group
    if not kept:
        raise ValueError(f"the video has {steps} steps, the memory takes {group} at a time")
    return video[:, :, video.shape[2] - 1 - (kept - 1) * factor :]


@torch.no_grad()
def heldout_losses(
    model: MemoryDiT, clips: Iterable[tuple[Steps, Condition | None]], seed: int, scale: Tensor | float = 1.0
) -> np.ndarray[Any, Any]:
    """The flow's loss `(clips, times)` of steps of held-out videos in whole groups, one a batch, given the memory of all.

    Of each video some random steps are to be retrieved, as many as `retrieve` takes at once. Times are spread evenly over
    0..1, and clip n always has the same steps and noise: so values compare between trainings on the same latents.
    `scale` `(1, C, 1, 1, 1)` is the unit of errors where models normalise by different statistics.
    """
    rows = []
    for number, (steps, condition) in enumerate(clips):
        draws = flow.clip_rng(seed, number)
        omega = torch.randperm(steps.high.shape[2], generator=draws)[:_AT_ONCE].sort().values.to(steps.high.device)
        velocity = partial(_velocity, model, steps, omega, condition)
        rows.append(flow.losses_over_time(velocity, steps.high[:, :, omega], draws, scale=scale))
    return np.stack(rows)


def _velocity(
    model: MemoryDiT, steps: Steps, omega: Tensor, condition: Condition | None, x: Tensor, t: Tensor
) -> Tensor:
    """Of the steps Ω of one video, for a batch of their noised copies."""
    memory = repeated(remembered(model, steps), len(x))
    given = condition and condition.expand(len(x))
    velocity: Tensor = model(x, t, steps.start + omega, memory, given, first=steps.first[:, omega])
    return velocity


def retrieved(
    model: MemoryDiT,
    steps: Steps,
    seed: int,
    passes: int,
    shift: float,
    at_once: int,
    condition: Condition | None = None,
) -> Tensor:
    """All steps `(1, C, T, H, W)` as the memory of them has them, normalised, `at_once` random ones at a time."""
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(steps.high.shape[2], generator=draws)
    times = torch.cat([some.sort().values for some in order.split(at_once)])
    shape = (steps.high.shape[3], steps.high.shape[4])
    with torch.no_grad():
        memory = remembered(model, steps)
    made = retrieve(model, memory, (steps.start + times).tolist(), shape, draws, passes, shift, condition, at_once)
    return made[:, :, times.argsort().to(made.device)]


def evaluate(
    model: MemoryDiT,
    vae: Codec,
    videos: Iterable[Video],
    folder: Path,
    *,
    fps: float,
    seed: int,
    steps: int = 50,
    shift: float = 1.0,
    at_once: int = 4,
) -> dict[str, Any]:
    """PSNR and SSIM of held-out videos, retrieved: `retrieved.json` and `retrieved.mp4`, true above retrieved, in `folder`.

    Every rank calls it with its share of the videos, and finds the same; the folder is on a disk that they share.

    Args:
        steps: Euler steps.
        at_once: steps of the video that are retrieved together.

    Returns:
        `psnr`, `ssim` and `psnr_bound`, `ssim_bound` of the autoencoder alone, means over the videos; `psnr_copy_last` of
        the last frame, repeated, and `psnr_copy_nearest` of as many true frames, evenly spread and each repeated for those
        around it, as have no more tokens than the memory (one at least); `psnr_by_step`
        from the oldest on, of as many steps as the shortest video has; `tokens` of a memory, and what was done.
    """
    factor = vae.config.temporal_stride
    mine = dict[int, dict[str, Any]]()
    for number, pixels, condition in videos:
        video = whole_groups(pixels, factor, model.config.group)
        true = encoded(model, vae, video)
        made = retrieved(model, true, seed + number, steps, shift, at_once, condition)
        shown: list[np.ndarray[Any, Any]] | None = [] if number < _SHOWN else None
        mine[number] = _compared(model, vae, video, made, true.high, shown)
        mine[number]["tokens"] = model.config.tokens((true.high.shape[2], *true.high.shape[3:]))
        if shown:
            np.save(_shown(folder, number), np.concatenate(shown))
    found = united(mine)
    rows = list(found.values())
    summary: dict[str, Any] = {
        name: float(np.mean([row[name] for row in rows])) for name in FIGURES if name != "tokens"
    }
    each = [row["psnr_by_step"] for row in rows]
    by_step = np.mean([some[: min(map(len, each))] for some in each], axis=0).tolist()
    summary |= {
        "psnr_by_step": by_step,
        "series": {"psnr_by_step": list(enumerate(by_step))},
        "tokens": float(np.mean([row["tokens"] for row in rows])),
        "clips": len(rows),
        "steps": float(np.mean([len(some) for some in each])),
        "memory": model.config.memory,
        "rates": list(model.config.rates),
        "branches": model.config.branches,
        "sample_steps": steps,
        "at_once": at_once,
        "split": "val",
        "seed": seed,
    }
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        (folder / "retrieved.json").write_text(json.dumps({"summary": summary, "clips": rows}, indent=2))
        with video_file(folder / "retrieved.mp4", fps) as write:
            for path in (_shown(folder, number) for number in found if number < _SHOWN):
                write(np.load(path, mmap_mode="r"))
                path.unlink()
    return summary


def _shown(folder: Path, number: int) -> Path:
    """Where a rank leaves the frames of a video for the first one, which puts them into one file."""
    return folder / f"shown-{number}.npy"


def _compared(
    model: MemoryDiT, vae: Codec, video: Tensor, made: Tensor, true: Tensor, shown: list[np.ndarray[Any, Any]] | None
) -> dict[str, Any]:
    """A video against what is decoded of its retrieved steps, and of its true ones; step by step. `shown` gets both."""
    errors: dict[str, list[float]] = {"": [], "_bound": [], "_copy_last": [], "_copy_nearest": []}
    likeness: dict[str, float] = {"": 0.0, "_bound": 0.0}
    begin, sizes = 0, []
    count, kept = video.shape[2], _kept(model, video.shape[2], made.shape)
    for ours, bound in zip(_frames(model, vae, made), _frames(model, vae, true), strict=True):
        source = to_model(video[:, :, begin : begin + ours.shape[2]].to(ours.device))
        nearest = kept[(torch.arange(begin, begin + ours.shape[2])[:, None] - kept).abs().argmin(1)]
        copies = {"_copy_last": torch.full_like(nearest, count - 1), "_copy_nearest": nearest}
        begin += ours.shape[2]
        sizes.append(ours.shape[2])
        made_of = {"": ours, "_bound": bound}
        made_of |= {name: to_model(video[:, :, at].to(ours.device)) for name, at in copies.items()}
        for name, frames in made_of.items():
            errors[name].append(10 ** (-psnr(frames, source).item() / 10))
        for name in likeness:
            likeness[name] += ssim(made_of[name], source).item() * sizes[-1]
        if shown is not None:
            both = torch.cat([to_pixels(source), to_pixels(ours)], dim=3)
            shown.append(both[0].permute(1, 2, 3, 0).cpu().numpy())
    out: dict[str, Any] = {"psnr_by_step": [-10 * math.log10(error) for error in errors[""]]}
    for name, each in errors.items():
        out[f"psnr{name}"] = -10 * math.log10(np.average(each, weights=sizes))
    return out | {f"ssim{name}": sum_ / begin for name, sum_ in likeness.items()}


def _kept(model: MemoryDiT, frames: int, shape: Sequence[int]) -> Tensor:
    """The numbers of as many frames, evenly spread, as the memory of latents of this shape has room for in tokens; one at least."""
    config, (steps, height, width) = model.config, shape[2:]
    count = max(1, config.tokens((steps, height, width)) // (height // config.patch * (width // config.patch)))
    return ((torch.arange(count) + 0.5) * frames / count).long()


@torch.no_grad()
def _frames(model: MemoryDiT, vae: Codec, steps: Tensor) -> Iterator[Tensor]:
    """The frames `(1, 3, t, H, W)` of each step, in [-1, 1]."""
    for frames in vae.decode_stream([model.denormalise(steps)], chunk=1):
        yield frames.float().clamp(-1, 1)
