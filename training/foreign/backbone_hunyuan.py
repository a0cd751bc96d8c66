"""The row of HunyuanVideoTransformer3DModel: text and video in one sequence, a vector of each text, guidance as an input.

Its class has one time for a whole window. Here its blocks take one for each token too (`Times`), by the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtake.training.foreign.backbone_config import BackboneConfig, Sizes
from longtake.training.foreign.backbone_inputs import STEPS, Inputs, held

TEXT_LENGTH = 256
STRIDE = (4, 8)
EVEN_TIMES = True
TARGETS = (
    r"net\.transformer_blocks\.\d+\.attn\.(to_(q|k|v|out\.0|add_out)|add_(q|k|v)_proj)",
    r"net\.transformer_blocks\.\d+\.ff(_context)?\.net\.(0\.proj|2)",
    r"net\.single_transformer_blocks\.\d+\.(attn\.to_(q|k|v)|proj_mlp|proj_out)",
)


def sizes(settings: Mapping[str, Any]) -> Sizes:
    if settings.get("image_condition_type") is not None:
        raise ValueError(
            "settings: image_condition_type: HunyuanVideo from an image is not known here; use one from text"
        )
    side = int(settings.get("patch_size", 2))
    return Sizes(
        channels=int(settings.get("in_channels", 16)),
        text_width=int(settings.get("text_embed_dim", 4096)),
        width=int(settings.get("num_attention_heads", 24) * settings.get("attention_head_dim", 128)),
        patch=(int(settings.get("patch_size_t", 1)), side, side),
        pooled_width=int(settings.get("pooled_projection_dim", 768)),
        embeds_guidance=bool(settings.get("guidance_embeds", True)),
    )


def build(make: Callable[..., Any], settings: Mapping[str, Any]) -> nn.Module:
    net: Any = make(**settings)
    double, single, last = _classes()
    for block in net.transformer_blocks:
        block.__class__ = double
    for block in net.single_transformer_blocks:
        block.__class__ = single
    net.norm_out.__class__ = last
    return net


def blocks(net: Any) -> Iterator[nn.Module]:
    yield from net.transformer_blocks
    yield from net.single_transformer_blocks


def tokens(net: Any, x: Tensor) -> Tensor:
    made: Tensor = net.x_embedder(x)
    return made


def velocity(net: Any, config: BackboneConfig, inputs: Inputs) -> Tensor:
    inputs = held(inputs)
    guidance = None
    if config.sizes.embeds_guidance:
        strength = config.embedded_guidance if inputs.guidance is None else inputs.guidance
        guidance = inputs.x.new_full((len(inputs.x),), strength) * STEPS
    elif inputs.guidance is not None:
        raise ValueError("guidance: is no input of this model; lead it away from no text instead")
    # of a window with clean latents the text has the time of the noisy ones
    time = inputs.t if inputs.t.ndim == 1 else inputs.t.amax(dim=1)
    with _timed(net, inputs, config.sizes.patch):
        predicted: Tensor = net(
            hidden_states=inputs.x,
            timestep=time * STEPS,
            encoder_hidden_states=inputs.text,
            encoder_attention_mask=inputs.seen.to(inputs.x.dtype),
            pooled_projections=inputs.pooled,
            guidance=guidance,
            return_dict=False,
        )[0]
    return predicted


class Times(NamedTuple):
    """Embedded times in the place of the class's one: of the text `(B, D)`; of frames `(B, F, D)`, and each token's frame."""

    text: Tensor
    frames: Tensor
    frame_of: Tensor

    def modulation(self, layer: Any, parts: int) -> tuple[Tensor, ...]:
        """What a norm's linear layer makes of the frames' times: `parts` tensors `(B, tokens, D)`."""
        return layer.linear(layer.silu(self.frames)).chunk(parts, dim=-1)

    def of_tokens(self, made: Tensor) -> Tensor:
        return made[:, self.frame_of]


@contextmanager
def _timed(net: Any, inputs: Inputs, patch: tuple[int, int, int]) -> Iterator[None]:
    """Let the class's own forward have times of latents, for the block."""
    if inputs.t.ndim == 1:
        yield
        return
    hook = net.time_text_embed.register_forward_hook(_times_of(inputs, patch))
    try:
        yield
    finally:
        hook.remove()


