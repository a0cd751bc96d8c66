"""How a model with a memory is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longtake.datasets.latents import read_latents
from longtake.datasets.loader.streams import Lengths
from longtake.training.data import columns_of, text_column_of
from longtake.training.models.common.condition import Condition
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.memory import continuation, retrieval
from longtake.training.models.memory.history import groups_of, segment_of, true_lengths
from longtake.training.registry.gate import Window


def judge(facts: Mapping[str, Any]) -> Judge:
    """The flow's loss of a segment, given its history; or, for a model that retrieves, of retrieved latents."""
    figures = _retrieval if facts.get("stage") == "retrieval" else _continuation
    return Judge({"loss": "lower"}, frozenset({"history_seconds", "history_least"}), _options, figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    columns = columns_of(judged.uri, judged.encoder(), inputs, window.frames or 1, judged.model.config.shrink)
    if judged.facts.get("stage") != "retrieval":
        columns |= text_column_of(judged.uri, judged.facts, inputs)
        columns |= text_column_of(judged.uri, judged.facts, inputs, "pooled")
    return {"columns": columns, "histories": _histories(judged, inputs, window)}


def _histories(judged: Judged, inputs: Mapping[str, str], window: Window) -> Lengths:
    """Histories of whole segments, whatever the model: the same for its champion."""
    factor = read_latents(inputs["latents"]).factor
    per_second, segment = judged.facts["window"]["fps"] / factor, 1 + ((window.frames or 1) - 1) // factor
    most = max(1, round((window.history_seconds or 0.0) * per_second))
    lengths = (*range(segment, most, segment), -(-most // segment) * segment)
    return Lengths(lengths, most, unit=segment, least=round((window.history_least or 0.0) * per_second))


def _continuation(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    """The loss of a segment, given its history."""
    segment = segment_of(batch, judged.model, batch["history_latent"].shape[3])
    return {"loss": float(continuation.heldout_losses(judged.model, [(segment, condition)], seed, unit).mean())}


def _retrieval(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    """The loss of some latents, given the memory of all; empty where the history is too short to be remembered."""
    room, segment = batch["history_latent"].shape[3], batch["latent"].shape[3]
    if int(true_lengths(batch, room)) + segment < judged.model.config.group:
        return {}
    clips, at_once = [(groups_of(batch, judged.model), condition)], retrieval.learned_at_once(judged.facts)
    return {"loss": float(retrieval.heldout_losses(judged.model, clips, seed, unit, at_once).mean())}
