"""How a VQGAN is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.models.common.condition import Condition
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.tats.vqgan_evaluate import compared
from longtake.training.registry.gate import Better, Window

_BETTER: dict[str, Better] = {"psnr": "higher", "ssim": "higher", "l1": "lower"}


def judge(facts: Mapping[str, Any]) -> Judge:
    """The same for every VQGAN."""
    return Judge(_BETTER, frozenset({"stride", "size"}), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    return {"columns": {"video": "video"}, "stride": window.stride, "size": window.size or (64, 64)}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    video = to_model(batch["video"])
    return compared(judged.model.reconstruct(video).float(), video)