def _times_of(inputs: Inputs, patch: tuple[int, int, int]) -> Callable[..., tuple[Times, None]]:
    """A hook that embeds the time of each frame as the class embeds that of a window."""
    x, t = inputs.x, inputs.t[:, :: patch[0]]
    count, rows, columns = (side // size for side, size in zip(x.shape[2:], patch, strict=True))
    frame_of = torch.arange(count, device=x.device).repeat_interleave(rows * columns)

    def embedded(module: Any, given: tuple[Tensor, Tensor, Tensor | None], made: tuple[Tensor, None]) -> Any:
        _, pooled, guidance = given
        repeated = (None if part is None else part.repeat_interleave(t.shape[1], dim=0) for part in (pooled, guidance))
        frames = type(module).forward(module, t.flatten() * STEPS, *repeated)[0]
        return Times(made[0], frames.unflatten(0, t.shape), frame_of), made[1]

    return embedded


@cache
def _classes() -> tuple[type, type, type]:
    """The class's two kinds of blocks and its last norm, which also take `Times`."""
    from diffusers.models.normalization import AdaLayerNormContinuous
    from diffusers.models.transformers.transformer_hunyuan_video import (
        HunyuanVideoSingleTransformerBlock,
        HunyuanVideoTransformerBlock,
    )

    class Double(HunyuanVideoTransformerBlock):
        """Text and video with weights of their own, and joint attention."""

        def forward(self, x: Tensor, text: Tensor, times: Any, mask: Any = None, rotary: Any = None, *_: Any) -> Any:
            if not isinstance(times, Times):
                return super().forward(x, text, times, mask, rotary)
            own = times.modulation(self.norm1, 6)
            shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = (times.of_tokens(part) for part in own)
            words, text_gate, *text_mlp = self.norm1_context(text, emb=times.text)
            seen = self.norm1.norm(x) * (1 + scale) + shift
            mixed, text_mixed = self.attn(
                hidden_states=seen, encoder_hidden_states=words, attention_mask=mask, image_rotary_emb=rotary
            )
            x = x + gate * mixed
            x = x + mlp_gate * self.ff(self.norm2(x) * (1 + mlp_scale) + mlp_shift)
            text = text + text_gate[:, None] * text_mixed
            text_shift, text_scale, text_mlp_gate = (part[:, None] for part in text_mlp)
            inside = self.ff_context(self.norm2_context(text) * (1 + text_scale) + text_shift)
            return x, text + text_mlp_gate * inside

    class Single(HunyuanVideoSingleTransformerBlock):
        """Text behind the video, with the same weights."""

        def forward(self, x: Tensor, text: Tensor, times: Any, mask: Any = None, rotary: Any = None, *_: Any) -> Any:
            if not isinstance(times, Times):
                return super().forward(x, text, times, mask, rotary)
            count, both = text.shape[1], torch.cat([x, text], dim=1)
            of_text = self.norm.linear(self.norm.silu(times.text))[:, None].expand(-1, count, -1)
            of_video = times.of_tokens(self.norm.linear(self.norm.silu(times.frames)))
            shift, scale, gate = torch.cat([of_video, of_text], dim=1).chunk(3, dim=-1)
            normed = self.norm.norm(both) * (1 + scale) + shift
            mixed = self.attn(
                hidden_states=normed[:, :-count],
                encoder_hidden_states=normed[:, -count:],
                attention_mask=mask,
                image_rotary_emb=rotary,
            )
            inside = self.act_mlp(self.proj_mlp(normed))
            both = both + gate * self.proj_out(torch.cat([torch.cat(mixed, dim=1), inside], dim=2))
            return both[:, :-count], both[:, -count:]

    class Last(AdaLayerNormContinuous):
        """The norm before the last layer."""

        def forward(self, x: Tensor, times: Any) -> Tensor:
            if not isinstance(times, Times):
                return super().forward(x, times)
            scale, shift = (times.of_tokens(part) for part in times.modulation(self, 2))
            return self.norm(x) * (1 + scale) + shift

    return Double, Single, Last
