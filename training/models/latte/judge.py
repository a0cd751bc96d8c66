"""How a Latte is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from functools import partial
from typing import Any

from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.data import columns_of, text_column_of
from longtake.training.models.common.condition import Condition
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.latte.evaluate import heldout_losses
from longtake.training.registry.gate import Window


def judge(facts: Mapping[str, Any]) -> Judge:
    """The flow's loss. For a prior of pixels the gate also sets stride and size of windows."""
    fields = () if facts.get("vae") else ("stride", "size")
    return Judge({"loss": "lower"}, frozenset(fields), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    text = text_column_of(judged.uri, judged.facts, inputs)
    if judged.encoder() is None:
        return {"columns": {"video": "video"} | text, "stride": window.stride, "size": window.size or (64, 64)}
    # generated videos begin with the first latent of a clip, which few windows of long clips contain
    columns = columns_of(judged.uri, judged.encoder(), inputs, window.frames or 1)
    return {"columns": columns | text, "clip_starts": 0.5}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    model = judged.model
    if judged.encoder() is None:
        losses = heldout_losses(model, [(to_model(batch["video"]), condition)], seed, unit)
    else:
        latent = model.normalise(batch["latent"][:, 0].float())
        losses = heldout_losses(partial(model, start=batch["start"]), [(latent, condition)], seed, unit)
    return {"loss": float(losses.mean())}
