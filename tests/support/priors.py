"""What the tests of priors share: random weights, an autoencoder to decode with, and commands run in this process."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from click.testing import CliRunner, Result
from torch import nn

from longtake.datasets import clip
from longtake.infra.cli import cli
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import disk


def awake(model: nn.Module, seed: int = 0) -> Any:
    """Random weights, also where a layer starts at zero."""
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.15, generator=rng)
    return model.eval()


def save_vae(folder: Path) -> PVVAE:
    """Save a tiny autoencoder of 8 channels, a stride of 16 and 4 frames in a latent."""
    vae: PVVAE = awake(PVVAE(config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8)))
    disk.save(folder, "pv_vae", vae.config.model_dump(mode="json"), vae.state_dict(), {"lineage": {}})
    return vae


def longtake(*arguments: object) -> Result:
    """Run a command; raises what it raises."""
    result = CliRunner().invoke(cli, [str(a) for a in arguments], standalone_mode=False)
    if result.exception:
        raise result.exception
    return result


def frames_of(path: Path) -> np.ndarray:
    return clip.decode(path.read_bytes())
