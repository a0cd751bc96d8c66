"""A training of every family with a tiny model, as a stage of a recipe whose other stages have not run."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import measured
import yaml
from tiny_foreign import pipeline_folder

from longtake.training import fit

SHARDS = {"kind": "shard", "sources": ["/videos"], "clip": {"short_side": 64, "fps": 8, "max_seconds": 60}}
VAE = {"kind": "pretrain_vae", "dataset": "shards", "model": {"preset": "pv_vae_tiny"}, "sizes": [[64, 64]]}
LATENTS = {"kind": "cache_latents", "dataset": "shards", "encoder": "vae", "size": [64, 64], "join_seconds": 60}
VQGAN = {"kind": "pretrain_vqgan", "dataset": "shards", "model": {"preset": "vqgan_tiny"}, "size": [32, 32]}
TOKENS = {"kind": "cache_tokens", "dataset": "shards", "encoder": "vqgan", "size": [32, 32]}
BEFORE = {"shards": SHARDS, "vae": VAE, "latents": LATENTS, "vqgan": VQGAN, "tokens": TOKENS}
LOW = LATENTS | {"shrink": [4, 4]}
MEMORY = {
    "latents": "latents",
    "low_latents": "low",
    "model": {"preset": "memory_dit_tiny"},
    "history_seconds": 4,
    "frames": 9,
}
COMMON = {"dataset": "shards", "batch": 2, "steps": 400, "ema_half_lives": []}
LATTE = {"kind": "finetune_latte", "latents": "latents", "model": {"preset": "latte_tiny"}}
MAVIN = {"kind": "finetune_mavin", "model": {"preset": "mavin_tiny"}, "size": [32, 32], "frames": 8}
UNET = {"body": "unet", "widths": [32, 64], "layers": 1, "groups": 8, "head_width": 8, "cross_width": 16}
TRAININGS: dict[str, dict[str, Any]] = {
    "latte": LATTE,
    "latte_of_pixels": {"kind": "finetune_latte", "size": [64, 64], "frames": 9, "model": {"preset": "latte_tiny"}},
    "memory": {"kind": "pretrain_memory"} | MEMORY,
    "prior": {"kind": "finetune_memory_prior"} | MEMORY,
    "tats": {"kind": "pretrain_tats", "tokens": "tokens", "model": {"preset": "tats_tiny"}},
    "vae": VAE | {"lambda_gan": 0, "frames": 9},
    "vae_against_a_discriminator": VAE | {"gan_start": 0, "gan_warmup": 0, "frames": 9},
    "vqgan": VQGAN | {"lambda_gan": 0},
    "sound": {"kind": "pretrain_sound_vqgan", "model": {"preset": "sound_vqgan_tiny"}},
    "encgan3": {"kind": "pretrain_encgan3", "model": {"preset": "encgan3_tiny"}, "recall": True, "gan_start": 0},
    "mavin": MAVIN,
    "mavin_unet": MAVIN | {"model": {"preset": "mavin_tiny"} | UNET},
}


def source(
    folder: Path, training: dict[str, Any], before: Mapping[str, Any] | None = None, **changes: Any
) -> fit.Source:
    """A training, with the stages before it, by default tiny ones, none of which has run."""
    return _written(folder, {**(before or BEFORE | {"low": LOW}), "training": COMMON | training | changes})


def of_another_library(folder: Path, lora: dict[str, Any] | None, **changes: Any) -> fit.Source:
    """A training of a tiny Wan."""
    base = str(pipeline_folder(folder / "wan"))
    training = {"kind": "finetune_backbone", "base": base, "latents": "own", "text": "/text", "frames": 9, "lora": lora}
    own = {"own": LATENTS | {"encoder": base}}
    return _written(folder, BEFORE | own | {"training": COMMON | training | changes})


def _written(folder: Path, stages: Mapping[str, Any]) -> fit.Source:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "workspace": str(folder / "ws"), "stages": dict(stages)}))
    return measured.source_of(str(path), "training")
