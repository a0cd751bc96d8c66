"""Exponential moving averages of the weights, several at once, each rank averaging what ZeRO lets it hold.

So they cost a rank 1/world of the model a half-life, no communication, and they follow the fp32 weights, not their bf16
copies. They are put together only when they are read from a checkpoint (`checkpoint.Weights`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from longtake.training.engines import Fragment, fragments

Averages = dict[str, dict[tuple[str, int], Tensor]]  # half-life -> (name, start of the fragment) -> flat values


def label(half_life: float) -> str:
    """The name of an average: its half-life in steps, such as "1000"."""
    return f"{half_life:g}"


def begin(engine: Any, half_lives: Sequence[float]) -> Averages:
    """Averages that stand at the engine's weights."""
    found = [f for f in fragments(engine) if f.learns]
    return {label(life): {(f.name, f.start): f.value.clone() for f in found} for life in half_lives}


def move(averages: Averages, engine: Any, step: int) -> None:
    """Move each average towards the weights after step `step`; early on its memory is a tenth of the steps so far (EDM2, section C)."""
    if not averages:
        return
    values = [f.value for f in fragments(engine) if f.learns]
    for life, held in averages.items():
        keep = 0.5 ** (1 / min(float(life), step / 10))
        torch._foreach_lerp_(list(held.values()), values, 1 - keep)


def restore(averages: Averages, engine: Any, saved: Mapping[str, Any]) -> None:
    """Set the averages to saved ones, `checkpoint.Weights` by half-life, whatever number of ranks has saved them."""
    places: list[Fragment] = [f for f in fragments(engine) if f.learns]
    for life, held in averages.items():
        for place in places:
            flat = saved[life].read(place.name, place.start, place.value.numel())
            held[place.name, place.start].copy_(flat)
