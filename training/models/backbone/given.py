"""What a transformer needs of a window beside its latents, its time and its text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longtake.training.foreign.backbone import Backbone
from longtake.training.models.common.codec import Codec
from longtake.training.models.common.condition import pooled_of


def given(model: Backbone, batch: Mapping[str, Any], x0: Tensor, fps: float, codec: Codec | None) -> dict[str, Any]:
    """The further inputs of `Backbone.forward` for a batch of latents `x0` `(B, C, T, H, W)`.

    Args:
        fps: frames a second of the videos.
        codec: of the latents, for a model with channels for a start image.
    """
    found: dict[str, Any] = {"fps": fps}
    if model.config.sizes.pooled_width:
        found["pooled"] = pooled_of(batch["pooled"], batch["pooled_mask"])
    if model.config.sizes.image_channels:
        assert codec
        with torch.no_grad():
            first = codec.decode(x0[:, :, :1].to(codec.dtype)).clamp(-1, 1)
        found["image"] = start_image(codec, first, x0.shape[2])
    return found


@torch.no_grad()
def start_image(codec: Codec, first: Tensor, latents: int) -> Tensor:
    """So many latents of videos that show frames `(B, 3, 1, H, W)` and then grey, as the models' pipelines have them: fp32."""
    grey = first.new_zeros(*first.shape[:2], (latents - 1) * codec.config.temporal_stride, *first.shape[3:])
    return codec.encode(torch.cat([first, grey], dim=2)).mode().float()
