"""The parts of a training stage that `pretrain_memory` and `finetune_memory_prior` share (see `longtake.training.stage`)."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import Loader, to_pixels
from longtake.training import data as common
from longtake.training.engines import device
from longtake.training.models.common.codec import Codec
from longtake.training.models.memory import data
from longtake.training.models.memory.base import begin
from longtake.training.models.memory.config import MemoryConfig
from longtake.training.models.memory.data import Data, data_of
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.history import full_tokens
from longtake.training.objective import Engines, Objective, Terms, Turn

MODEL = "memory_dit"


class Setup(NamedTuple):
    """All that a stage works with; the model has its weights from before the first step."""

    inputs: Mapping[str, str]
    data: Data
    classes: Sequence[str]
    model: MemoryDiT
    codec: Codec


def prepare(config: MemoryConfig, inputs: Mapping[str, str], folder: Path) -> Setup:
    """Read, check and load all of it. Raises as `data_of` and `begin`."""
    known = data_of(config, inputs)
    codec = common.decoder_of(known.made, inputs["vae"])
    labels = {"columns": ("label",), "batch": 1}
    classes = common.loader(config, inputs, "train", **labels).classes if config.classes else []
    return Setup(inputs, known, classes, begin(config, inputs, known, len(classes)).to(device()), codec)


def loader(config: MemoryConfig, setup: Setup, rank: int, world: int) -> Loader:
    """This rank's share of the training segments."""
    share = common.share_of(config, rank, world)
    return data.loader_of(config, setup.inputs, setup.data, setup.model.config, "train", **share)


def heldout_of(config: MemoryConfig, setup: Setup, begin: int | None = None, least: int = 0) -> Loader:
    """See `data.heldout_of`."""
    return data.heldout_of(config, setup.inputs, setup.data, setup.model.config, begin, least)


def objective_of(
    config: MemoryConfig,
    setup: Setup,
    loss: Callable[[Turn], tuple[Tensor, Terms]],
    sample: Callable[[MemoryConfig, Setup, Engines, torch.Generator], dict[str, np.ndarray[Any, Any]]],
) -> Objective:
    """The objective of either stage. Raises UserError where nothing is held out, which would be seen at the end."""
    data.videos_of(config, setup.inputs, setup.data)
    return Objective(
        {"model": setup.model},
        loss,
        sample=partial(sample, config, setup),
        fps=max(1, round(setup.data.fps)),
        tokens=partial(full_tokens, setup.model.config.patch),
        blocks=list(setup.model.blocks()),
        heldout=heldout_of(config, setup),
    )


def announce(config: MemoryConfig, setup: Setup, loader: Loader) -> tuple[list[str], dict[str, float]]:
    """How many tokens stand for how much history, and how much of it there is."""
    lines = [data.told(setup.model.config, setup.data), data.expected(config, setup.data, loader)]
    return lines, {"history_steps_expected": loader.history_mean(setup.data.reach(config, 0))}


def facts_of(config: MemoryConfig, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of either stage's model (see `longtake.training.models.memory.history`)."""
    known, dit, made_of = setup.data, setup.model.config, lineage["inputs"]
    window = {
        "frames": config.frames,
        "steps": known.shape[0],
        "factor": known.made.factor,
        "fps": known.fps,
        "size": list(known.size()),
    }
    return {
        "rates": list(dit.rates) if dit.variant.rated else [],
        "vae": made_of["vae"] | {"encoder": known.made.encoder["digest"]},
        "latents": made_of["latents"],
        "low_latents": made_of["low_latents"] | {"shrink": list(known.low.shrink)} if known.low else None,
        "classes": list(setup.classes),
        "window": window,
        "history": {"seconds": config.history_seconds, "steps": dit.history},
    }


def counts(config: MemoryConfig, setup: Setup) -> dict[str, float]:
    """Clips of the train split that were used, and that were not; and the mean history of a sample."""
    clips = data.loader_of(config, setup.inputs, setup.data, setup.model.config, "train", batch=1)
    return {
        "train_clips": float(clips.samples),
        "train_clips_too_short": float(clips.samples_short),
        "train_clips_without_latents": float(clips.samples_without_latent),
        "train_clips_without_history": float(clips.samples_without_history),
        "history_steps_expected": clips.history_mean(),
    }


def above_each_other(codec: Codec, model: MemoryDiT, before: Tensor, *steps: Tensor) -> np.ndarray[Any, Any]:
    """Latents `(1, C, T, H, W)`, normalised, as one video `(t, height, width, 3)` uint8.

    Each is decoded as what comes after `before`, which begins a video, or is long enough that the decoder does not mind.
    """
    videos = []
    for some in steps:
        chunks = list(codec.decode_stream([model.denormalise(torch.cat([before, some], dim=2))], chunk=1))
        videos.append(torch.cat([to_pixels(chunk) for chunk in chunks[before.shape[2] :]], dim=2))
    return torch.cat(videos, dim=3)[0].permute(1, 2, 3, 0).cpu().numpy()
