"""What a pipeline of another library says of its videos: their size and rate, its scheduler, its texts, its autoencoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from longtake.datasets.latents import encoder_digest
from longtake.training.engines import device
from longtake.training.foreign.backbone import BackboneConfig
from longtake.training.foreign.clip_rate import fps_of
from longtake.training.foreign.columns import pipeline_uri, pooled_settings, text_settings
from longtake.training.foreign.library import class_of
from longtake.training.models.backbone.solver import solver_of
from longtake.training.models.common import codec as codecs
from longtake.training.models.generator import Settings, plain
from longtake.training.registry import pipelines

SETTINGS = ("steps", "guidance", "shift", "solver")  # of a model's config.json


class Made(NamedTuple):
    """The model's own videos, those of its size and rate, and how its authors make them."""

    frames: int
    size: tuple[int, int]
    guidance: float
    steps: int = 50


_MADE = {
    "WanTransformer3DModel": Made(81, (480, 832), 5.0),
    "LTXVideoTransformer3DModel": Made(161, (512, 704), 3.0),
    "HunyuanVideoTransformer3DModel": Made(129, (720, 1280), 6.0),
}
_MADE_5B = Made(121, (704, 1280), 5.0)  # Wan 2.2-5B, which alone expands times


def completed(uri: str, facts: Mapping[str, Any]) -> Mapping[str, Any]:
    """config.json of a fine-tuned backbone as it is; of a pipeline with its window, sampling and texts.

    Raises:
        UserError: its scheduler is not known.
    """
    config = BackboneConfig(**facts["config"])
    found: dict[str, Any] = {"config": facts["config"] | {"text_length": config.longest_text}}
    if "window" in facts:
        return {**facts, **found}
    made = _MADE_5B if config.expand_timesteps else _MADE[config.class_name]
    (factor, pixels), (height, width) = config.strides, made.size
    shift = config.shift_of((1 + (made.frames - 1) // factor, height // pixels, width // pixels))
    settings = Settings(made.steps, made.guidance, shift, solver=solver_of(config.scheduler))
    found |= {
        "window": {"frames": made.frames, "stride": 1, "size": list(made.size), "fps": fps_of(config, facts)},
        "sampling": plain(settings, SETTINGS),
        "classes": [],
        "text": {"encoder": text_settings(uri, facts, config)},
    }
    if config.sizes.pooled_width:
        found["pooled"] = {"encoder": pooled_settings(uri, facts)}
    return {**facts, **found}


def codec_for(uri: str, facts: Mapping[str, Any], vae: str | None) -> Any:
    """The autoencoder of a backbone's latents: that of its config.json or of its pipeline, or `vae` of the same encoder."""
    whole = pipeline_uri(uri, facts)
    if "vae" not in facts and vae is None:
        return codecs.load_codec(whole)
    needed = facts.get("vae") or {"uri": whole, "encoder": encoder_digest(codecs.load_codec(whole))}
    return codecs.decoder_of(uri, needed, vae)[0]


def image_states_for(uri: str, width: int) -> Callable[[np.ndarray], Tensor] | None:
    """What the image encoder of a pipeline makes of a frame `(H, W, 3)` uint8: `(1, N, width)`; None for a width of 0.

    Raises:
        UserError: the pipeline has no image encoder.
    """
    if not width:
        return None
    folder = pipelines.found(uri, ("image_encoder", "image_processor")).folder

    def states(frame: np.ndarray) -> Tensor:
        encoder = _loaded("CLIPVisionModel", folder / "image_encoder", use_safetensors=True).to(device())
        pixels = _loaded("CLIPImageProcessor", folder / "image_processor")(images=frame, return_tensors="pt")
        # the state before the last, as Wan 2.1 has learned them
        made: Tensor = encoder(**pixels.to(device()), output_hidden_states=True).hidden_states[-2]
        return made

    return torch.no_grad()(states)


def _loaded(name: str, folder: Path, **options: Any) -> Any:
    return class_of(name, "transformers").from_pretrained(folder, local_files_only=True, **options)
