"""`finetune_memory_prior`: a transformer that continues a history, which it sees through a memory (arXiv 2512.23851, stage II).

It denoises the next segment of a video, given a memory of all that came before and, clean beside it, the recent latents.
`base` names a model of `pretrain_memory` to begin with; with `model: {memory: none}` there are only the recent latents.
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

from longtake.datasets.errors import UserError
from longtake.datasets.loader import Loader
from longtake.datasets.loader.streams import Lengths
from longtake.datasets.stage import Input, Measuring
from longtake.training import stage
from longtake.training.data import on_device
from longtake.training.fit import Largest, Source
from longtake.training.metrics.features import checked_network, digest_of
from longtake.training.metrics.share import batches, mine, place
from longtake.training.models.common import flow
from longtake.training.models.common.condition import of_batch
from longtake.training.models.common.guidance import GuidanceSetting
from longtake.training.models.common.text import check_guidance
from longtake.training.models.generator import Settings, plain
from longtake.training.models.memory import continuation
from longtake.training.models.memory.base_foreign import with_lora
from longtake.training.models.memory.config import MemoryConfig, check
from longtake.training.models.memory.continuation import Clips, Continuation
from longtake.training.models.memory.data import Setup, heldout_of, videos_of
from longtake.training.models.memory.history import (
    history_lengths,
    memory_of,
    segment_after,
    segment_of,
    split_segment,
    stretch_of,
    true_lengths,
)
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.models.memory.retrieval import Video
from longtake.training.models.memory.segments import SETTINGS
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
from longtake.training.models.memory.stretch import add_noise
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

VERSION = 3
PRODUCES = "model"
SUMMARY = "continued.json"


class Config(MemoryConfig):
    """Train a memory_dit to continue its history, and register it. MemoryConfig marks its assumptions.

    With a base: `lora` trains a new adaptation, `lora.full: ["memory"]` the memory with it, `freeze: ["memory"]` neither. Of
    a memory for a transformer of another library cross-attention is `cross`: `lora.full: ["memory", "cross"]`.

    text                 of the dataset's captions, to learn what they say of a segment; null learns none, and a base of
                         another library is then always given the text ""
    no_history           probability that a sample has no history, and begins its stream as a video begins [assumption]
    history_noise        most noise of a history, a time of the flow that the model sees: generated latents have errors too
    sample_noise         this noise in generation
    history_curriculum   [step, seconds]: the most history from each step on, such as [[0, 5], [20000, 20]]
    guidance             of samples with a class or a text; 1 is none. `{classes: 2, text: 6}` gives each its own [assumption]
    eval_videos          held-out videos to continue at the end, over all processes
    eval_segments        segments to continue each of them by
    features             a feature network (see training.metrics.features); null measures no distance
    """

    kind: Literal["finetune_memory_prior"]
    text: Annotated[str, Input("text")] | None = None
    no_history: float = Field(0.1, ge=0, le=1)
    history_noise: float = Field(0.0, ge=0, lt=1)
    sample_noise: float = Field(0.0, ge=0)
    history_curriculum: tuple[tuple[int, float], ...] = ()
    guidance: GuidanceSetting = 1.0
    eval_videos: Annotated[int, Measuring()] = Field(4, ge=1)
    eval_segments: Annotated[int, Measuring()] = Field(3, ge=1)
    features: Annotated[str | None, Measuring()] = None

    @field_validator("history_curriculum")
    @classmethod
    def _check_curriculum(cls, curriculum: tuple[tuple[int, float], ...]) -> tuple[tuple[int, float], ...]:
        begins, seconds = [step for step, _ in curriculum], [seconds for _, seconds in curriculum]
        if begins and (begins[0] != 0 or begins != sorted(set(begins)) or min(seconds) <= 0):
            raise ValueError(
                "needs [step, seconds] from step 0 on, in order, seconds above 0, e.g. [[0, 5], [20000, 20]]"
            )
        return curriculum

    @model_validator(mode="after")
    def _check_bounds(self) -> "Config":
        if longer := [seconds for _, seconds in self.history_curriculum if seconds > self.history_seconds]:
            raise ValueError(
                f"history_curriculum: {longer[0]:g} s are more than history_seconds, {self.history_seconds:g}; raise that"
            )
        if self.sample_noise > self.history_noise:
            raise ValueError(f"sample_noise: {self.sample_noise:g} is more than history_noise, {self.history_noise:g}")
        return self

    @property
    def listens(self) -> bool:
        return True

    @property
    def noise(self) -> float:
        return self.history_noise

    @property
    def reaches(self) -> tuple[tuple[int, float], ...]:
        return self.history_curriculum or super().reaches

    def settings(self, shift: float = 1.0) -> Settings:
        return Settings(self.sample_steps, self.guidance, shift, history_noise=self.sample_noise)

    def histories(self, dit: MemoryModelConfig, least: int) -> Lengths:
        return history_lengths(dit, self.no_history, least)


def outside(config: Config) -> str:
    """The digest of the feature network, whose content decides the evaluation."""
    return digest_of(config.features)


def objective(config: Config, setup: Setup) -> Objective:
    """The flow's loss of a segment; a held-out segment, generated, as a sample.

    Raises:
        UserError: `features` takes no such videos, or the model does not learn to take the guidance; raised before training
            and not after it.
    """
    checked_network(config.features, config.frames, setup.data.size())
    try:
        check_guidance(setup.model.config, config.guidance)
    except ValueError as e:
        raise UserError(str(e)) from e
    return objective_of(config, setup, partial(_loss, config, setup.model), _sample)


def _loss(config: Config, model: MemoryModel, turn: Turn) -> tuple[Tensor, Terms]:
    batch, rng, count = turn.batch, turn.rng, len(turn.batch["key"])
    segment = segment_of(batch, model, batch["history_latent"].shape[3], config.posterior, rng)
    x0, history, level = segment.x0, segment.history, None

    # The recent latents are clean, or have the noise of the history.
    t = flow.sample_t(count, config.time_mean, config.time_std, shift_of(config, model), rng, x0.device)
    noised = flow.noised_frames(torch.full((count,), segment.recent, device=t.device), x0.shape[2])
    t = t[:, None] * noised
    if config.history_noise:
        level = config.history_noise * torch.rand(count, generator=rng, device=t.device)
        t = torch.where(noised > 0, t, level[:, None])
        history = history and add_noise(history, level, rng)

    noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    x, condition = flow.interpolate(x0, noise, t), of_batch(batch)
    velocity = turn.engines[turn.name](x, t, segment.times, history, condition, rng, segment.first, segment.seen, level)
    losses = flow.loss(velocity, x0, noise, noised)
    return losses.mean(), {
        "loss": losses.detach().mean(),
        "history_steps": batch["history_steps"].float().mean(),
        **_by_start(losses.detach(), batch["stream_step"] == 0),
    }


def _by_start(losses: Tensor, starts: Tensor) -> dict[str, Tensor]:
    """The mean loss of segments that begin a video and of later ones, as far as a batch has them."""
    # by numbers of the host: a mask of the device would have to be counted
    chosen: dict[str, list[int]] = {"loss_start": [], "loss_later": []}
    for number, begins in enumerate(starts.tolist()):
        chosen["loss_start" if begins else "loss_later"].append(number)
    return {
        name: losses[torch.tensor(numbers).to(losses.device, non_blocking=True)].mean()
        for name, numbers in chosen.items()
        if numbers
    }


def largest(config: Config, inputs: Mapping[str, Source], count: int) -> Largest:
    """See `training.fit`."""
    return largest_of(config, inputs, count, _loss)


@torch.no_grad()
def losses_by_history(
    config: Config, setup: Setup, counts: Sequence[int], clips: int | None = None
) -> dict[int, np.ndarray[Any, Any]]:
    """`losses_of_all_ranks` by latents of history: of the same segments of the same clips, from the same noise.

    Every rank must call it. The segments come after as many latents as the largest of `counts`; shorter streams have none.
    """
    loader = heldout_of(config, setup, max(counts))
    clips = min(clips or loader.samples, loader.samples)

    def segments(count: int) -> Clips:
        for number, batch in batches(loader, clips, f"evaluate after {count} latents"):
            yield number, segment_after(on_device(batch), setup.model, count), of_batch(batch)

    return {count: continuation.losses_of_all_ranks(setup.model, segments(count), config.seed) for count in counts}


@torch.no_grad()
def _sample(config: Any, setup: Setup, engines: Engines, rng: torch.Generator) -> dict[str, np.ndarray[Any, Any]]:
    """The recent latents and the segment of a held-out clip and, below it, what is generated in its place."""
    model = engines["model"].module
    batch = on_device(next(iter(heldout_of(config, setup))))
    room, length = batch["history_latent"].shape[3], batch["latent"].shape[3]
    stretch = stretch_of(batch, model, room)
    segment = split_segment(stretch, length, batch["stream_step"], model.config)
    memory = segment.history and memory_of(model, segment.history)
    clean, true = segment.x0.split([segment.recent, length], dim=2)
    noise = torch.randn(true.shape, generator=torch.Generator().manual_seed(config.seed)).to(true.device)
    velocity = partial(continuation.velocity_of_copies, model, segment, memory)
    generated = flow.euler(
        flow.guided(velocity, of_batch(batch), config.guidance),
        noise,
        config.sample_steps,
        shift_of(config, model),
        clean if segment.recent else None,
    )
    history = int(true_lengths(batch, room))
    before = stretch.high[:, :, room - history : room - segment.recent]
    rows = (segment.x0, torch.cat([clean, generated], dim=2))
    return {"continued": above_each_other(setup.codec, model, before, *rows)}


def facts(config: Config, setup: Setup, lineage: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json says of the model (see `shared.facts_of`)."""
    return facts_of(config, setup, lineage) | {
        "stage": "generation",
        "sampling": plain(config.settings(shift_of(config, setup.model)), SETTINGS),
        "posterior": config.posterior,
    }


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """See `stage.run`."""
    return stage.run(sys.modules[__name__], with_lora(config, inputs), inputs, output)


