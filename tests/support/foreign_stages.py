"""What the tests of stages on models of other libraries share: a dataset with the latents and texts of a tiny pipeline."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import latent_stages
import spoken
import tiny_foreign
import torch

from longtake.datasets import latents, text
from longtake.datasets.text import TextConfig
from longtake.training.foreign.columns import pooled_settings, text_settings
from longtake.training.foreign.load import codec_of, config_of
from longtake.training.text import load_encoder


def inputs(root: Path, dataset: str, kind: str = "wan", **parts: object) -> dict[str, str]:
    """A tiny pipeline of a kind of `tiny_foreign.PIPELINES` as `base`, and a copy of a dataset encoded by its parts."""
    base = tiny_foreign.pipeline_folder(root / "pipeline", kind, **parts)
    copy = str(shutil.copytree(dataset, root / "dataset"))
    codec, _ = codec_of(base)
    config: Any = config_of(base, "transformer", "high" if kind == "wan22_a14b" else None)[1]
    settings = text_settings(str(base), {"foreign": {"folder": str(base)}}, config)
    encoder = load_encoder(TextConfig(**settings | {"length": 64}))
    made = {
        "dataset": copy,
        "latents": latent_stages.encoded(root / "latents", copy, codec, str(base), join=0.0),  # type: ignore[arg-type]
        "text": spoken.column(root / "text", copy, encoder=encoder),
        "base": str(base),
    }
    if kind == "hunyuan":
        second = load_encoder(TextConfig(**pooled_settings(str(base), {"foreign": {"folder": str(base)}})))
        made["pooled"] = spoken.column(root / "pooled", copy, encoder=second, name="text-pooled")
    return made


def moved(made: dict[str, str], dataset: str, folder: Path) -> dict[str, str]:
    """The same inputs over a copy of their dataset, with records of their own."""
    copies = made | {"dataset": dataset}
    for name, read, write in (
        ("latents", latents.read_latents, latents.write_latents),
        ("text", text.read_text, lambda uri, record: text.write_text(uri, record, torch.from_numpy(record.empty()))),
    ):
        copies[name] = str(folder / name)
        write(copies[name], replace(read(made[name]), dataset=dataset))
    return copies
