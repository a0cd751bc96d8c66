"""What the tests of TATS share: a VQGAN with random weights, columns of its tokens, captions, and models in folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import latent_stages
import spoken
import tiny_codes
import torch
from priors import awake

from longtake.training.models.tats.gpt import TATS
from longtake.training.models.tats.gpt_config import Mode, TATSConfig
from longtake.training.models.tats.vqgan import VQGAN, config_from_preset
from longtake.training.registry import disk

EVERY = 2
FRAMES = 12  # of a window, 3 latent frames: all that clips have
TINY: dict[str, Any] = {"preset": "tats_tiny", "depth": 2, "width": 16, "heads": 2}
VQGAN_TINY: dict[str, Any] = {
    "kind": "pretrain_vqgan",
    "dataset": "dataset",
    "model": {"preset": "vqgan_tiny", "width": 4, "codes": 32, "code_width": 8},
    "discriminator": {"preset": "patchgan_tiny", "width": 4, "groups": 2},
    "frames": 8,
    "size": (16, 16),
    "warm_steps": 1,
    "gan_start": 2,
    "steps": 4,
    "batch": 2,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 1,
}


def vqgan() -> VQGAN:
    """4 frames of 4 x 4 pixels in a token of 32 codes."""
    model = VQGAN(config_from_preset("vqgan_tiny", width=4, codes=32, code_width=8))
    awake(model)
    with torch.no_grad():
        model.codebook.codes.copy_(torch.randn(32, 8, generator=torch.Generator().manual_seed(1)))
    return model


def saved(model: VQGAN, folder: Path) -> str:
    """The VQGAN as a model folder."""
    disk.save(folder, "vqgan", model.config.model_dump(mode="json"), model.state_dict(), {"lineage": {}})
    return str(folder)


def inputs(root: Path, dataset: str) -> dict[str, str]:
    """A dataset with labels, captions, their states, and tokens, which serve all modes."""
    model, copy = vqgan(), latent_stages.labelled(dataset, root / "dataset")
    uri = saved(model, root / "vqgan")
    text = spoken.column(root / "text", copy)
    made = {"dataset": copy, "text": text, "captions": spoken.record(root / "captions", copy)}
    tokens = tiny_codes.record(root / "tokens", copy, model, tiny_codes.settings(frames=FRAMES), uri)  # type: ignore[arg-type]
    return made | {"tokens": tokens}


def save_tats(
    folder: Path, vqgan_uri: str, mode: Mode = "base", facts: dict[str, Any] | None = None, **fields: Any
) -> TATS:
    """A TATS with random weights as a model folder, for the VQGAN's 16 x 16 pixels."""
    from longtake.datasets.tokens import model_digest
    from longtake.training import registry

    shape = (FRAMES // 4, 4, 4)
    small = {name: value for name, value in TINY.items() if name != "preset"}
    config = TATSConfig(**small | {"codes": 32, "shape": shape, "mode": mode, "every": EVERY} | fields)
    model: TATS = awake(TATS(config))
    described: dict[str, Any] = {
        "lineage": {},
        "vqgan": {"uri": vqgan_uri, "encoder": model_digest(registry.load(vqgan_uri))},
        "classes": [f"class {n}" for n in range(config.classes)],
        "window": {"frames": FRAMES, "stride": 1, "size": [16, 16], "fps": 12.0},
        "sampling": {"guidance": 1.0, "temperature": 1.0, "top_k": 16, "top_p": 0.9, "keep": 0},
    }
    disk.save(folder, "tats", config.model_dump(mode="json"), model.state_dict(), described | (facts or {}))
    return model