def work(config: Config, inputs: Mapping[str, str], folder: Path) -> None:
    """See `stage.work`."""
    stage.work(sys.modules[__name__], config, inputs, folder)


def evaluate(config: Config, setup: Setup, folder: Path) -> None:
    """Measure the loss of held-out segments, and continue held-out videos; each rank takes its share."""
    model = setup.model

    def clips_of(loader: Loader, title: str) -> Clips:
        for number, batch in batches(loader, min(config.eval_clips, loader.samples), title):
            yield number, segment_of(on_device(batch), model, setup.data.history), of_batch(batch)

    def losses_of(loader: Loader, title: str) -> np.ndarray[Any, Any]:
        return continuation.losses_of_all_ranks(model, clips_of(loader, title), config.seed)

    heldout = heldout_of(config, setup)
    longest = heldout.longest_stream - setup.data.shape[0]
    counts = [count for count in measured_lengths(history_lengths(model.config)) if count <= longest]
    network = checked_network(config.features, config.frames, setup.data.size())
    if network is None and place()[0] == 0:
        print("evaluate: no distance to the history, since `features` names no feature network", flush=True)
    continuation.evaluate(
        model,
        setup.codec,
        _videos(config, setup),
        folder,
        Continuation(
            config.frames,
            config.eval_segments,
            setup.data.fps,
            config.seed,
            config.settings(shift_of(config, model)),
            config.posterior,
        ),
        losses=losses_of(heldout, "evaluate"),
        starts=losses_of(heldout_of(config, setup, 0, least=max(counts)), "evaluate starts"),
        by_history=losses_by_history(config, setup, counts, config.eval_clips),
        trivial=continuation.trivial_losses(model, clips_of(heldout, "compare"), config.seed),
        network=network,
    )


def _videos(config: Config, setup: Setup) -> Iterator[list[Video]]:
    """This rank's batches of held-out videos. Ranks take whole batches in turn: the batches are the same on any number."""
    loader = videos_of(config, setup)
    count = min(config.eval_videos, loader.samples)
    for block in mine(math.ceil(count / config.run.eval_batch), "continue", "batch"):
        numbers = range(block * config.run.eval_batch, min(count, (block + 1) * config.run.eval_batch))
        yield [Video.of_batch(*pair) for pair in zip(numbers, loader.at(numbers), strict=True)]


def measured_lengths(lengths: Lengths) -> list[int]:
    """The lengths of history whose loss is measured: none, the shortest, about twice as much each time, and all."""
    counts = [0, lengths.some[0]]
    while counts[-1] < lengths.some[-1]:
        counts.append(min(count for count in lengths.some if count >= min(2 * counts[-1], lengths.some[-1])))
    return counts
