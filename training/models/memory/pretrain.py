"""`pretrain_memory`: a memory of video learned by retrieval of frames (arXiv 2512.23851, stage I).

Of a history, some random steps are to be retrieved: they stay clean, noise masks all others, the memory is made of that,
and the transformer denoises those steps at their true times from the memory alone. A memory that can do so for any steps
must hold all of them. The history is what came before a segment in its stream, and the segment itself.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from longtake.datasets.loader.streams import Lengths
from longtake.training import stage
from longtake.training.data import on_device
from longtake.training.metrics.share import batches
from longtake.training.models.common import flow
from longtake.training.models.common.condition import of_batch
from longtake.training.models.memory import retrieval
from longtake.training.models.memory.config import MemoryConfig, check
from longtake.training.models.memory.data import videos_of
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.history import (
    draw_omega,
    lengths_of,
    mask,
    noise_like,
    remembered,
    retrieve,
    steps_of,
    whole_of,
    with_history,
)
from longtake.training.models.memory.latents import Steps, picked
from longtake.training.models.memory.retrieval import Video
from longtake.training.models.memory.shared import (
    MODEL,
    Setup,
    above_each_other,
    announce,
    counts,
    facts_of,
    heldout_of,
    loader,
    objective_of,
    prepare,
)
from longtake.training.models.memory.variants import VARIANTS
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

__all__ = ["MODEL", "announce", "check", "counts", "loader", "prepare"]  # of the stage, beside what is here

VERSION = 2
PRODUCES = "model"
SUMMARY = "retrieved.json"


class Config(MemoryConfig):
    """Train a memory_dit to retrieve frames of its history, and register it.

    The paper adapts a pretrained transformer: `base`, with `lora: {rank: 128, full: ["memory"]}`; new cross-attention
    learns in full too. See MemoryConfig for what is an assumption.

    history     what the memory is made of; clean is that of the paper's v1 to v3
    retrieved   latents that are retrieved at once: 1 to this many [assumption]
    mask_mean   of the masks' logit-normal levels [paper: L(0.2, 1)]
    mask_std    of the masks' logit-normal levels [paper: L(0.2, 1)]
    """

    kind: Literal["pretrain_memory"]
    history: Literal["masked", "clean"] = "masked"
    retrieved: int = Field(4, ge=1)
    mask_mean: float = 0.2
    mask_std: float = Field(1.0, gt=0)

    def histories(self, dit: MemoryDiTConfig, least: int) -> Lengths:
        """Those of generation, and none: but for those that make no token of the memory with the segment."""
        assert dit.shape
        made = lengths_of(dit, 0.0, least)
        some = tuple(begin for begin in (0, *made.some) if begin + dit.shape[0] >= dit.group)
        return replace(made, some=some, least=max(least, some[0]))

    @model_validator(mode="after")
    def _remembers(self) -> "Config":
        if VARIANTS[(self.model or {}).get("memory", "encoder")].empty:
            raise ValueError("model: memory none has nothing to retrieve from; choose encoder, patchify or framepack")
        return self


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss of the latents to retrieve; and retrieved ones of a held-out clip as a sample."""
    return objective_of(config, setup, partial(_loss, config, setup.model), _sample)


def _loss(config: Config, model: MemoryDiT, turn: Turn) -> tuple[Tensor, Terms]:
    batch, rng = turn.batch, turn.rng
    steps = remembered_steps(batch, model, config.posterior, rng)
    count = len(batch["key"])
    omega = draw_omega(count, steps.high.shape[2], config.retrieved, rng, steps.skip)
    seen = steps if config.history == "clean" else masked(config, steps, omega, rng)
    x0 = picked(steps.high, omega)
    t = flow.sample_t(count, config.time_mean, config.time_std, config.shift, rng, x0.device)
    noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    first = steps.first.gather(1, omega)
    x = flow.interpolate(x0, noise, t)
    velocity = turn.engines[turn.name](x, t, steps.start + omega, seen, of_batch(batch), rng, first)
    loss = flow.loss(velocity, x0, noise).mean()
    terms = {"loss": loss.detach(), "history_steps": batch["history_steps"].float().mean()}
    return loss, terms | {"retrieved": loss.new_tensor(float(omega.shape[1]))}


def remembered_steps(
    batch: Batch,
    model: MemoryDiT,
    posterior: Literal["sample", "mean"] = "mean",
    rng: torch.Generator | None = None,
) -> Steps:
    """The history and the segment of each sample, in whole groups."""
    room, segment = batch["history_latent"].shape[3], batch["latent"].shape[3]
    steps = steps_of(batch, model, room, posterior, rng)
    return whole_of(steps, batch["stream_step"] + segment, model.config)


def masked(config: Config, steps: Steps, omega: Tensor, rng: torch.Generator) -> Steps:
    """What the memory is made of: every step outside of Ω at a level of noise of its own."""
    batch, _, count = steps.high.shape[:3]
    sigma = flow.sample_t(batch * count, config.mask_mean, config.mask_std, 1.0, rng, steps.high.device)
    return mask(steps, omega, sigma.view(batch, count), noise_like(steps, rng))


@torch.no_grad()
def _sample(config: Any, setup: Setup, engines: Engines, rng: torch.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """A held-out segment and, below it, the same frames retrieved from the memory of it and its history."""
    model, length = engines["model"].module, setup.data.shape[0]
    batch = on_device(next(iter(heldout_of(config, setup))))
    steps = remembered_steps(batch, model)
    total = steps.high.shape[2]
    times = [steps.start + n for n in range(max(0, total - length), total)]
    memory = remembered(model, steps)
    first = steps.start if bool(steps.first[0, 0]) else None
    draws = torch.Generator().manual_seed(config.seed)
    shape = (steps.high.shape[3], steps.high.shape[4])
    passes, at_once = config.sample_steps, config.retrieved
    made = retrieve(model, memory, times, shape, draws, passes, config.shift, of_batch(batch), at_once, first)
    before, true = steps.high.split([total - len(times), len(times)], dim=2)
    return {"retrieved": above_each_other(setup.codec, model, before, true, made)}


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the model (see `longtake.training.models.memory.history`)."""
    sampling = {"steps": config.sample_steps, "guidance": 1.0, "shift": config.shift}
    return facts_of(config, setup, lineage) | {"stage": "retrieval", "sampling": sampling}


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> None:
    """Retrieve held-out clips, each rank its share."""
    clips = videos_of(config, setup.inputs, setup.data)
    shares = batches(clips, min(config.eval_clips, clips.samples), "retrieve")
    retrieval.evaluate(
        setup.model,
        setup.codec,
        (Video(number, with_history(batch), of_batch(batch)) for number, batch in shares),
        folder,
        fps=setup.data.fps,
        seed=config.seed,
        steps=config.sample_steps,
        shift=config.shift,
        at_once=config.retrieved,
    )
