"""How a TATS is measured on one held-out window (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.data import captions_of, text_column_of, token_windows, tokens_of
from longtake.training.models.common.condition import Condition
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.tats.evaluate import heldout_loss
from longtake.training.models.tats.words import Words
from longtake.training.registry.gate import Window


def judge(facts: Mapping[str, Any]) -> Judge:
    """The loss of a token, in nats."""
    return Judge({"loss": "lower"}, frozenset(), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    if "tokens" not in inputs:
        raise UserError(f"tokens: {judged.uri} has learned tokens; name what their `cache_tokens` stage has made")
    record = tokens_of(inputs)
    if record.model["digest"] != judged.encoder():
        raise UserError(f"tokens: {inputs['tokens']} are of another VQGAN than {judged.uri} has learned")
    options = token_windows(record)
    del options["frames"]  # those of the gate
    columns = options["columns"] | text_column_of(judged.uri, judged.facts, inputs)
    if judged.facts.get("words"):
        captions = captions_of(inputs)
        if captions is None:
            raise UserError(f"captions: {judged.uri} has learned words; name what their `caption` stage has made")
        columns["caption"] = captions.column
    if judged.facts.get("audio_tokens"):
        if "audio_tokens" not in inputs:
            raise UserError(
                f"audio_tokens: {judged.uri} has learned to hear; name what their `cache_tokens` stage has made"
            )
        sound = tokens_of(inputs, "audio_tokens")
        if sound.model["digest"] != judged.facts["sound"]["encoder"]:
            raise UserError(
                f"audio_tokens: {inputs['audio_tokens']} are of another VQGAN than {judged.uri} has learned"
            )
        columns["audio_tokens"] = sound.column
    return options | {"columns": columns}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    if judged.facts.get("words"):
        words = Words.of(judged.facts["words"], judged.model.config.word_length)
        text, mask = words.encoded(batch["caption"])
        condition = replace(condition or Condition(), text=text, mask=mask)
    losses, _ = heldout_loss(judged.model, batch, condition)
    return {"loss": float(losses.mean())}
