"""A registered MAVIN as an `Infiller` (see `infill`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.engines import device
from longtake.training.models.common import codec as codecs
from longtake.training.models.common import prompts as texts
from longtake.training.models.common.pictures import REMEDY
from longtake.training.models.generator import InfillSettings
from longtake.training.models.mavin.encode import encode_apart
from longtake.training.models.mavin.guidance import boundary_tokens, load_learned
from longtake.training.models.mavin.infill import Filler
from longtake.training.models.mavin.model import Mavin
from longtake.training.registry import disk


def infiller_of(uri: str, model: Any, facts: Mapping[str, Any], vae: str | None, dtype: torch.dtype) -> Filler:
    """The infiller of a loaded model, on the GPU where there is one.

    Raises:
        UserError: another model; an autoencoder with another encoder; an image encoder that is not there, or another one.
    """
    if not isinstance(model, Mavin):
        raise UserError(f"{uri}: is a {type(model).__name__}; name a `finetune_mavin` model")
    codec, decoder = codecs.decoder_of(uri, facts.get("vae"), vae)
    window, where = facts["window"], device()
    return Filler(
        model.to(where, dtype).eval(),
        codec.to(where, dtype),
        encode_apart,
        fps=window["fps"],
        size=tuple(window["size"]),
        settings=InfillSettings(**facts["sampling"]),
        context=tuple(facts["context"]),
        longest=facts["gap"][1],
        window=window["frames"],
        digest=f"{disk.digest(facts)} {decoder}".strip(),
        device=where,
        prompts=texts.prompts_of(uri, facts),
        features=_features(uri, model, facts.get("image")),
        clean_time=model.config.clean_time,
    )


def _features(uri: str, model: Mavin, image: Mapping[str, Any] | None) -> Callable[[Tensor], Tensor] | None:
    """What the model sees of the frames beside a gap; None where it sees none. UserError without its image encoder."""
    if not model.config.image_width:
        return None
    if not image:
        raise UserError(
            f"{uri}: sees the frames beside a gap, and its config.json names no image encoder; train it again"
        )
    encoder = load_learned(uri, image, device(), REMEDY)
    return partial(boundary_tokens, encoder)
