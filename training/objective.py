"""The objective of a training: modules, a loss for each of them, and the inputs of a loss."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from longtake.training.config import TrainConfig

Batch = dict[str, Any]
ON_HOST = frozenset({"label"})  # of any batch: ids are checked before a pass, and their check must not wait for a GPU
Engines = Mapping[str, Any]
Terms = dict[str, Tensor]  # scalars to log, by name


class Turn(NamedTuple):
    """One engine's turn in a pass: all inputs of its loss.

    name     of the engine that learns; the weights of all others are frozen meanwhile
    engines  all engines by name: `engines[name](...)` for the one that learns, `engines[other].module(...)` for others
    batch    of the loader, on this rank's device but for `ON_HOST` and the objective's `on_host`
    step     optimizer steps before this one
    rng      this rank's random state of the pass, on its device
    seed     a number of the pass that all ranks share
    carry    data from earlier turns of the pass for later ones, for example a generated video
    """

    name: str
    engines: Engines
    batch: Batch
    step: int
    rng: torch.Generator
    seed: int
    carry: dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """Modules by engine name, and the loss of each engine in its turn.

    Args:
        modules: in the order in which their engines take turns.
        loss: returns the scalar to minimise and terms to log, of which "loss" is shown and watched for leaps.
        lead: name of the module that is averaged, frozen or adapted as the config says, and registered.
        sample: `sample(engines, rng)` returns videos to look at by name, uint8 `(T, H, W, 3)`; called without
            gradients, on all ranks.
        fps: frames per second of those videos.
        prompts: texts that those videos are to show, in order, kept beside them.
        tokens: number of tokens in a batch, for the tokens per second.
        blocks: parts of the modules that `compile` compiles one by one.
        heldout: held-out clips, one a batch, the same each time: the lead's loss on them is logged as `heldout/...`.
        largest: makes a batch as large as any. One update of it comes before the first step and changes nothing, so that
            what does not fit in memory ends at once.
        starts: step at which an engine begins to learn, 0 for engines that are not named.
        settings: of engines with a learning rate, betas or schedule of their own, counted from their start.
        on_host: tensors of a batch that stay on the host, because they decide what is computed.
        state: small vectors that outlive a step and go through a checkpoint, changed in place, on all ranks alike.
    """

    modules: dict[str, nn.Module]
    loss: Callable[[Turn], tuple[Tensor, Terms]]
    lead: str = "model"
    sample: Callable[[Engines, torch.Generator], dict[str, np.ndarray]] | None = None
    fps: int = 8
    prompts: Sequence[str] = ()
    tokens: Callable[[Batch], int] | None = None
    blocks: Sequence[nn.Module] = ()
    heldout: Iterable[Batch] = ()
    largest: Callable[[], Batch] | None = None
    starts: Mapping[str, int] = field(default_factory=dict)
    settings: Mapping[str, TrainConfig] = field(default_factory=dict)
    on_host: Sequence[str] = ()
    state: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert self.lead in self.modules, f"lead: {self.lead} is none of {', '.join(self.modules)}"
