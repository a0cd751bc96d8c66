"""`pretrain_memory`: a memory of video learned by retrieval of frames (arXiv 2512.23851, stage I).

Some random latents of a history are to be retrieved. They stay clean, noise masks all others, and the memory is made of
the result; the transformer then denoises these latents at their true times from the memory alone. A memory that can do so
for any latents must hold all of them. Here the history includes the segment that ends it.
"""

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor

from longtake.datasets.loader.streams import Lengths
from longtake.datasets.stage import Input
from longtake.training import stage
from longtake.training.data import on_device
from longtake.training.fit import Largest, Source
from longtake.training.metrics.share import batches
from longtake.training.models.common import flow
from longtake.training.models.common.condition import of_batch
from longtake.training.models.memory import retrieval
from longtake.training.models.memory.base_foreign import with_lora
from longtake.training.models.memory.config import MemoryConfig, check
from longtake.training.models.memory.data import Setup, heldout_of, videos_of
from longtake.training.models.memory.history import groups_of, history_lengths, memory_of
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.models.memory.retrieval import Video, retrieve
from longtake.training.models.memory.shared import (
    MODEL,
    above_each_other,
    announce,
    counts,
    facts_of,
    kind,
    largest_of,
    loader,
    model_of,
    objective_of,
    prepare,
    resolved,
    shift_of,
)
from longtake.training.models.memory.stretch import Stretch, draw_omega, gather_latents, mask, noise_like
from longtake.training.models.memory.variants import VARIANTS
from longtake.training.objective import Engines, Objective, Terms, Turn

__all__ = [
    "MODEL",
    "announce",
    "check",
    "counts",
    "kind",
    "loader",
    "model_of",
    "prepare",
    "resolved",
]  # the stage's functions from other files

VERSION = 2
PRODUCES = "model"
SUMMARY = "retrieved.json"


class Config(MemoryConfig):
    """Train a memory_dit to retrieve frames of its history, and register it.

    The paper adapts a pretrained transformer: `base`, with `lora: {rank: 128, full: ["memory"]}`; what is new, such as
    cross-attention, learns in full too. MemoryConfig marks the assumptions.

    text        for a base of another library, which attends to texts: of the dataset's captions, of which only the states of
                "" are taken, as the text of all that is retrieved
    history     what the memory is made of: masked by noise, or clean as in the paper's v1 to v3
    retrieved   latents to retrieve at once: 1 to this many [assumption]
    mask_mean   of the masks' logit-normal levels [paper: L(0.2, 1)]
    mask_std    of the masks' logit-normal levels [paper: L(0.2, 1)]
    """

    kind: Literal["pretrain_memory"]
    text: Annotated[str, Input("text")] | None = None
    history: Literal["masked", "clean"] = "masked"
    retrieved: int = Field(4, ge=1)
    mask_mean: float = 0.2
    mask_std: float = Field(1.0, gt=0)

    def fewest(self, dit: MemoryModelConfig) -> int:
        """As many as fill a group of the memory together with the segment."""
        assert dit.shape
        return max(0, dit.group - dit.shape[0])

    def histories(self, dit: MemoryModelConfig, least: int) -> Lengths:
        """The lengths that occur in generation, and none, as far as history and segment fill a group of the memory."""
        lengths = history_lengths(dit, 0.0, least)
        counts = tuple(count for count in (0, *lengths.some) if count >= self.fewest(dit))
        return replace(lengths, some=counts, least=max(least, counts[0]))

    @model_validator(mode="after")
    def _remembers(self) -> "Config":
        if self.text is not None and self.base is None:
            raise ValueError("text: is for a base of another library; name one, or leave it out")
        if VARIANTS[(self.model or {}).get("memory", "encoder")].empty:
            raise ValueError("model: memory none has nothing to retrieve from; choose encoder, patchify or framepack")
        return self


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss of the latents to retrieve; a held-out segment, retrieved, as a sample."""
    return objective_of(config, setup, partial(_loss, config, setup.model), _sample)


def _loss(config: Config, model: MemoryModel, turn: Turn) -> tuple[Tensor, Terms]:
    batch, rng = turn.batch, turn.rng
    stretch, count = groups_of(batch, model, config.posterior, rng), len(batch["key"])
    omega = draw_omega(count, stretch.high.shape[2], config.retrieved, rng, stretch.skip)
    remembered = stretch if config.history == "clean" else masked(config, stretch, omega, rng)
    x0, first = gather_latents(stretch.high, omega), stretch.first.gather(1, omega)
    t = flow.sample_t(count, config.time_mean, config.time_std, shift_of(config, model), rng, x0.device)
    noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    x = flow.interpolate(x0, noise, t)
    velocity = turn.engines[turn.name](x, t, stretch.start + omega, remembered, of_batch(batch), rng, first)
    loss = flow.loss(velocity, x0, noise).mean()
    terms = {"loss": loss.detach(), "history_steps": batch["history_steps"].float().mean()}
    return loss, terms | {"retrieved": loss.new_full((), float(omega.shape[1]))}


def masked(config: Config, stretch: Stretch, omega: Tensor, rng: torch.Generator) -> Stretch:
    """What the memory is made of: every latent outside of Ω has noise of its own level."""
    batch, _, count = stretch.high.shape[:3]
    sigma = flow.sample_t(batch * count, config.mask_mean, config.mask_std, 1.0, rng, stretch.high.device)
    return mask(stretch, omega, sigma.view(batch, count), noise_like(stretch, rng))


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`."""
    return largest_of(config, inputs, count, _loss)


@torch.no_grad()
def _sample(config: Any, setup: Setup, engines: Engines, rng: torch.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """A held-out segment and, below it, the same frames retrieved from the memory of it and its history."""
    model, length = engines["model"].module, setup.data.shape[0]
    batch = on_device(next(iter(heldout_of(config, setup))))
    stretch = groups_of(batch, model)
    before, true = stretch.high[:, :, :-length], stretch.high[:, :, -length:]
    end = stretch.start + stretch.high.shape[2]
    latents = retrieve(
        model,
        memory_of(model, stretch),
        range(end - true.shape[2], end),
        (true.shape[3], true.shape[4]),
        torch.Generator().manual_seed(config.seed),
        config.sample_steps,
        shift_of(config, model),
        of_batch(batch),
        config.retrieved,
        stretch.start if bool(stretch.first[0, 0]) else None,
    )
    return {"retrieved": above_each_other(setup.codec, model, before, true, latents)}


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the model (see `shared.facts_of`)."""
    sampling = {"steps": config.sample_steps, "guidance": 1.0, "shift": shift_of(config, setup.model)}
    return facts_of(config, setup, lineage) | {
        "stage": "retrieval",
        "sampling": sampling,
        "retrieved": config.retrieved,
    }


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], with_lora(config, inputs), inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> None:
    """Retrieve held-out clips and measure them; each rank takes its share."""
    clips = videos_of(config, setup)
    shares = batches(clips, min(config.eval_clips, clips.samples), "retrieve")
    retrieval.evaluate(
        setup.model,
        setup.codec,
        (Video.of_batch(number, batch) for number, batch in shares),
        folder,
        fps=setup.data.fps,
        seed=config.seed,
        solver_steps=config.sample_steps,
        shift=shift_of(config, setup.model),
        at_once=config.retrieved,
    )
