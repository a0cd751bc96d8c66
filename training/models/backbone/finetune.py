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
from longtake.training import data, sizes, stage
from longtake.training.data import HELDOUT
from longtake.training.fit import Largest, Source, made_by
from longtake.training.foreign.backbone import Backbone
from longtake.training.foreign.backbone_config import BackboneConfig, token_count
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.models.backbone.base import Setup, image_share, prepare, settings_of
from longtake.training.models.backbone.config import Config, check
from longtake.training.models.backbone.evaluate import evaluate, keep, video_of
from longtake.training.models.backbone.pipeline import SETTINGS
from longtake.training.models.backbone.times import Times, by_time, described
from longtake.training.models.common import flow
from longtake.training.models.common.condition import of_batch
from longtake.training.models.common.video import grid
from longtake.training.models.generator import plain
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn
from longtake.training.target import LatentTarget

__all__ = ["Config", "check", "evaluate", "keep", "prepare"]  # the stage's parts from other files

VERSION = 1
PRODUCES = "model"
MODEL = "backbone"
SUMMARY = "generated.json"

_SAMPLED = 2  # videos in a sample during training

Shape = tuple[int, int, int]  # of a window of latents: (T, H, W)


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


def model_of(config: Config, inputs: Mapping[str, Source]) -> BackboneConfig:
    """See `training.fit`."""
    base: BackboneConfig = made_by(inputs["base"], "transformer", config.expert)
    shape = _window(config, inputs, config.lengths[0]).shape
    changes = {"shape": shape, "text_dropout": config.text_dropout, "text_length": base.longest_text}
    changes |= {"activation_checkpointing": config.activation_checkpointing, "text_empty": max(1, base.text_empty)}
    return base.model_copy(update=changes)


def _window(config: Config, inputs: Mapping[str, Source], frames: int) -> sizes.Window:
    return sizes.window_of(config.model_copy(update={"frames": frames}), inputs)


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`: of each length as many windows as `max_tokens` allows, with texts as long as the model takes."""
    planned = model_of(config, inputs)
    windows = {window.shape: window for window in (_window(config, inputs, frames) for frames in config.lengths)}
    counts = {shape: _fitting(config, token_count(shape, planned.patch), count) for shape in windows}
    shape = _most_positions(counts)
    window, count = windows[shape], counts[shape]
    assert window.encoder
    model, others = Backbone(planned).train(), sizes.beside(config, window.encoder)
    target = LatentTarget(None, window.channels, shape, 1.0, others[0], config.posterior, config.clip_starts)  # type: ignore[arg-type]
    nothing: Any = None
    setup = Setup({}, target, nothing, None, model, {}, image_share(config.base, model, config))
    batch = window.batch(count) | {"start": torch.zeros(count, dtype=torch.long)}
    widths = {"text": planned.text_width, "pooled": planned.sizes.pooled_width}
    for name, width in widths.items():
        if width:
            batch[name] = torch.zeros(count, planned.longest_text, width, dtype=torch.bfloat16)
            batch[f"{name}_mask"] = torch.ones(count, planned.longest_text, dtype=torch.bool)
    return Largest(Objective({"model": model}, partial(_loss, config, setup)), batch, others)


def _sample(config: Config, setup: Setup, engines: Engines, rng: torch.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """A grid of videos, always of the same seeds and texts."""
    clips = [video_of(config, setup, engines["model"].module, number) for number in range(_SAMPLED)]
    return {"generated": grid(torch.cat(clips).permute(0, 2, 3, 4, 1).cpu().numpy())}


def _tokens(setup: Setup, batch: Batch) -> int:
    frames, height, width = batch["latent"].shape[-3:]
    return len(batch["key"]) * token_count((frames, height, width), setup.model.config.patch)


def _shape(setup: Setup, bucket: Bucket) -> Shape:
    """Latents (T, H, W) of the windows of a bucket."""
    return 1 + (bucket.window.frames - 1) // setup.target.record.factor, *bucket.latent


def _fitting(config: Config, tokens: int, count: int) -> int:
    """How many of `count` windows of so many tokens `max_tokens` allows in a pass. UserError where it is none."""
    if config.max_tokens is None:
        return count
    if config.max_tokens < tokens:
        raise UserError(
            f"max_tokens: {config.max_tokens} hold no window of {tokens} tokens; raise it, or lower `frames`"
        )
    return min(count, config.max_tokens // tokens)


def _most_positions(passes: Mapping[Shape, int]) -> Shape:
    """Of so many windows of each shape in a pass the shape whose pass is the largest."""
    return max(passes, key=lambda shape: passes[shape] * math.prod(shape))


def _largest(setup: Setup, train: Loader) -> Batch:
    """The batch of a rank that has the most positions, with texts as long as they may be."""
    buckets = {_shape(setup, bucket): bucket for bucket in train.buckets}
    bucket = buckets[_most_positions({shape: bucket.batch for shape, bucket in buckets.items()})]
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
        "latents": data.latents_facts(target.record, origins),
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
    used = data.clip_counts(clips, without_latents=clips.samples_without_latent)
    return used | data.text_counts(setup.inputs, setup.text)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)
