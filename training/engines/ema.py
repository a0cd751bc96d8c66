"""Exponential moving averages of the weights, several at once, on each rank for its own fragments.

A half-life costs a rank 1/world of the model and no communication. Averages follow the fp32 weights, not their bf16
copies. They are put together only when they are read from a checkpoint (`checkpoint.Weights`).
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.engines import Fragment, fragments

Averages = dict[str, dict[tuple[str, int], Tensor]]  # half-life -> (name, start of the fragment) -> flat values


def label(half_life: float) -> str:
    """The name of an average: its half-life in steps, such as "1000"."""
    return f"{half_life:g}"


def begin(engine: Any, half_lives: Sequence[float]) -> Averages:
    """Averages that begin at the engine's weights."""
    learning = [f for f in fragments(engine) if f.learns]
    return {label(life): {(f.name, f.start): f.value.clone() for f in learning} for life in half_lives}


def weights_of(engine: Any) -> list[Tensor]:
    """What averages follow, in their order: the engine's own tensors, which updates and loads change in place."""
    return [f.value for f in fragments(engine) if f.learns]


def move(averages: Averages, weights: Sequence[Tensor], step: int) -> None:
    """Move each average towards the weights after step `step`; early on its memory is a tenth of the steps so far (EDM2, section C)."""
    for life, average in averages.items():
        keep = 0.5 ** (1 / min(float(life), step / 10))
        # of few that learn, a rank may have none
        if average:
            torch._foreach_lerp_(list(average.values()), list(weights), 1 - keep)


def restore(averages: Averages, engine: Any, saved: Mapping[str, Any]) -> None:
    """Set the averages to saved ones, `checkpoint.Weights` by half-life, whatever number of ranks has saved them."""
    pieces: list[Fragment] = [f for f in fragments(engine) if f.learns]
    for life, average in averages.items():
        for piece in pieces:
            flat = saved[life].read(piece.name, piece.start, piece.value.numel())
            average[piece.name, piece.start].copy_(flat)


@contextmanager
def swapped(average: Mapping[tuple[str, int], Tensor], engine: Any) -> Iterator[None]:
    """Let the engine's module compute with an average for the block; the optimizer's state is not touched.

    Every rank must call it. It costs the memory of the module's weights on this rank once more.
    """
    sharded = engine.zero_optimization_stage() == 3
    learning = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    # ZeRO-3 keeps small parameters gathered, as copies of the shards
    persistent = _gathered(learning.values()) if sharded else []
    _partition(persistent)
    weights = {name: p.ds_tensor.data if sharded else p.data for name, p in learning.items()}
    before = {name: weight.clone() for name, weight in weights.items()}
    pieces: dict[str, list[tuple[int, Tensor]]] = {name: [] for name in weights}
    for (name, start), value in average.items():
        pieces[name].append((start, value))
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for name, weight in weights.items():
        first = rank * weight.numel() if sharded else 0
        full = torch.zeros(weight.numel(), dtype=weight.dtype, device=weight.device)
        for start, value in pieces[name]:
            full[start - first : start - first + value.numel()] = value.to(full)
        if world > 1 and not sharded:
            # each element is on one rank, and zero on the others
            torch.distributed.all_reduce(full)
        weight.copy_(full.view(weight.shape))
    _gather(persistent)
    yield
    if sharded:
        _partition(_gathered(learning.values()))
    for name, weight in weights.items():
        weight.copy_(before[name])
    _gather(persistent)


def _gathered(parameters: Iterable[nn.Parameter]) -> list[Any]:
    from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus

    return [p for p in parameters if p.ds_status == ZeroParamStatus.AVAILABLE]  # type: ignore[attr-defined]


def _partition(parameters: list[Any]) -> None:
    if parameters:
        parameters[0].partition(parameters)


def _gather(parameters: list[Any]) -> None:
    if parameters:
        parameters[0].all_gather(parameters)
