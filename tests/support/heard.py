"""What the tests of sound share: a dataset with sound, and a VQGAN of it with random weights, in columns and folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import claps
import tats_stages
import tiny_codes
import torch
from priors import awake

from longtake.pipeline import windows
from longtake.training.models.tats.sound.vqgan import SoundVQGAN, config_from_preset
from longtake.training.models.tats.spectrogram import Spectrogram
from longtake.training.registry import disk

RATE = 48_000  # of Opus
PICTURE: dict[str, Any] = {"rows": 8, "columns": 8, "window": 0.01}
TINY: dict[str, Any] = {
    "preset": "sound_vqgan_tiny", "width": 4, "codes": 16, "code_width": 8, "downsample": (4, 4, 4),
}  # fmt: skip
SETTINGS: dict[str, Any] = {"frames": tats_stages.FRAMES, "hop": 4, "size": (16, 16)}


def dataset(folder: Path) -> str:
    """Clips of a second from four sources, of which one has no sound, in both splits."""
    sources = folder / "sources"
    sources.mkdir(parents=True)
    for number in range(3):
        claps.write(sources / f"{number}.mp4", seconds=2.2, times=(0.2 + 0.3 * number, 1.1, 1.7))
    claps.write(sources / "silent.mp4", seconds=1.1, codec=None)
    return claps.dataset_of(folder / "dataset", sorted(sources.iterdir()), {}, val_fraction=0.5)


def spectrogram(**changed: Any) -> Spectrogram:
    return Spectrogram(**{"rate": RATE} | PICTURE | changed)


def vqgan(seed: int = 0, **changed: Any) -> SoundVQGAN:
    """4 frames of 4 x 4 in a token of 16 codes: 4 tokens for a latent frame. Its codes are what it sees of noise."""
    model = SoundVQGAN(config_from_preset(**TINY | changed, spectrogram=spectrogram()))
    awake(model, seed)
    with torch.no_grad():
        seen = model.encode(model.pictures(noise(2.0, seed), 48)).mode().movedim(1, -1).flatten(0, 3)
        model.codebook.codes.copy_(seen[:: len(seen) // 16][:16])
        model.codebook.sums.copy_(model.codebook.codes)
    return model


def noise(seconds: float, seed: int = 0) -> torch.Tensor:
    """A sound `(1, n)` that is now loud and now faint."""
    rng = torch.Generator().manual_seed(seed)
    loudness = 10 ** (-3 * torch.rand(round(seconds * 24), generator=rng))
    return torch.randn(1, round(seconds * RATE), generator=rng) * 0.3 * loudness.repeat_interleave(RATE // 24)


def saved(model: SoundVQGAN, folder: Path) -> str:
    """The VQGAN as a model folder."""
    disk.save(folder, "sound_vqgan", model.config.model_dump(mode="json"), model.state_dict(), {"lineage": {}})
    return str(folder)


def settings(**changed: Any) -> windows.Settings:
    return tiny_codes.settings(**SETTINGS | changed)


def inputs(root: Path) -> dict[str, str]:
    """A dataset, and tokens of its videos and of their sound."""
    made = {"dataset": dataset(root)}
    model: Any
    for field, model, save in (("tokens", tats_stages.vqgan(), tats_stages.saved), ("audio_tokens", vqgan(), saved)):
        uri = save(model, root / f"{field}-model")
        made[field] = tiny_codes.record(root / field, made["dataset"], model, settings(), uri)
    return made
