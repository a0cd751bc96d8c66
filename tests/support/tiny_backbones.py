"""Tiny random transformers of diffusers, and a call of each."""

from typing import Any

import torch
from torch import Tensor, nn

WAN, LTX, HUNYUAN = "WanTransformer3DModel", "LTXVideoTransformer3DModel", "HunyuanVideoTransformer3DModel"
_HEADS = {"num_attention_heads": 1, "attention_head_dim": 12}
_CONFIGS: dict[str, dict[str, Any]] = {
    WAN: _HEADS | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "text_dim": 8, "freq_dim": 8, "ffn_dim": 16},
    LTX: _HEADS
    | {"num_layers": 2, "in_channels": 4, "out_channels": 4, "cross_attention_dim": 12, "caption_channels": 8},
    HUNYUAN: _HEADS
    | {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "in_channels": 4, "out_channels": 4}
    | {"text_embed_dim": 8, "pooled_projection_dim": 8, "rope_axes_dim": (4, 4, 4)},
}


def tiny_transformer(class_name: str, seed: int = 0, **more: Any) -> Any:
    """One in eval mode, of random weights."""
    import diffusers

    torch.manual_seed(seed)
    return getattr(diffusers, class_name)(**_CONFIGS[class_name] | more).eval()


@torch.no_grad()
def called(transformer: nn.Module) -> Tensor:
    """What it says of fixed noise."""
    generator = torch.Generator().manual_seed(7)
    text = torch.randn(1, 3, 8, generator=generator)
    noise = torch.randn(1, 4, 2, 4, 4, generator=generator)
    time = torch.tensor([500.0])
    mask = torch.ones(1, 3)
    inner: Any = transformer
    match getattr(inner, "base_model", inner).__class__.__name__:
        case "LTXVideoTransformer3DModel":
            tokens = noise.flatten(2).transpose(1, 2)
            output = inner(
                hidden_states=tokens,
                encoder_hidden_states=text,
                timestep=time,
                encoder_attention_mask=mask,
                num_frames=2,
                height=4,
                width=4,
            )
        case "HunyuanVideoTransformer3DModel":
            pooled, guidance = torch.randn(1, 8, generator=generator), torch.tensor([6000.0])
            output = inner(noise, time.long(), text, mask.long(), pooled, guidance=guidance)
        case _:
            output = inner(noise, time, text)
    return output.sample  # type: ignore[no-any-return]
