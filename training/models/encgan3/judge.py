"""How an EncGAN3 is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.metrics.reconstruction import psnr, ssim
from longtake.training.models.common.condition import Condition
from longtake.training.models.encgan3.model import NOISES, EncGAN3
from longtake.training.models.kind import Judge, Judged
from longtake.training.registry.gate import Better, Window

_BETTER: dict[str, Better] = {"l1": "lower", "psnr": "higher", "ssim": "higher", "seam": "lower"}


def judge(facts: Mapping[str, Any]) -> Judge:
    """The same for every EncGAN3. `seam` is of windows that hold two clips, such as those of a training with recall."""
    return Judge(_BETTER, frozenset({"stride", "size"}), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    side = judged.model.config.size
    return {"columns": {"video": "video"}, "stride": window.stride, "size": window.size or (side, side)}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    video = to_model(batch["video"])
    return compared(judged.model, video)


def compared(model: EncGAN3, video: Tensor) -> dict[str, float]:
    """Figures of the reconstruction, by the posteriors' means, of a clip `(1, 3, T, H, W)` in [-1, 1].

    `l1`, `psnr` and `ssim` are of the first clip of the model's length, beginning with its reference. `seam`, of a window that
    holds two clips that overlap, is the mean absolute error of the change at their joint. Both errors are of pixels in 0..1.

    Raises:
        ValueError: the window is shorter than a clip of the model, or has another size.
    """
    config = model.config
    total = config.span if video.shape[2] >= config.span else config.frames
    if video.shape[2] < total:
        raise ValueError(f"it has {video.shape[2]} frames, a clip of the model {total}")
    window = video[:, :, :total].transpose(1, 2)
    noise = video.new_zeros(1, NOISES, config.content + config.movement)
    drawn = model(window, model.differences_of(window), noise, sample=False)

    clip, real = drawn.clips[:, 0].clamp(-1, 1).transpose(1, 2), video[:, :, : config.frames]
    figures = {
        "l1": (clip - real).abs().mean().item() / 2,
        "psnr": psnr(clip, real).item(),
        "ssim": ssim(clip, real).item(),
    }
    if total == config.span:
        made, true = (
            each[:, config.joint : config.joint + 2].clamp(-1, 1).diff(dim=1) for each in (drawn.joined, window)
        )
        figures["seam"] = (made - true).abs().mean().item() / 2
    return figures
