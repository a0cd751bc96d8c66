"""`finetune_memory_prior`: a transformer that goes on from a history, which it sees through a memory (arXiv 2512.23851, stage II).

It learns to denoise a segment of a video, given a memory of all that came before and, clean beside it, the last steps.
With `base` a model of `pretrain_memory` is taught to do so; with `model: {memory: none}` there are the last steps alone.
"""

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor

from longtake.datasets.loader import Loader
from longtake.datasets.loader.streams import Lengths
from longtake.datasets.stage import Measuring
from longtake.training import stage
from longtake.training.data import on_device
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.metrics.share import batches, mine, place
from longtake.training.models.common import flow
from longtake.training.models.common.condition import of_batch
from longtake.training.models.generator import Settings
from longtake.training.models.memory import continuation
from longtake.training.models.memory.config import MemoryConfig, check
from longtake.training.models.memory.continuation import Clips, Continuing
from longtake.training.models.memory.data import videos_of
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.history import (
    Given,
    corrupted,
    given_of,
    lengths_of,
    remembered,
    steps_of,
    true_steps,
    with_history,
)
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
from longtake.training.objective import Batch, Engines, Objective, Terms, Turn

__all__ = ["MODEL", "announce", "check", "counts", "loader", "prepare"]  # of the stage, beside what is here

VERSION = 3
PRODUCES = "model"
SUMMARY = "continued.json"


