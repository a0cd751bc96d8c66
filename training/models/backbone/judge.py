"""How a backbone is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from longtake.training.data import columns_of, text_column_of
from longtake.training.engines import device
from longtake.training.models.backbone.evaluate import losses_of
from longtake.training.models.backbone.given import given
from longtake.training.models.common.codec import load_codec
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.flow import clip_rng
from longtake.training.models.kind import Judge, Judged
from longtake.training.registry.gate import Window


def judge(facts: Mapping[str, Any]) -> Judge:
    """The flow's loss, at times of the model's range."""
    return Judge({"loss": "lower"}, frozenset(), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    columns = columns_of(judged.uri, judged.encoder(), inputs, window.frames or 1)
    columns |= text_column_of(judged.uri, judged.facts, inputs)
    columns |= text_column_of(judged.uri, judged.facts, inputs, "pooled")
    # their videos begin as clips do
    return {"columns": columns, "clip_starts": 1.0}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    model, facts = judged.model, judged.facts
    x0 = batch["latent"][:, 0].float()
    codec = _codec(facts["vae"]["uri"]) if model.config.sizes.image_channels else None
    beside = given(model, batch, x0, facts["window"]["fps"], codec)
    return {"loss": float(losses_of(model, x0, condition, beside, clip_rng(seed, 0)).mean())}


@lru_cache(1)
def _codec(uri: str) -> Any:
    return load_codec(uri).requires_grad_(False).to(device())
