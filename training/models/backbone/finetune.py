"""`finetune_backbone`: a video transformer of another library learns a dataset, in full or by LoRA, as a rectified flow.

Latents and texts are columns that were encoded before, by the autoencoder and the text encoder of the base's pipeline. What
the transformer itself wants, from the scale of its times to the padding of its texts, is in `training.foreign.backbone`.
"""

import math
import sys
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader
from longtake.datasets.loader.buckets import Bucket
from longtake.training import data, stage
from longtake.training.data import HELDOUT
from longtake.training.foreign.backbone_config import token_count
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.models.backbone.base import Setup, prepare, settings_of
from longtake.training.models.backbone.config import Config, check
from longtake.training.models.backbone.evaluate import evaluate, keep, video_of
from longtake.training.models.backbone.pipeline import SETTINGS
from longtake.training.models.backbone.times import Times, by_time, described
from longtake.training.models.common import flow
from longtake.training.models.common.condition import of_batch
from longtake.training.models.common.video import grid
from longtake.training.models.generator import plain
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

__all__ = ["Config", "check", "evaluate", "keep", "prepare"]  # the stage's parts from other files

VERSION = 1
PRODUCES = "model"
MODEL = "backbone"
SUMMARY = "generated.json"

_SAMPLED = 2  # videos in a sample during training


def outside(config: Config) -> str:
    """Changes with the feature network."""
    return digest_of(config.features)


def loader(config: Config, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's share of the training windows.

    Raises:
        UserError: a window has more tokens than `max_tokens`.
    """
    share = data.share_of(config, rank, world)
    bound = config.max_tokens and config.max_tokens * world * math.prod(setup.model.config.patch)
    return setup.loader(config, "train", positions=bound, last="pad", **share)


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss, with videos of the captions of the first held-out clips as samples.

    Raises:
        UserError: no clip is held out; the network `features` does not take such videos.
    """
    checked_network(config.features, config.lengths[0], setup.target.size)
    heldout = setup.loader(config, "val", **HELDOUT)
    if not heldout.samples:
        raise UserError("dataset: its val split has no clip for the evaluation; raise val_fraction")
    world = torch.distributed.get_world_size()
    return Objective(
        {"model": setup.model},
        partial(_loss, config, setup),
        # one expert of two makes no video
        sample=None if config.expert else partial(_sample, config, setup),
        prompts=setup.wanted(config).prompts(_SAMPLED),
        fps=max(1, round(setup.target.fps)),
        tokens=partial(_tokens, setup),
        blocks=list(setup.model.blocks()),
        heldout=heldout,
        largest=partial(_largest, setup, loader(config, setup, torch.distributed.get_rank(), world)),
    )


def _loss(config: Config, setup: Setup, turn: Turn) -> tuple[Tensor, Terms]:
    model, batch, rng = setup.model, turn.batch, turn.rng
    x0 = setup.target.given(model, batch, rng)
    times = times_of(config, setup, tuple(x0.shape[2:]))
    drawn = times.draw(len(x0), rng, x0.device)
    t, counted = drawn, None
    if setup.holds:
        clean = torch.rand(len(x0), generator=rng, device=x0.device) < setup.image_share
        counted = flow.noised_frames(clean.long(), x0.shape[2])
        t = drawn[:, None] * counted
    noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    velocity = turn.engines[turn.name](
        flow.interpolate(x0, noise, t), t, of_batch(batch), rng, **setup.given(batch, x0)
    )
    losses = flow.loss(velocity, x0, noise, counted)
    loss = losses.mean()
    return loss, {"loss": loss.detach(), **by_time(drawn, losses.detach(), times.low, times.high)}


def times_of(config: Config, setup: Setup, shape: tuple[int, ...]) -> Times:
    """How times of windows of latents (T, H, W) are drawn."""
    shift = config.shift or setup.model.shift_of((shape[0], shape[1], shape[2]))
    return Times(config.time_mean, config.time_std, shift, *setup.model.config.times)


def _sample(config: Config, setup: Setup, engines: Engines, rng: torch.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """A grid of videos, always of the same seeds and texts."""
    clips = [video_of(config, setup, engines["model"].module, number) for number in range(_SAMPLED)]
    return {"generated": grid(torch.cat(clips).permute(0, 2, 3, 4, 1).cpu().numpy())}


def _tokens(setup: Setup, batch: Batch) -> int:
    frames, height, width = batch["latent"].shape[-3:]
    return len(batch["key"]) * token_count((frames, height, width), setup.model.config.patch)


def _shape(setup: Setup, bucket: Bucket) -> tuple[int, int, int]:
    """Latents (T, H, W) of the windows of a bucket."""
    return 1 + (bucket.window.frames - 1) // setup.target.record.factor, *bucket.latent


def _largest(setup: Setup, train: Loader) -> Batch:
    """The batch of a rank that has the most positions, with texts as long as they may be."""
    bucket = max(train.buckets, key=lambda bucket: bucket.batch * math.prod(_shape(setup, bucket)))
    return setup.filled(bucket, bucket.batch // train.world)


def announce(config: Config, setup: Setup, loader: Loader) -> tuple[list[str], dict[str, float]]:
    """What batches there are, and the times that the largest window gets."""
    patch, shapes = setup.model.config.patch, {_shape(setup, bucket): bucket for bucket in loader.buckets}
    lines = [
        f"windows of {t}x{h}x{w} latents, {token_count((t, h, w), patch):,} tokens: {bucket.samples} clips,"
        f" {bucket.batch // loader.world} in a pass of a process"
        for (t, h, w), bucket in sorted(shapes.items())
    ]
    times = times_of(config, setup, max(shapes, key=math.prod))
    parts = described(times.shares())
    lines.append(
        f"times: shift {times.shift:.3g}; of each eighth from {times.low:g} (data) to {times.high:g} (noise): {parts}"
    )
    return lines, {}


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of config.json: autoencoder, latents, texts, window, sampling, and what it was made of."""
    target, origins = setup.target, lineage["inputs"]
    settings = settings_of(config, setup.model, target.shape)
    return {
        "vae": origins["vae"] | {"encoder": target.record.encoder["digest"]},
        "latents": origins["latents"],
        "text": data.text_facts(setup.text, origins["text"]),
        "pooled": data.text_facts(setup.pooled, origins.get("pooled")),
        "classes": [],
        "window": {"frames": config.lengths[0], "stride": 1, "size": list(target.size), "fps": target.fps},
        "sampling": plain(settings, SETTINGS),
        "base": origins["base"],
        "expert": config.expert,
    }


def counts(config: Config, setup: Setup) -> dict[str, float]:
    """Clips of the train split: used, too short, without latents, and without captions."""
    clips = setup.loader(config, "train", batch=1)
    return {
        "train_clips": float(clips.samples),
        "train_clips_too_short": float(clips.samples_short),
        "train_clips_without_latents": float(clips.samples_without_latent),
        **data.text_counts(setup.inputs, setup.text),
    }


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)
