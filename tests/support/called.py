"""What a tiny transformer of diffusers (see tiny_foreign) says of fixed noise, and whether two say the same."""

from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def called(transformer: Any) -> Tensor:
    """Its output for noise of its channels, with text; (1, C, 2, 4, 4), packed for LTX."""
    generator = torch.Generator().manual_seed(7)
    settings = transformer.config
    noise = torch.randn(1, settings.in_channels, 2, 4, 4, generator=generator)
    text = torch.randn(1, 3, settings.get("text_dim") or settings.get("text_embed_dim") or 32, generator=generator)
    time, seen = torch.tensor([500.0]), torch.ones(1, 3)
    match type(transformer).__name__:
        case "LTXVideoTransformer3DModel":
            tokens = noise.flatten(2).transpose(1, 2)
            return transformer(tokens, text, time, seen, num_frames=2, height=4, width=4).sample  # type: ignore[no-any-return]
        case "HunyuanVideoTransformer3DModel":
            pooled = torch.randn(1, settings.pooled_projection_dim, generator=generator)
            return transformer(noise, time.long(), text, seen.long(), pooled, guidance=time).sample  # type: ignore[no-any-return]
        case _:
            return transformer(noise, time, text).sample  # type: ignore[no-any-return]


def assert_close(one: Tensor, other: Tensor) -> None:
    """Two outputs are the same but for rounding: within 2e-6 of the largest value."""
    assert one.shape == other.shape
    assert (one - other).abs().max() <= 2e-6 * other.abs().max()
