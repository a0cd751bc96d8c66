"""`pretrain_memory`: a memory of video learned by retrieval of frames (arXiv 2512.23851, stage I).

Of a history, some random steps are to be retrieved: they stay clean, noise masks all others, the memory is made of that,
and the transformer denoises those steps at their true times from the memory alone. A memory that can do so for any steps
must hold all of them. The history is what came before a segment in its stream, and the segment itself.
"""

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
from longtake.datasets.stage import StageConfig
from longtake.training.loop import Batch, Engines, Objective
from longtake.training.metrics.share import batches
from longtake.training.models.common import flow
from longtake.training.models.memory import retrieval
from longtake.training.models.memory import shared as memory_stage
from longtake.training.models.memory.dit import MemoryDiTConfig
from longtake.training.models.memory.history import (
    Remembering,
    Steps,
    draw_omega,
    full_tokens,
    lengths_of,
    mask,
    noise_like,
    picked,
    remembered,
    retrieve,
    steps_of,
    whole_of,
    with_history,
)
from longtake.training.models.memory.retrieval import Video
from longtake.training.models.memory.shared import MemoryConfig, Setup, heldout_of, videos_of

VERSION = 2
PRODUCES = "model"


class Config(MemoryConfig):
    """Train a memory_dit to retrieve frames of its history, and register it.

    The paper adapts a pretrained transformer: `base`, with `lora: {rank: 128, full: ["memory"]}`; new cross-attention
    learns in full too. See MemoryConfig for what is an assumption.
    """

    kind: Literal["pretrain_memory"]
    history: Literal["masked", "clean"] = "masked"  # what the memory is made of; clean is that of the paper's v1 to v3
    retrieved: int = Field(4, ge=1)  # steps at once, 1 to this many [assumption]
    mask_mean: float = 0.2  # of the masks' logit-normal levels [paper: L(0.2, 1)]
    mask_std: float = Field(1.0, gt=0)  # likewise

    def histories(self, dit: MemoryDiTConfig, least: int) -> Lengths:
        """Those of generation, and none: but for those that make no token of the memory with the segment."""
        assert dit.shape
        made = lengths_of(dit, 0.0, least)
        some = tuple(begin for begin in (0, *made.some) if begin + dit.shape[0] >= dit.group)
        return replace(made, some=some, least=max(least, some[0]))

    @model_validator(mode="after")
    def _remembers(self) -> "Config":
        if (self.model or {}).get("memory") == "none":
            raise ValueError("model: memory none has nothing to retrieve from; choose encoder, patchify or framepack")
        return self


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    memory_stage.check(config, inputs)


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss of the steps to retrieve; and retrieved steps of a held-out clip as a sample."""
    return Objective(
        {"generator": setup.model},
        partial(_loss, config, setup.model),
        sample=partial(_sample, config, setup),
        fps=max(1, round(setup.data.fps)),
        tokens=partial(full_tokens, setup.model.config.patch),
        blocks=list(setup.model.blocks()),
    )


def _loss(
    config: Config,
    model: Remembering,
    name: str,
    engines: Engines,
    batch: Batch,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    steps = remembered_steps(batch, model, config.posterior, generator)
    count = len(batch["key"])
    omega = draw_omega(count, steps.high.shape[2], config.retrieved, generator, steps.skip)
    seen = steps if config.history == "clean" else masked(config, steps, omega, generator)
    x0 = picked(steps.high, omega)
    t = flow.sample_t(count, config.time_mean, config.time_std, config.shift, generator, x0.device)
    noise = torch.randn(x0.shape, generator=generator, device=x0.device)
    ids = batch["label"].cpu() if config.classes else None
    first = steps.first.gather(1, omega)
    velocity = engines[name](flow.interpolate(x0, noise, t), t, steps.start + omega, seen, ids, generator, first)
    loss = flow.loss(velocity, x0, noise).mean()
    logged = {"loss": loss.detach(), "history_steps": batch["history_steps"].float().mean()}
    return loss, logged | {"retrieved": loss.new_tensor(float(omega.shape[1]))}


def remembered_steps(
    batch: Batch,
    model: Remembering,
    posterior: Literal["sample", "mean"] = "mean",
    generator: torch.Generator | None = None,
) -> Steps:
    """The history and the segment of each sample, in whole groups."""
    room, segment = batch["history_latent"].shape[3], batch["latent"].shape[3]
    steps = steps_of(batch, model, room, posterior, generator)
    return whole_of(steps, batch["stream_step"] + segment, model.config)


def masked(config: Config, steps: Steps, omega: Tensor, generator: torch.Generator) -> Steps:
    """What the memory is made of: every step outside of Ω at a level of noise of its own."""
    batch, _, count = steps.high.shape[:3]
    sigma = flow.sample_t(batch * count, config.mask_mean, config.mask_std, 1.0, generator, steps.high.device)
    return mask(steps, omega, sigma.view(batch, count), noise_like(steps, generator))


@torch.no_grad()
def _sample(
    config: Config, setup: Setup, engines: Engines, generator: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """Of a held-out clip: its segment, and below it what the memory of it and its history holds of it."""
    model, length = engines["generator"].module, setup.data.shape[0]
    batch = memory_stage.on_device(next(iter(heldout_of(config, setup))))
    steps = remembered_steps(batch, model)
    total = steps.high.shape[2]
    times = [steps.start + n for n in range(max(0, total - length), total)]
    memory = remembered(model, steps)
    first = steps.start if bool(steps.first[0, 0]) else None
    draws = torch.Generator().manual_seed(config.seed)
    ids = batch["label"].cpu() if config.classes else None
    shape = (steps.high.shape[3], steps.high.shape[4])
    made = retrieve(model, memory, times, shape, draws, config.sample_steps, config.shift, ids, config.retrieved, first)
    before, true = steps.high.split([total - len(times), len(times)], dim=2)
    return {"retrieved": memory_stage.above_each_other(setup.vae, model, before, true, made)}


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """What each rank does: train from the latest checkpoint in `folder`, leave the last one there, and measure it."""
    memory_stage.work(config, inputs, folder, partial(objective, config), partial(_evaluate, config))


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Train from the latest checkpoint, retrieve held-out clips, log and register the model, make it champion.

    Raises:
        UserError: no usable sample; latents, models or histories that do not fit; a workspace for no checkpoints.
        Failure, Interrupted: of the loop.
    """
    facts = {"stage": "retrieval", "sampling": {"steps": config.sample_steps, "guidance": 1.0, "shift": config.shift}}
    return memory_stage.run(__name__, config, inputs, output, facts, "retrieved.json")


def _evaluate(config: Config, setup: Setup, folder: Path) -> None:
    loader = videos_of(config, setup.inputs, setup.data)
    shares = batches(loader, min(config.eval_clips, loader.samples), "retrieve")
    retrieval.evaluate(
        setup.model,
        setup.vae,
        (Video(number, with_history(batch), batch.get("label")) for number, batch in shares),
        folder,
        fps=setup.data.fps,
        seed=config.seed,
        steps=config.sample_steps,
        shift=config.shift,
        at_once=config.retrieved,
    )
