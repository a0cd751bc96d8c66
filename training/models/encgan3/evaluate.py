"""How well an EncGAN3 has learned: held-out clips reconstructed and exchanged, and long videos of its own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import Loader, to_model
from longtake.training.engines import device
from longtake.training.metrics import swap
from longtake.training.metrics.seams import bends, changes, seams
from longtake.training.metrics.share import batches, mine, place, united
from longtake.training.metrics.trivial import Against, comparisons
from longtake.training.models.common.video import write_panels
from longtake.training.models.encgan3.generated import VideoPlan, generated, write
from longtake.training.models.encgan3.judge import compared
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.encgan3.rollout import Rollout, Start

SUMMARY = "joined.json"

_SHOWN = 3  # of each kind
_PATH = 5  # steps from one movement to another
_AGAINST = (
    Against("reconstruction", "l1", "repeating the reference frame", "l1_copy", "of the range", False),
    Against("reconstruction", "l1", "the same with no movement encoded", "l1_unmoved", "of the range", False),
    Against("content of the one clip of two", "swap_content", "chance", "swap_chance", ""),
    Against("movement of the other clip of two", "swap_movement", "chance", "swap_chance", ""),
)


@torch.no_grad()
def evaluate(
    model: EncGAN3, loader: Loader, folder: Path, *, seed: int, clips: int, swaps: int, plan: VideoPlan
) -> dict[str, Any]:
    """Measure held-out windows and generated videos: figures in `joined.json`, some videos as NAME.mp4, in `folder`.

    Of held-out windows: the figures of `judge.compared`; `l1_copy`, of repeating the reference frame; `l1_unmoved`, with
    z_v = 0; `kl_content` and `kl_movement`, the divergences in nats of a number, near 0 where nothing is encoded;
    `change_heldout`. Of pairs, the shares `swap_content` and `swap_movement` of clips, made of the content of the one and
    the movement of the other, that are nearer to that one by a probe that knows no model (see `metrics.swap`); chance is
    .5. On the way from the one movement to the other `path_movement` is the share of steps in which the amount of change
    goes the same way, and `path_content` how far colours go from where they were, in distances of the two clips. Of videos,
    see `generated.generated`. Every rank of the process group calls it and measures its share.

    Args:
        loader: held-out windows one by one, of a clip or of two that overlap, as in training.
        clips, swaps: how many windows and pairs, at most.

    Raises:
        UserError: too few videos for a distance.
    """
    was = model.training
    model.eval()
    try:
        entries, summary = _windows(model, loader, folder, min(clips, loader.samples))
        more, figures = _swaps(model, loader, folder, swaps)
        entries, summary = entries + more, summary | figures
        entries += _continued(model, loader, folder, plan)
        more, figures = generated(plan, folder)
        figures["series"] |= summary.pop("series")
        summary |= figures | {"split": "val", "seed": seed}
    finally:
        model.train(was)
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        (folder / SUMMARY).write_text(json.dumps({"summary": summary, "videos": more + entries}, indent=2))
    return summary


def _windows(model: EncGAN3, loader: Loader, folder: Path, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Entries of the reconstructions to look at, and figures of all."""
    rows, shown = dict[int, dict[str, Any]](), dict[int, dict[str, Any]]()
    for number, batch in batches(loader, count, "evaluate"):
        video = to_model(batch["video"].to(device()))
        rows[number] = compared(model, video) | _trivial(model, video)
        if number < _SHOWN:
            clip = video[:, :, : model.config.frames]
            again = _made(model, clip, clip)
            shown[number] = {
                "file": f"clip-{number}.mp4",
                "what": "held-out clip, reconstructed",
                "key": batch["key"][0],
            }
            write_panels(folder / shown[number]["file"], [clip, again])
    found = list(united(rows).values())
    curves = {name: torch.tensor([row.pop(name) for row in found]) for name in ("changes", "bends")}
    summary: dict[str, Any] = {name: float(np.mean([row[name] for row in found])) for name in found[0]}
    # where two real clips would meet, by the same measure
    joint = [model.config.joint + 1] if curves["changes"].shape[1] + 1 >= model.config.span else []
    real = seams(curves["changes"], curves["bends"], joint)
    summary |= {"change_heldout": real.change, "clips": len(found)}
    if joint:
        summary |= {"seam_ratio_heldout": real.ratio, "bend_ratio_heldout": real.bend_ratio}
    summary["series"] = {"change_by_frame_heldout": list(enumerate(curves["changes"].mean(0).tolist(), 1))}
    return list(united(shown).values()), summary


