"""A folder with a public U-Net as diffusers writes it, without diffusers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from longtake.training.models.mavin.config import config_from_preset
from longtake.training.models.mavin.unet import UNet


def folder(path: Path, channels: int = 3, **changes: Any) -> str:
    """The random weights of a tiny one of ours, but for what no public one has."""
    torch.manual_seed(0)
    net = UNet(config_from_preset("mavin_unet_tiny", widths=(16, 32), channels=channels))
    path.mkdir(parents=True)
    weights = {name: value for name, value in net.state_dict().items() if "cond_proj" not in name}
    save_file(weights, path / "diffusion_pytorch_model.safetensors")
    described = {
        "_class_name": "UNet3DConditionModel",
        "block_out_channels": [16, 32],
        "layers_per_block": 2,
        "cross_attention_dim": 32,
        "attention_head_dim": 8,
        "norm_num_groups": 8,
        "in_channels": channels,
        "down_block_types": ["CrossAttnDownBlock3D", "DownBlock3D"],
        "up_block_types": ["UpBlock3D", "CrossAttnUpBlock3D"],
    }
    (path / "config.json").write_text(json.dumps(described | changes))
    return str(path)
