"""How a model with a memory is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longtake.datasets.latents import read_latents
from longtake.datasets.loader.streams import Lengths
from longtake.training.data import columns_of
from longtake.training.models.common.condition import Condition
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.memory import continuation, retrieval
from longtake.training.models.memory.history import given_of, steps_of, true_steps, whole_of
from longtake.training.registry.gate import Window


def judge(facts: Mapping[str, Any]) -> Judge:
    """The flow's loss of a segment, given its history; or for a model that retrieves, of what is retrieved."""
    figures = _retrieval if facts.get("stage") == "retrieval" else _continuation
    return Judge({"loss": "lower"}, frozenset({"history_seconds", "history_least"}), _options, figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    columns = columns_of(judged.uri, judged.encoder(), inputs, window.frames or 1, judged.model.config.shrink)
    return {"columns": columns, "histories": _histories(judged, inputs, window)}


def _histories(judged: Judged, inputs: Mapping[str, str], window: Window) -> Lengths:
    """Of whole segments, whatever the model: the same for its champion."""
    factor = read_latents(inputs["latents"]).factor
    per_second, segment = judged.facts["window"]["fps"] / factor, 1 + ((window.frames or 1) - 1) // factor
    most = max(1, round((window.history_seconds or 0.0) * per_second))
    some = (*range(segment, most, segment), -(-most // segment) * segment)
    return Lengths(some, most, unit=segment, least=round((window.history_least or 0.0) * per_second))


def _continuation(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    """The loss of a segment, given its history."""
    room, segment = batch["history_latent"].shape[3], batch["latent"].shape[3]
    steps = steps_of(batch, judged.model, room)
    given = given_of(steps, segment, batch["stream_step"], judged.model.config)
    losses = continuation.heldout_losses(judged.model, [(given, condition)], seed, unit)
    return {"loss": float(losses.mean())}


def _retrieval(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    """The loss of some latents, given the memory of all; nothing where the history is too short to be remembered."""
    room, segment = batch["history_latent"].shape[3], batch["latent"].shape[3]
    if int(true_steps(batch, room)) + segment < judged.model.config.group:
        return {}
    steps = whole_of(steps_of(batch, judged.model, room), batch["stream_step"] + segment, judged.model.config)
    losses = retrieval.heldout_losses(judged.model, [(steps, condition)], seed, unit)
    return {"loss": float(losses.mean())}
