"""How well a model fills gaps: the flow's loss in held-out ones, by length, and filled ones beside a cross-fade."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import Loader
from longtake.training.data import on_device
from longtake.training.metrics.reconstruction import psnr
from longtake.training.metrics.share import batches, place, united
from longtake.training.metrics.trivial import Against, comparisons
from longtake.training.models.common.codec import Codec
from longtake.training.models.common.flow import TIMES, clip_rng
from longtake.training.models.common.video import write_panels
from longtake.training.models.mavin import spans as spanning
from longtake.training.models.mavin.encode import frames_of_span
from longtake.training.models.mavin.model import Mavin, fill

SUMMARY = "gaps.json"

_SHOWN = 3
_AGAINST = (
    Against("held-out loss", "heldout_loss", "predicting the mean velocity", "heldout_loss_mean", "", False),
    Against("frame in the middle of a gap", "middle_psnr", "a cross-fade", "middle_psnr_faded"),
)

Hints = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


class Window(NamedTuple):
    """Held-out windows: pixels (B, 3, T, H, W), normalised latents, the gap among them, and what the model is told."""

    video: Tensor
    x0: Tensor
    mask: Tensor
    hints: Hints


@torch.no_grad()
def evaluate(
    model: Mavin,
    codec: Codec,
    loader: Loader,
    window_of: Callable[[dict[str, Any], tuple[int, int]], Window],
    spans: Sequence[tuple[int, int]],
    folder: Path,
    *,
    clips: int,
    videos: int,
    steps: int,
    seed: int,
) -> dict[str, Any]:
    """Measure held-out windows, and fill some: figures in `gaps.json`, some videos as filled-N.mp4, in `folder`.

    `heldout_loss` is the flow's, in gaps of the lengths of `spans`, `heldout_loss_mean` that of the mean velocity;
    `middle_psnr` of the frame in the middle of a filled gap, and `middle_psnr_faded` of a cross-fade's. Series give both by
    the length of the gap in latents. Every rank of the process group calls it and measures its share.
    """
    losses, shown = dict[int, list[list[float]]](), dict[int, list[list[float]]]()
    count = min(max(clips, videos), loader.samples)
    for number, loaded in batches(loader, count, "evaluate"):
        batch = on_device(loaded)
        windows = [window_of(batch, span) for span in spans]
        if number < clips:
            losses[number] = [list(gap_losses(model, window, seed, number)) for window in windows]
        if number < videos:
            filled = [filled_window(model, codec, window, steps, seed + number) for window in windows]
            pairs = zip(windows, filled, spans, strict=True)
            shown[number] = [list(_middle(codec, window.video, made, span)) for window, made, span in pairs]
            if number < _SHOWN:
                panels = [windows[-1].video, filled[-1], faded(codec, windows[-1].video, spans[-1])]
                write_panels(folder / f"filled-{number}.mp4", panels)
    lengths = [end - start for start, end in spans]
    table, middle = (np.array(list(united(part).values())) for part in (losses, shown))
    names = ("heldout_loss", "heldout_loss_mean"), ("middle_psnr", "middle_psnr_faded")
    summary: dict[str, Any] = {"series": {}, "split": "val", "seed": seed, "clips": len(table)}
    for figures, pair in ((table, names[0]), (middle, names[1])):
        for place_, name in enumerate(pair):
            by_length = figures[:, :, place_].mean(0)
            summary[name] = float(by_length.mean())
            summary["series"][f"{name}_by_gap"] = list(zip(lengths, by_length.tolist(), strict=True))
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        rows = [
            {"file": path.name, "what": "held-out window, filled, cross-faded"} for path in sorted(folder.glob("*.mp4"))
        ]
        (folder / SUMMARY).write_text(json.dumps({"summary": summary, "videos": rows}, indent=2))
    return summary


@torch.no_grad()
def gap_losses(
    model: Mavin, window: Window, seed: int, number: int, scale: Tensor | float = 1.0
) -> tuple[float, float]:
    """The flow's loss in the gap of one held-out window, and that of the mean velocity, at times spread evenly over 0..1."""
    x0, mask = window.x0.expand(TIMES, -1, -1, -1, -1), window.mask.expand(TIMES, -1)
    t = (torch.arange(TIMES, device=x0.device) + 0.5) / TIMES
    noise = torch.randn(x0.shape, generator=clip_rng(seed, number)).to(x0.device)
    hints = [None if hint is None else hint.expand(TIMES, *hint.shape[1:]) for hint in window.hints]
    times = spanning.times_of(t, mask, model.config.clean_time)
    velocity = model(spanning.noised(x0, noise, t, mask), times, mask.sum(1), *hints).float()
    each = (spanning.loss(v * scale, x0 * scale, noise * scale, mask) for v in (velocity, torch.zeros_like(velocity)))
    ours, mean = (float(loss.mean()) for loss in each)
    return ours, mean


@torch.no_grad()
def filled_window(model: Mavin, codec: Codec, window: Window, steps: int, seed: int) -> Tensor:
    """Windows (B, 3, T, H, W) with their gap filled; all other frames are those that were given."""
    training = model.training
    model.eval()
    try:
        noise = torch.randn(window.x0.shape, generator=torch.Generator().manual_seed(seed)).to(window.x0.device)
        length = window.mask.sum(1)
        latents = fill(
            lambda x, times: model(x, times, length, *window.hints),
            window.x0,
            noise,
            window.mask,
            steps,
            model.config.clean_time,
        )
    finally:
        model.train(training)
    where = torch.nonzero(window.mask[0]).flatten()
    start, end = int(where[0]), int(where[-1]) + 1
    begin, stop = frames_of_span(codec, start, end)
    # what is made goes on from the clip before it
    joined = model.denormalise(latents[:, :, :end]).to(codec.dtype)
    pixels = torch.cat(list(codec.decode_stream([joined])), dim=2)[:, :, begin:stop]
    return torch.cat(
        [window.video[:, :, :begin], pixels.clamp(-1, 1).to(window.video), window.video[:, :, stop:]], dim=2
    )


def faded(codec: Codec, video: Tensor, span: tuple[int, int]) -> Tensor:
    """Windows (B, 3, T, H, W) with a cross-fade in place of their span."""
    begin, stop = frames_of_span(codec, *span)
    share = (torch.arange(1, stop - begin + 1) / (stop - begin + 1)).to(video)[:, None, None]
    between = torch.lerp(video[:, :, begin - 1 : begin], video[:, :, stop : stop + 1], share)
    return torch.cat([video[:, :, :begin], between, video[:, :, stop:]], dim=2)


def _middle(codec: Codec, video: Tensor, made: Tensor, span: tuple[int, int]) -> tuple[float, float]:
    """PSNR of the frame in the middle of a gap, of what is made and of a cross-fade."""
    middle = sum(frames_of_span(codec, *span)) // 2
    real, *others = (each[:, :, middle : middle + 1] for each in (video, made, faded(codec, video, span)))
    ours, fade = (float(psnr(other, real).mean()) for other in others)
    return ours, fade
