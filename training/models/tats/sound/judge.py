"""How a VQGAN of sound is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longtake.training.models.common.condition import Condition
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.tats.vqgan_evaluate import compared
from longtake.training.registry.gate import Better, Window

_BETTER: dict[str, Better] = {"psnr": "higher", "ssim": "higher", "l1": "lower"}


def judge(facts: Mapping[str, Any]) -> Judge:
    """The same for every VQGAN of sound."""
    return Judge(_BETTER, frozenset(), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    return {"columns": {"audio": "audio"}, "heard": True}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    sound, model = batch["audio"], judged.model
    frames = round(sound.shape[-1] / model.config.spectrogram.rate * judged.facts["window"]["fps"])
    pictures = model.pictures(sound, frames)
    return compared(model.whole(model.reconstruct(pictures).float()), model.whole(pictures))
