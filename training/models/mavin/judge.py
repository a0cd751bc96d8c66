"""How a MAVIN is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.loader import to_model
from longtake.training.data import text_column_of
from longtake.training.metrics.reconstruction import psnr
from longtake.training.metrics.transitions import joint_error
from longtake.training.models.common.codec import Codec, Pixels, decoder_of
from longtake.training.models.common.condition import Condition
from longtake.training.models.generator import InfillSettings
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.mavin.encode import boundary_frames, encode_windows, window_latents
from longtake.training.models.mavin.guidance import boundary_tokens, load_learned
from longtake.training.models.mavin.infill import Hints
from longtake.training.models.mavin.windows import filled, gap_losses, window_of
from longtake.training.pictures import ImageEncoder
from longtake.training.registry.gate import Better, Window

_BETTER: dict[str, Better] = {"loss": "lower", "middle_psnr": "higher", "joint": "lower"}
_SHARE = 12 / 32  # of a window that is made: the paper's mean, whatever a model has trained on
_STEPS = 8  # of a filled gap, at most, so that hundreds of clips are soon measured


def judge(facts: Mapping[str, Any]) -> Judge:
    """The flow's loss in a gap in the middle of a window, of the same length for all models, and the gap filled.

    `middle_psnr` is of the frames of the gap alone, `joint` the error of the change at its joints, in 0..1. It is filled as
    the model does by default, but in no more than 8 steps.
    """
    return Judge(_BETTER, frozenset({"stride", "size"}), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    text, size = text_column_of(judged.uri, judged.facts, inputs), tuple(judged.facts["window"]["size"])
    return {"columns": {"video": "video"} | text, "stride": window.stride, "size": window.size or size}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    model, video = judged.model, to_model(batch["video"])
    codec = _codec(judged.uri, **_named(judged.facts.get("vae"), ("uri", "encoder")), device=str(video.device))
    latents = window_latents(codec, video.shape[2])
    length = max(1, min(latents - 2, round(_SHARE * latents)))
    start = (latents - length) // 2
    span = (start, start + length)
    x0 = video if isinstance(codec, Pixels) else encode_windows(codec, video, [span])
    image = None
    if facts := judged.facts.get("image"):
        encoder = _encoder(judged.uri, **_named(facts, ("encoder", "digest")), device=str(video.device))
        image = boundary_tokens(encoder, boundary_frames(codec, video, [span]))
    window = window_of(codec, video, x0, span, Hints(batch.get("text"), batch.get("text_mask"), image=image))
    settings = InfillSettings(**judged.facts["sampling"])
    with torch.no_grad():
        gap = filled(model, codec, window, replace(settings, steps=min(settings.steps, _STEPS)), (seed, 0))
        return {
            "loss": gap_losses(model, window, seed, 0, unit)[0],
            "middle_psnr": float(psnr(gap, window.truth)),
            "joint": joint_error(gap, window.truth),
        }


def _named(facts: Mapping[str, Any] | None, names: tuple[str, ...]) -> dict[str, Any]:
    return {name: (facts or {}).get(name) for name in names}


@cache
def _codec(name: str, uri: str | None, encoder: str | None, device: str) -> Codec:
    """The autoencoder of the model of this name, once for all clips. UserError where it has another encoder than it had."""
    codec, _ = decoder_of(name, None if uri is None else {"uri": uri, "encoder": encoder}, None)
    return codec.eval().requires_grad_(False).to(device)


@cache
def _encoder(name: str, encoder: str, digest: str, device: str) -> ImageEncoder:
    """The image encoder of the model of this name, once for all clips. UserError where it is missing, or another one."""
    return load_learned(name, {"encoder": encoder, "digest": digest}, device, "put that back where it was")
