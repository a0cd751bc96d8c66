"""How well a fine-tuned transformer has learned: held-out losses beside those of its base, its adapter tried on a fresh base,
and generated videos.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import Failure
from longtake.datasets.loader import to_model
from longtake.training import checkpoint, data
from longtake.training.data import HELDOUT, on_device
from longtake.training.engines import device
from longtake.training.foreign import adapters
from longtake.training.foreign.backbone import Backbone
from longtake.training.metrics.distance import Sample, heldout_distance
from longtake.training.metrics.features import checked_network
from longtake.training.metrics.share import batches, mine, place, united
from longtake.training.metrics.trivial import Against, comparisons
from longtake.training.models.backbone.base import Setup, opened
from longtake.training.models.backbone.config import Config
from longtake.training.models.backbone.times import grid
from longtake.training.models.common import flow
from longtake.training.models.common.condition import Condition, of_batch
from longtake.training.models.common.flow import TIMES, clip_rng
from longtake.training.models.common.video import video_file

ADAPTER = "adapter"  # folder beside the checkpoints, and name among the run's artifacts
_TRIED = 4  # clips on which the adapter is tried
_ALIKE = 1e-3  # most relative difference of a loss with the adapter from the trained one; bf16 has three digits
_AGAINST = (Against("held-out loss", "heldout_loss", "the base", "heldout_loss_base", "", False),)

Losses = dict[int, list[float]]  # by number of the clip, at each of the `TIMES`


@torch.no_grad()
def losses_of(
    model: Backbone, x0: Tensor, condition: Condition | None, given: Mapping[str, Any], rng: torch.Generator
) -> np.ndarray[Any, Any]:
    """The flow's loss `(TIMES,)` of a clip `(1, C, T, H, W)` at fixed times of the model's range, each with its own noise.

    One time after the other, so that memory holds one window.

    Args:
        given: see `given.given`.
        rng: draws the noise, on the CPU.
    """
    noise = torch.randn(TIMES, *x0.shape[1:], generator=rng).to(x0.device)
    losses = []
    for t, drawn in zip(grid(*model.config.times, x0.device).split(1), noise.split(1), strict=True):
        predicted = model(flow.interpolate(x0, drawn, t), t, condition, **given)
        losses.append(flow.loss(predicted, x0, drawn))
    return torch.cat(losses).cpu().numpy()


def evaluate(config: Config, setup: Setup, folder: Path) -> dict[str, Any]:
    """Measure what has been trained, each rank its share.

    Raises:
        Failure: the adapter is not finite, changes nothing, or does not do on a fresh base what was trained.
    """
    model = setup.model
    trained = _heldout(config, setup, model, config.eval_clips, "evaluate")

    # one of the two is on the device
    model.cpu()
    fresh = opened(setup.inputs["base"], config)[0].eval()
    fresh.config, fresh.empty, fresh.empty_pooled = model.config, model.empty, model.empty_pooled
    base = _heldout(config, setup, fresh.to(device()), config.eval_clips, "evaluate the base")
    summary: dict[str, Any] = {"clips": len(trained), "seed": config.seed, "series": {}}
    for name, losses in (("", trained), ("_base", base)):
        summary[f"heldout_loss{name}"] = float(np.mean(list(losses.values())))
        by_time = np.mean(list(losses.values()), axis=0).tolist()
        summary |= {f"heldout_loss{name}_at_{number}": value for number, value in enumerate(by_time)}
    if config.lora:
        _write_adapter(config, model, folder.parent)
        _try_adapter(config, setup, fresh, folder.parent / ADAPTER, trained, base)
    del fresh
    model.to(device())

    shown: list[dict[str, Any]] = []
    if model.config.expert:
        print("evaluate: no videos, since one expert of two makes none alone", flush=True)
    else:
        shown = _generate(config, setup, folder, summary)
    summary["against"] = comparisons(_AGAINST, summary)
    if place()[0] == 0:
        (folder / "generated.json").write_text(json.dumps({"summary": summary, "videos": shown}, indent=2))
    return summary


def _heldout(config: Config, setup: Setup, model: Backbone, most: int, what: str) -> Losses:
    """The losses of held-out clips over all ranks."""
    heldout = setup.loader(config, "val", **HELDOUT)
    rows: Losses = {}
    for number, loaded in batches(heldout, min(most, heldout.samples), what):
        batch = on_device(loaded)
        x0 = setup.target.given(model, batch)
        losses = losses_of(model, x0, of_batch(batch), setup.given(batch, x0), clip_rng(config.seed, number))
        rows[number] = losses.tolist()
    return united(rows)


def _write_adapter(config: Config, model: Backbone, folder: Path) -> None:
    """Write what a LoRA has learned as an adapter, beside the checkpoints. Raises Failure: it is not finite."""
    if place()[0] == 0:
        assert config.lora
        shutil.rmtree(folder / ADAPTER, ignore_errors=True)
        changes = checkpoint.changes(folder, config)
        adapters.write(folder / ADAPTER, changes, config.lora, model.config.class_name, "peft", model.config.settings)
    # all ranks read it
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def _try_adapter(config: Config, setup: Setup, fresh: Backbone, path: Path, trained: Losses, base: Losses) -> None:
    """Load the written adapter into the base: its losses must be those of the trained model, and not those of the base."""
    adapters.load_into(fresh, adapters.read(path, fresh.config.class_name))
    found = _heldout(config, setup, fresh, min(_TRIED, len(trained)), "try the adapter")
    ours, wanted, before = (np.array([losses[n] for n in found]) for losses in (found, trained, base))
    if not np.allclose(ours, wanted, rtol=_ALIKE, atol=0):
        raise Failure(
            f"{path}: on a fresh base it has a held-out loss of {ours.mean():.6g}, and the trained model one of"
            f" {wanted.mean():.6g}; tell us, and take the merged weights"
        )
    if np.array_equal(ours, before):
        raise Failure(f"{path}: changes nothing of what the base does; train for longer, or with a higher lr")


def video_of(config: Config, setup: Setup, model: Backbone, number: int) -> Tensor:
    """A video `(1, 3, T, H, W)` uint8 by the caption of a held-out clip; with more videos than clips they come again."""
    clips = setup.loader(config, "val", **HELDOUT)
    batch = on_device(next(iter(clips.at([number % clips.samples]))))
    return setup.sampled(config, model, batch, config.seed + number)


def _generate(config: Config, setup: Setup, folder: Path, summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Write generated videos, each rank its share, and compare them with held-out ones if a network is named."""
    network = checked_network(config.features, config.lengths[0], setup.target.size)
    generated = Sample("generated", network) if network else None
    shown, wanted = {}, setup.wanted(config)
    for number in mine(config.eval_videos, "generate", "video"):
        video, seed = video_of(config, setup, setup.model, number), config.seed + number
        file, prompt = f"seed-{seed}.mp4", wanted.words(number)["prompt"]
        with video_file(folder / file, setup.target.fps) as write:
            write(video[0].permute(1, 2, 3, 0).cpu().numpy())
        shown[number] = {"file": file, "seed": seed, "frames": video.shape[2], "prompt": prompt}
        if generated:
            generated.add(to_model(video))
    summary |= {"videos": config.eval_videos, "frames": config.lengths[0], "distance": None}
    if network and generated:
        real = Sample("real", network)
        pixels = {"columns": ("video",), "size": setup.target.size, "frames": config.lengths[0]}
        clips = data.loader(config, setup.inputs, "val", **pixels, **HELDOUT)
        for _, batch in batches(clips, min(config.eval_videos, clips.samples), "compare"):
            real.add(to_model(batch["video"].to(device())))
        distance = heldout_distance(real.of_all_ranks(), generated.of_all_ranks(), config.seed)
        summary |= {"distance": distance, "frechet": distance["frechet"], "kernel": distance["kernel"]}
    return list(united(shown).values())


def keep(config: Config, folder: Path, scratch: Path) -> None:
    """Keep the adapter of a LoRA with the run."""
    if config.lora:
        shutil.copytree(folder / ADAPTER, scratch / ADAPTER)