class Config(MemoryConfig):
    """Train a memory_dit to continue from its history, and register it. See MemoryConfig for what is an assumption.

    With a base: `lora` trains a new adaptation, `lora.full: ["memory"]` the memory with it, `freeze: ["memory"]` neither.

    no_history           probability that a sample has none, and begins its stream as a video begins [assumption]
    history_noise        most noise of a history, which the model is told: what is generated has errors too
    sample_noise         the level that samples are made with
    history_curriculum   [step, seconds] from which step on histories are how long, such as [[0, 5], [20000, 20]]
    guidance             of samples with a class; 1 is none [assumption]
    eval_videos          held-out videos that are continued at the end, over all processes
    eval_segments        by how many segments they are continued
    features             a feature network (see training.metrics.features); null measures no distance
    """

    kind: Literal["finetune_memory_prior"]
    no_history: float = Field(0.1, ge=0, le=1)
    history_noise: float = Field(0.0, ge=0, lt=1)
    sample_noise: float = Field(0.0, ge=0)
    history_curriculum: tuple[tuple[int, float], ...] = ()
    guidance: float = Field(1.0, ge=0)
    eval_videos: Annotated[int, Measuring()] = Field(4, ge=1)
    eval_segments: Annotated[int, Measuring()] = Field(3, ge=1)
    features: Annotated[str | None, Measuring()] = None

    @field_validator("history_curriculum")
    @classmethod
    def _rises(cls, curriculum: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        begins = [step for step, _ in curriculum]
        if begins and (begins[0] != 0 or begins != sorted(set(begins)) or min(s for _, s in curriculum) <= 0):
            raise ValueError(
                "needs [step, seconds] from step 0 on, in order, seconds above 0, e.g. [[0, 5], [20000, 20]]"
            )
        return curriculum

    @model_validator(mode="after")
    def _within(self) -> "Config":
        if longer := [seconds for _, seconds in self.history_curriculum if seconds > self.history_seconds]:
            raise ValueError(
                f"history_curriculum: {longer[0]:g} s are more than history_seconds, {self.history_seconds:g}; raise that"
            )
        if self.sample_noise > self.history_noise:
            raise ValueError(f"sample_noise: {self.sample_noise:g} is more than history_noise, {self.history_noise:g}")
        return self

    @property
    def noise(self) -> float:
        return self.history_noise

    @property
    def reaches(self) -> tuple[tuple[int, float], ...]:
        return self.history_curriculum or super().reaches

    def histories(self, dit: MemoryDiTConfig, least: int) -> Lengths:
        return lengths_of(dit, self.no_history, least)


def outside(config: Config) -> str:
    """Changes with the feature network."""
    return digest_of(config.features)


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss of a segment; and a held-out one, generated, as a sample.

    Raises:
        UserError: `features` takes no such videos, which would be seen at the end.
    """
    checked_network(config.features, config.frames, setup.data.size())
    return objective_of(config, setup, partial(_loss, config, setup.model), _sample)


def _loss(config: Config, model: MemoryDiT, turn: Turn) -> tuple[Tensor, Terms]:
    batch, rng, count = turn.batch, turn.rng, len(turn.batch["key"])
    given = given_to(batch, model, batch["history_latent"].shape[3], config.posterior, rng)
    t = flow.sample_t(count, config.time_mean, config.time_std, config.shift, rng, given.x0.device)
    noised = flow.noised_frames(torch.full((count,), given.window, device=t.device), given.x0.shape[2])
    t = t[:, None] * noised
    memory, level = given.memory, None
    if config.history_noise:
        level = config.history_noise * torch.rand(count, generator=rng, device=t.device)
        t = torch.where(noised > 0, t, level[:, None])
        memory = memory and corrupted(memory, level, rng)
    noise = torch.randn(given.x0.shape, generator=rng, device=given.x0.device)
    condition = of_batch(batch)
    x = flow.interpolate(given.x0, noise, t)
    velocity = turn.engines[turn.name](x, t, given.times, memory, condition, rng, given.first, given.seen, level)
    losses = flow.loss(velocity, given.x0, noise, noised)
    return losses.mean(), {
        "loss": losses.detach().mean(),
        "history_steps": batch["history_steps"].float().mean(),
        **_by_start(losses.detach(), batch["stream_step"] == 0),
    }


def _by_start(losses: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """The mean loss of segments that begin a video, and of those that come later, of which a batch has some."""
    parts = {"loss_start": losses[starts], "loss_later": losses[~starts]}
    return {name: part.mean() for name, part in parts.items() if len(part)}


def given_to(
    batch: Batch,
    model: MemoryDiT,
    most: int,
    posterior: Literal["sample", "mean"] = "mean",
    rng: torch.Generator | None = None,
) -> Given:
    """What a batch's segments are given, `most` steps of history at most."""
    steps = steps_of(batch, model, most, posterior, rng)
    return given_of(steps, batch["latent"].shape[3], batch["stream_step"], model.config)


def given_last(batch: Batch, model: MemoryDiT, count: int) -> Given:
    """What a batch's segments are given of the last `count` steps of history alone.

    Groups are counted from the first of these, as of a video that is gone on with, but none of them is its first latent.
    """
    steps = steps_of(batch, model, count)
    return given_of(steps, batch["latent"].shape[3], batch["stream_step"].clamp(max=count), model.config)


@torch.no_grad()
def losses_by_history(
    config: Config, setup: Setup, counts: Sequence[int], clips: int | None = None
) -> dict[int, np.ndarray[Any, Any]]:
    """`heldout_losses` by how many steps of history are given: of the same segments of the same clips, from the same noise.

    Of all ranks' clips; every rank must call it. The segments come after as many steps as the longest of the `counts`; of
    shorter streams there is none.
    """
    loader = heldout_of(config, setup, max(counts))
    clips = min(clips or loader.samples, loader.samples)

    def given(count: int) -> Clips:
        for number, batch in batches(loader, clips, f"evaluate after {count} steps"):
            yield number, given_last(on_device(batch), setup.model, count), of_batch(batch)

    return {count: continuation.losses_of_all_ranks(setup.model, given(count), config.seed) for count in counts}


@torch.no_grad()
def _sample(config: Any, setup: Setup, engines: Engines, rng: torch.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """The window and the segment after it of a held-out clip and, below it, what is generated in its place."""
    model = engines["model"].module
    batch = on_device(next(iter(heldout_of(config, setup))))
    room, segment = batch["history_latent"].shape[3], batch["latent"].shape[3]
    steps = steps_of(batch, model, room)
    given = given_of(steps, segment, batch["stream_step"], model.config)
    memory = given.memory and remembered(model, given.memory)
    clean, true = given.x0[:, :, : given.window], given.x0[:, :, given.window :]
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(config.seed)).to(true.device)
    condition = of_batch(batch)
    made = flow.euler(
        lambda x, t: model(x, t, given.times, memory, condition, None, given.first, given.seen),
        noise,
        config.sample_steps,
        config.shift,
        clean if given.window else None,
    )
    known = int(true_steps(batch, room)) - given.window
    before = steps.high[:, :, room - known - given.window : room - given.window]
    generated = torch.cat([clean, made], dim=2)
    return {"continued": above_each_other(setup.codec, model, before, given.x0, generated)}


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the model (see `longtake.training.models.memory.history`)."""
    sampling = {"steps": config.sample_steps, "guidance": config.guidance, "shift": config.shift}
    return facts_of(config, setup, lineage) | {
        "stage": "generation",
        "sampling": sampling | {"history_noise": config.sample_noise},
        "posterior": config.posterior,
    }


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], config, inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> None:
    """Go on with held-out videos, each rank its share."""
    model = setup.model

    def clips_of(loader: Loader, what: str) -> Clips:
        for number, batch in batches(loader, min(config.eval_clips, loader.samples), what):
            yield number, given_to(on_device(batch), model, setup.data.history), of_batch(batch)

    def losses_of(loader: Loader, what: str) -> np.ndarray[Any, Any]:
        return continuation.losses_of_all_ranks(model, clips_of(loader, what), config.seed)

    heldout = heldout_of(config, setup)
    longest = heldout.longest_stream - setup.data.shape[0]
    counts = [count for count in measured(lengths_of(model.config)) if count <= longest]
    network = checked_network(config.features, config.frames, setup.data.size())
    if network is None and place()[0] == 0:
        print("evaluate: no distance to the history, since `features` names no feature network", flush=True)
    continuation.evaluate(
        model,
        setup.codec,
        _videos(config, setup),
        folder,
        Continuing(
            config.frames,
            config.eval_segments,
            setup.data.fps,
            config.seed,
            Settings(config.sample_steps, config.guidance, config.shift, history_noise=config.sample_noise),
            config.posterior,
        ),
        losses=losses_of(heldout, "evaluate"),
        starts=losses_of(heldout_of(config, setup, 0, least=max(counts)), "evaluate starts"),
        by_history=losses_by_history(config, setup, counts, config.eval_clips),
        trivial=continuation.trivial_losses(model, clips_of(heldout, "compare"), config.seed),
        network=network,
    )


def _videos(config: Config, setup: Setup) -> Iterator[list[Video]]:
    """This rank's batches of held-out videos. Ranks take whole ones in turn, so that each is the same on any number."""
    loader = videos_of(config, setup.inputs, setup.data)
    count = min(config.eval_videos, loader.samples)
    for block in mine(math.ceil(count / config.run.eval_batch), "go on", "batch"):
        numbers = range(block * config.run.eval_batch, min(count, (block + 1) * config.run.eval_batch))
        read = zip(numbers, loader.at(numbers), strict=True)
        yield [Video(number, with_history(batch), of_batch(batch)) for number, batch in read]


def measured(lengths: Lengths) -> list[int]:
    """The histories whose loss is measured: none, the shortest, about twice as much each time, and all."""
    made = [0, lengths.some[0]]
    while made[-1] < lengths.some[-1]:
        made.append(min(begin for begin in lengths.some if begin >= min(2 * made[-1], lengths.some[-1])))
    return made
