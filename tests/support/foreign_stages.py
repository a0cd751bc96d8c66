"""What the tests of stages on models of other libraries share: a dataset with the latents and texts of a tiny pipeline."""

from __future__ import annotations

import shutil
from pathlib import Path

import latent_stages
import spoken
import tiny_foreign

from longtake.datasets.text import TextConfig
from longtake.training.foreign.load import codec_of
from longtake.training.text import load_encoder


def inputs(root: Path, dataset: str, kind: str = "wan", **parts: object) -> dict[str, str]:
    """A tiny pipeline of a kind of `tiny_foreign.PIPELINES` as `base`, and a copy of a dataset encoded by its parts."""
    base = tiny_foreign.pipeline_folder(root / "pipeline", kind, **parts)
    copy = str(shutil.copytree(dataset, root / "dataset"))
    codec, _ = codec_of(base)
    encoder = load_encoder(TextConfig(encoder=str(base), clean="wan", length=64))
    made = {
        "dataset": copy,
        "latents": latent_stages.encoded(root / "latents", copy, codec, str(base), join=0.0),  # type: ignore[arg-type]
        "text": spoken.column(root / "text", copy, encoder=encoder),
        "base": str(base),
    }
    if kind == "hunyuan":
        second = load_encoder(TextConfig(encoder=str(base / "text_encoder_2")))
        made["pooled"] = spoken.column(root / "pooled", copy, encoder=second, name="text-pooled")
    return made
