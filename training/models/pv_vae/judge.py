"""How a PV-VAE is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.models.common.condition import Condition
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.pv_vae.evaluate import compared
from longtake.training.registry.gate import Better, Window

_BETTER: dict[str, Better] = {
    "psnr_all": "higher",
    "ssim_all": "higher",
    "psnr_visible": "higher",
    "psnr_predicted": "higher",
}


def judge(facts: Mapping[str, Any]) -> Judge:
    """The same for every PV-VAE; `psnr_predicted` only for windows of more than one frame."""
    return Judge(_BETTER, frozenset({"stride", "size"}), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    return {"columns": {"video": "video"}, "stride": window.stride, "size": window.size or (64, 64)}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    figures, _, _ = compared(judged.model, to_model(batch["video"]))
    return {name: value for name, value in figures.items() if name in _BETTER}