def _trivial(model: EncGAN3, video: Tensor) -> dict[str, Any]:
    """Of a window `(1, 3, N, H, W)`: errors of what knows less, what the encoders say, and the curves of the real frames."""
    clip = video[:, :, : model.config.frames]
    frames = clip.transpose(1, 2)
    content, movement = model.encode_content(frames[:, 0]), model.encode_movement(model.differences_of(frames))
    unmoved = model.generate(content.mean, torch.zeros_like(movement.mean), frames[:, 0]).clamp(-1, 1)
    return {
        "l1_copy": float((frames - frames[:, :1]).abs().mean()) / 2,
        "l1_unmoved": float((frames - unmoved).abs().mean()) / 2,
        "kl_content": float(content.kl()),
        "kl_movement": float(movement.kl()),
        "changes": changes(video)[0].tolist(),
        "bends": bends(video)[0].tolist(),
    }


def _made(model: EncGAN3, content: Tensor, movement: Tensor) -> Tensor:
    """A clip `(1, 3, T, H, W)` of the first frame of the one and the movement of the other, by the posteriors' means."""
    first, moving = content[:, :, 0], movement.transpose(1, 2)
    z_v = model.encode_movement(model.differences_of(moving)).mean
    return model.generate(model.encode_content(first).mean, z_v, first).clamp(-1, 1).transpose(1, 2)


def _swaps(model: EncGAN3, loader: Loader, folder: Path, count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Entries of exchanged clips to look at, and how often each part is that of its own clip."""
    total, rows, shown = loader.samples, dict[int, list[float]](), dict[int, dict[str, Any]]()
    if total < 2 or not count:
        return [], {}
    for number in mine(min(count, total), "exchange", "pair"):
        # neighbours are of the same source, mostly
        a, b = (_clip(model, loader, which) for which in (number, (number + total // 2) % total))
        swapped = _made(model, a, b)
        parts = [swap.content(each) for each in (swapped, a, b)], [swap.movement(each) for each in (swapped, b, a)]
        steady, kept = _path(model, a, b)
        rows[number] = [*(float(swap.nearer(*part)) for part in parts), steady, kept]
        if number < _SHOWN:
            shown[number] = {"file": f"swap-{number}.mp4", "what": "content of the first, movement of the second"}
            write_panels(folder / shown[number]["file"], [a, b, swapped])
    table = np.array(list(united(rows).values()))
    names = ("swap_content", "swap_movement", "path_movement", "path_content")
    figures = dict(zip(names, table.mean(0).tolist(), strict=True)) | {"swap_chance": 0.5, "swaps": len(table)}
    return list(united(shown).values()), figures


def _clip(model: EncGAN3, loader: Loader, number: int) -> Tensor:
    """The first clip of a held-out window, `(1, 3, T, H, W)`."""
    return to_model(next(loader.at([number]))["video"].to(device()))[:, :, : model.config.frames]


def _path(model: EncGAN3, a: Tensor, b: Tensor) -> tuple[float, float]:
    """From the movement of a to that of b, with the content of a: the share of even steps, and how far colours go."""
    first = a[:, :, 0]
    begin, end = (model.encode_movement(model.differences_of(each.transpose(1, 2))).mean for each in (a, b))
    z_v = torch.cat([torch.lerp(begin, end, step / (_PATH - 1)) for step in range(_PATH)])
    z_x = model.encode_content(first).mean.expand(_PATH, -1)
    clips = model.generate(z_x, z_v, first.expand(_PATH, -1, -1, -1)).clamp(-1, 1).transpose(1, 2)
    colours = swap.content(clips)
    apart = float((swap.content(a) - swap.content(b)).norm())
    far = float((colours - colours[:1]).norm(dim=1).max())
    return swap.steady(changes(clips).mean(1)[None]), far / max(apart, 1e-6)


def _continued(model: EncGAN3, loader: Loader, folder: Path, plan: VideoPlan) -> list[dict[str, Any]]:
    """Held-out clips that go on, to look at."""
    shown = dict[int, dict[str, Any]]()
    for number in mine(min(_SHOWN, loader.samples), "continue", "video"):
        clip = _clip(model, loader, number)[0].transpose(0, 1)
        rollout = Rollout(model, [plan.seed + number], plan.rollout([plan.seed]).content, start=Start(clip, clip))
        after = torch.cat(list(rollout.pieces(plan.frames)), dim=1)[0]
        shown[number] = {
            "file": f"continued-{number}.mp4",
            "what": f"from frame {len(clip)} on, a held-out clip goes on",
        }
        write(folder / shown[number]["file"], torch.cat([clip, after]).transpose(0, 1).clamp(-1, 1), plan.fps)
    return list(united(shown).values())
