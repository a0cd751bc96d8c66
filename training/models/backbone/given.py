"""What a transformer needs of a window beside its latents, its time and its text."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from longtake.training.foreign.backbone import Backbone
from longtake.training.models.common.codec import Codec


def given(model: Backbone, batch: Mapping[str, Any], x0: Tensor, fps: float, codec: Codec | None) -> dict[str, Any]:
    """The further inputs of `Backbone.forward` for a batch of latents `x0` `(B, C, T, H, W)`.

    Args:
        fps: frames a second of the videos.
        codec: of the latents, for a model with channels for a start image.
    """
    found: dict[str, Any] = {"fps": fps}
    if model.config.sizes.pooled_width:
        # CLIP's pooled state is that of its last token
        last = (batch["pooled_mask"].sum(1) - 1).clamp(min=0)
        found["pooled"] = batch["pooled"][torch.arange(len(last), device=last.device), last]
    if model.config.sizes.image_channels:
        assert codec
        found["image"] = shown(codec, x0)
    return found


@torch.no_grad()
def shown(codec: Codec, x0: Tensor) -> Tensor:
    """Latents of videos that show the first frame of `x0`, decoded, and then grey, as the models' pipelines have them."""
    first = codec.decode(x0[:, :, :1].to(codec.dtype)).clamp(-1, 1)
    frames = (x0.shape[2] - 1) * codec.config.temporal_stride
    grey = first.new_zeros(*first.shape[:2], frames, *first.shape[3:])
    return codec.encode(torch.cat([first, grey], dim=2)).mode().float()
