"""`finetune_memory_prior`: a transformer that goes on from a history, which it sees through a memory (arXiv 2512.23851, stage II).

It learns to denoise a segment of a video, given a memory of all that came before and, clean beside it, the last steps.
With `base` a model of `pretrain_memory` is taught to do so; with `model: {memory: none}` there are the last steps alone.
"""

import hashlib
from collections.abc import Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from longtake.datasets.stage import StageConfig
from longtake.training import flow, memory_stage
from longtake.training.engines import device
from longtake.training.history import (
    Given,
    Remembering,
    agreed,
    draw_late,
    full_tokens,
    given_of,
    steps_of,
    true_steps,
    with_history,
)
from longtake.training.loop import Batch, Engines, Objective
from longtake.training.memory_stage import Data, MemoryConfig, Setup, heldout_of, on_device, videos_of
from longtake.training.metrics import continuation
from longtake.training.metrics.features import load_network, read_file
from longtake.training.sampling import Settings

VERSION = 2
PRODUCES = "model"


class Config(MemoryConfig):
    """Train a memory_dit to go on from its history, and register it. See MemoryConfig for what is an assumption.

    With a base: `lora` trains a new adaptation, `lora.full: ["memory"]` the memory with it, `freeze: ["memory"]` neither.
    """

    kind: Literal["finetune_memory_prior"]
    no_history: float = Field(
        0.1, ge=0, le=1
    )  # probability that a pass has none, as at the start of a video [assumption]
    history_curriculum: tuple[tuple[int, float], ...] = ()  # [step, seconds] from when on, e.g. [[0, 5], [20000, 20]]
    guidance: float = Field(1.0, ge=0)  # of samples with a class; 1 is none [assumption]
    eval_videos: int = Field(4, ge=1)  # held-out videos that are gone on with at the end
    eval_segments: int = Field(3, ge=1)  # by so many segments
    features: str | None = (
        None  # a feature network (see training.metrics.features); without one no distance is measured
    )

    @field_validator("history_curriculum")
    @classmethod
    def _rises(cls, curriculum: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        begins = [step for step, _ in curriculum]
        if begins and (begins[0] != 0 or begins != sorted(set(begins)) or min(s for _, s in curriculum) < 0):
            raise ValueError(
                "needs [step, seconds] from step 0 on, in order, seconds not negative, e.g. [[0, 5], [20000, 20]]"
            )
        return curriculum

    @model_validator(mode="after")
    def _within(self) -> "Config":
        if longer := [seconds for _, seconds in self.history_curriculum if seconds > self.history_seconds]:
            raise ValueError(
                f"history_curriculum: {longer[0]:g} s are more than history_seconds, {self.history_seconds:g}; raise that"
            )
        return self


def check(config: Config, inputs: Mapping[str, StageConfig]) -> None:
    memory_stage.check(config, inputs)


def outside(config: Config) -> str:
    """Changes with the feature network."""
    return hashlib.sha256(read_file(config.features)).hexdigest() if config.features else ""


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss of a segment; and a held-out one, generated, as a sample."""
    return Objective(
        {"generator": setup.model},
        partial(_loss, config, setup.data, setup.model),
        sample=partial(_sample, config, setup),
        fps=max(1, round(setup.data.fps)),
        tokens=partial(full_tokens, setup.model.config.patch),
        blocks=list(setup.model.blocks()),
    )


def _loss(
    config: Config,
    data: Data,
    model: Remembering,
    name: str,
    engines: Engines,
    batch: Batch,
    generator: torch.Generator,
) -> tuple[Tensor, dict[str, Tensor]]:
    count, most = len(batch["key"]), min(true_steps(batch), reach(config, data, engines[name].global_steps))
    drawn = torch.rand((), generator=generator, device=generator.device)
    known, has, late = agreed(most, int(drawn >= config.no_history), draw_late(model.config, generator))
    known *= has
    steps = steps_of(batch, model, known, config.posterior, generator)
    given = given_of(steps, known, model.config, late)
    t = flow.sample_t(count, config.time_mean, config.time_std, config.shift, generator, given.x0.device)
    noised = flow.noised_frames(torch.full((count,), given.window, device=t.device), given.x0.shape[2])
    t = t[:, None] * noised
    noise = torch.randn(given.x0.shape, generator=generator, device=given.x0.device)
    ids = batch["label"].cpu() if config.classes else None
    velocity = engines[name](flow.interpolate(given.x0, noise, t), t, given.times, given.memory, ids, generator)
    loss = flow.loss(velocity, given.x0, noise, noised).mean()
    return loss, {"loss": loss.detach(), "history_steps": loss.new_tensor(float(known))}


def reach(config: Config, data: Data, step: int) -> int:
    """How many steps of history a training step is given, at most."""
    seconds = [s for begins, s in config.history_curriculum if begins <= step] or [config.history_seconds]
    return min(data.history, data.steps_in(seconds[-1]))


@torch.no_grad()
def _sample(
    config: Config, setup: Setup, engines: Engines, generator: torch.Generator
) -> dict[str, np.ndarray[Any, Any]]:
    """Of a held-out clip: the window and the segment after it, and below it what is generated in its place."""
    model = engines["generator"].module
    batch = on_device(next(iter(heldout_of(config, setup.inputs, setup.data))))
    known = true_steps(batch)
    given = given_of(steps_of(batch, model, known), known, model.config)
    memory = given.memory and model.remember(*given.memory)
    clean, true = given.x0[:, :, : given.window], given.x0[:, :, given.window :]
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(config.seed)).to(true.device)
    ids = batch["label"].cpu() if config.classes else None
    made = flow.euler(
        lambda x, t: model(x, t, given.times, memory, ids),
        noise,
        config.sample_steps,
        config.shift,
        clean if given.window else None,
    )
    return {"continued": memory_stage.above_each_other(setup.vae, model, given.x0, torch.cat([clean, made], dim=2))}


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """What each rank does: train from the latest checkpoint in `folder`, and leave the last one there."""
    memory_stage.work(config, inputs, folder, partial(objective, config))


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Train from the latest checkpoint, log and register the model, go on with held-out clips, make it champion.

    Raises:
        UserError: no usable sample; latents, models or histories that do not fit; a workspace for no checkpoints.
        Failure, Interrupted: of the loop.
    """
    sampling = {"steps": config.sample_steps, "guidance": config.guidance, "shift": config.shift}
    facts = {"stage": "generation", "sampling": sampling}
    return memory_stage.run(__name__, config, inputs, output, facts, partial(_evaluate, config))


def _evaluate(config: Config, setup: Setup, folder: Path) -> dict[str, float]:
    model, heldout = setup.model, heldout_of(config, setup.inputs, setup.data)

    def clips() -> Iterator[tuple[Given, Tensor | None]]:
        for batch in islice(heldout, min(config.eval_clips, heldout.samples)):
            known = true_steps(batch)
            given = given_of(steps_of(on_device(batch), model, known), known, model.config)
            yield given, batch.get("label")

    videos = videos_of(config, setup.inputs, setup.data)
    count = min(config.eval_videos, videos.samples)
    network = load_network(config.features, device=device()) if config.features else None
    if network is None:
        print("evaluate: no distance to the history, since `features` names no feature network", flush=True)
    losses = continuation.heldout_losses(model, clips(), config.seed)
    summary = continuation.evaluate(
        model,
        setup.vae,
        ((with_history(batch), batch.get("label")) for batch in islice(videos, count)),
        folder,
        losses=losses,
        frames=config.frames,
        count=config.eval_segments,
        fps=setup.data.fps,
        seed=config.seed,
        settings=Settings(config.sample_steps, config.guidance, config.shift),
        network=network,
    )
    told = ("heldout_loss", "distance", "distance_true")
    return {name: float(summary[name]) for name in told if summary[name] is not None}
