"""What a training does beside its steps: the videos that it samples, and the loss of held-out clips."""

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from itertools import count, islice

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.loader import Loader
from longtake.training import engines
from longtake.training.config import TrainConfig
from longtake.training.engines import ema
from longtake.training.objective import ON_HOST, Batch, Engines, Objective, Turn
from longtake.training.progress import means
from longtake.training.tracker import Tracker


def pass_seed(*numbers: int) -> int:
    """A seed from the training's seed, step, pass and rank, or from whatever else tells a draw from the others."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def on_device(batch: Batch, objective: Objective) -> Batch:
    """A batch whose tensors are on this rank's device, but for classes and those that the objective wants on the host."""
    device = engines.device()
    moves = {k for k, v in batch.items() if isinstance(v, Tensor)} - ON_HOST - set(objective.on_host)
    return {k: v.to(device, non_blocking=True) if k in moves else v for k, v in batch.items()}


def show_samples(objective: Objective, all_engines: Engines, seed: int, step: int, tracker: Tracker | None) -> None:
    """Sample videos for people to look at, always from the same noise, and log them with their prompts.

    Under ZeRO-3 every rank must take part; `tracker` is on the first rank only.
    """
    assert objective.sample is not None
    with torch.no_grad(), _evaluating(all_engines):
        videos = objective.sample(all_engines, torch.Generator(engines.device()).manual_seed(seed))
    if tracker is None:
        return
    for name, video in videos.items():
        tracker.video(step, name, video, objective.fps)
    if objective.prompts:
        tracker.text(step, "prompts", "\n".join(objective.prompts))


@torch.no_grad()
def heldout(
    objective: Objective, all_engines: Engines, averages: ema.Averages, config: TrainConfig, step: int
) -> dict[str, float]:
    """The lead's mean loss on held-out clips, with its first average.

    Each clip has its own noise and times, always the same. The training's random state stays as it is.
    """
    lead, name, device = all_engines[objective.lead], objective.lead, engines.device()
    average = ema.swapped(next(iter(averages.values())), lead) if averages else nullcontext()
    # compiled blocks would be compiled again, for a module that does not learn
    uncompiled = torch.compiler.set_stance("force_eager")
    random_state = torch.random.fork_rng([device] if device.type == "cuda" else [])
    rows = []
    with random_state, average, _evaluating(all_engines), uncompiled:
        for number, clip, counts in _share(objective.heldout, config):
            seed = pass_seed(config.seed, number)
            torch.manual_seed(seed)
            rng = torch.Generator(device).manual_seed(seed)
            # without the other engines: the loss that needs no opponent
            _, terms = objective.loss(Turn(name, {name: lead}, on_device(clip, objective), step, rng, seed, {}))
            rows.append({f"heldout/{term}": value if counts else math.nan for term, value in terms.items()})
    return means(rows)


def _share(clips: Iterable[Batch], config: TrainConfig) -> Iterator[tuple[int, Batch, bool]]:
    """This rank's share of the first `heldout_clips` clips: number, clip, and whether it counts.

    Ranks take turns. ZeRO-3 needs equally many clips on all: a rank that has none left takes another's, which does not
    count.
    """
    rank, world = engines.place(config)
    if isinstance(clips, Loader):
        # a loader continues after its last clip: begin with its first again
        clips.load_state_dict(clips.state_dict() | {"taken": 0})
    remaining = islice(clips, config.run.heldout_clips)
    for first in count(0, world):
        share: tuple[int, Batch] | None = None
        for number, clip in enumerate(islice(remaining, world), first):
            if share is None or number == first + rank:
                share = number, clip
        if share is None:
            return
        yield *share, share[0] == first + rank


@contextmanager
def _evaluating(all_engines: Engines) -> Iterator[None]:
    """Put all modules into evaluation mode for the block."""
    learning = [m for engine in all_engines.values() for m in engine.module.modules() if m.training]
    for module in learning:
        module.training = False
    yield
    for module in learning:
        module.training = True
