"""How a MAVIN is measured on one held-out clip (see `longtake.training.models.kind.Judge`)."""

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.latents import encoder_digest
from longtake.datasets.loader import to_model
from longtake.training.data import text_column_of
from longtake.training.models.common.codec import Codec, Pixels, load_codec
from longtake.training.models.common.condition import Condition
from longtake.training.models.kind import Judge, Judged
from longtake.training.models.mavin import spans as spanning
from longtake.training.models.mavin.encode import boundary_frames, encode_windows, window_latents
from longtake.training.models.mavin.evaluate import Window as GapWindow
from longtake.training.models.mavin.evaluate import gap_losses
from longtake.training.models.mavin.guidance import boundary_tokens, load_image_encoder
from longtake.training.registry.gate import Window


def judge(facts: Mapping[str, Any]) -> Judge:
    """The flow's loss in a gap in the middle of a window, of a length that training has seen."""
    return Judge({"loss": "lower"}, frozenset({"stride", "size"}), _options, _figures)


def _options(judged: Judged, inputs: Mapping[str, str], window: Window) -> dict[str, Any]:
    text, size = text_column_of(judged.uri, judged.facts, inputs), tuple(judged.facts["window"]["size"])
    return {"columns": {"video": "video"} | text, "stride": window.stride, "size": window.size or size}


def _figures(
    judged: Judged, batch: Mapping[str, Any], condition: Condition | None, seed: int, unit: Tensor | float
) -> dict[str, float]:
    model, video = judged.model, to_model(batch["video"])
    codec = _codec((judged.facts.get("vae") or {}).get("uri"), str(video.device))
    latents = window_latents(codec, video.shape[2])
    low, high = model.config.gap
    length = min((low + high) // 2, latents - 2)
    start = (latents - length) // 2
    spans = [(start, start + length)]
    x0 = video if isinstance(codec, Pixels) else encode_windows(codec, video, spans)
    image = None
    if judged.facts.get("image"):
        encoder = load_image_encoder(judged.facts["image"]["encoder"], video.device)
        image = boundary_tokens(encoder, boundary_frames(codec, video, spans))
    hints = (batch.get("text"), batch.get("text_mask"), image, None)
    mask = spanning.mask_of(spans, latents).to(video.device)
    with torch.no_grad():
        window = GapWindow(video, model.normalise(x0), mask, hints)
        return {"loss": gap_losses(model, window, seed, 0, unit)[0]}


@cache
def _codec(uri: str | None, device: str) -> Codec:
    """The autoencoder of a model, once for all clips."""
    codec: Any = Pixels() if uri is None else load_codec(uri).requires_grad_(False)
    assert uri is None or encoder_digest(codec)
    return codec.to(device)
