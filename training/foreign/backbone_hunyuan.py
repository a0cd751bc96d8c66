"""The row of HunyuanVideoTransformer3DModel: text and video in one sequence, a vector of each text, guidance as an input.

Its class has one time for a whole window. Here its blocks take one for each token too (`Times`), by the same weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.training.foreign.backbone_config import BackboneConfig, Sizes
from longtake.training.foreign.backbone_inputs import STEPS, Inputs, held, positions_of
from longtake.training.foreign.front import Attending, key_mask

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
    for block in blocks(net):
        block.register_forward_hook(_Attending())
        block.attn.set_processor(_Attention(block.attn.processor))  # type: ignore[operator, union-attr]
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
    with _in_front(net, inputs, config.sizes.patch):
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
    """Embedded times in the place of the class's one, and what else blocks are given of tokens in front and of latents.

    text      of the text, `(B, D)`
    frames    of frames, `(B, F, D)`; the first one is that of the tokens in front, if there are any
    frame_of  the frame of each token, `(M + N,)`
    seen      `(B, 1, 1, M + N)` bool, which tokens but those of the text are there; None: all
    ahead     M
    states    see `Front`
    """

    text: Tensor
    frames: Tensor
    frame_of: Tensor
    seen: Tensor | None = None
    ahead: int = 0
    states: tuple[Any, ...] | None = None

    def modulation(self, layer: Any, parts: int) -> tuple[Tensor, ...]:
        """What a norm's linear layer makes of the frames' times: `parts` tensors `(B, tokens, D)`."""
        return layer.linear(layer.silu(self.frames)).chunk(parts, dim=-1)

    def of_tokens(self, made: Tensor) -> Tensor:
        return made[:, self.frame_of]

    def masked(self, mask: Tensor | None) -> Tensor | None:
        """The class's mask of all keys, `(B, 1, 1, M + N + text)`, without the tokens that a sample does not have."""
        if self.seen is None or mask is None:
            return mask
        count = self.seen.shape[-1]
        return torch.cat([mask[..., :count] & self.seen, mask[..., count:]], dim=-1)


class _Attending(Attending):
    """The hook of a block whose `Times` come as its third argument, and which gives its text too."""

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], made: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        times = inputs[2]
        if not isinstance(times, Times):
            return made
        return self.added(made[0], times.ahead, times.states), made[1]


@contextmanager
def _in_front(net: Any, inputs: Inputs, patch: tuple[int, int, int]) -> Iterator[None]:
    """Let the class's own forward have times of tokens, tokens in front and other positions, for the block."""
    front, hooks = inputs.front, []
    if front is not None:
        hooks.append(net.x_embedder.register_forward_hook(lambda _, __, made: torch.cat([front.tokens, made], dim=1)))
        hooks.append(net.proj_out.register_forward_hook(lambda _, __, made: made[:, front.tokens.shape[1] :]))
    if front is not None or inputs.present is not None or inputs.t.ndim == 2:
        hooks.append(net.time_text_embed.register_forward_hook(_times_of(inputs, patch)))
    if front is not None or inputs.places is not None:
        rotation = _rotation(positions_of(inputs, patch), net.rope)
        hooks.append(net.rope.register_forward_hook(lambda *_: rotation))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _times_of(inputs: Inputs, patch: tuple[int, int, int]) -> Callable[..., tuple[Times, None]]:
    """A hook that embeds the time of each frame, and of the tokens in front, as the class embeds that of a window."""
    x, front = inputs.x, inputs.front
    count, rows, columns = (side // size for side, size in zip(x.shape[2:], patch, strict=True))
    t = inputs.t[:, None].expand(-1, count) if inputs.t.ndim == 1 else inputs.t[:, :: patch[0]]
    frame_of = torch.arange(count, device=x.device).repeat_interleave(rows * columns)
    if front is not None:
        ahead = torch.zeros_like(t[:, :1]) if front.time is None else front.time.to(t)[:, None]
        t = torch.cat([ahead, t], dim=1)
        frame_of = torch.cat([frame_of.new_zeros(front.tokens.shape[1]), frame_of + 1])

    seen = key_mask(inputs, patch)

    def embedded(module: Any, given: tuple[Tensor, Tensor, Tensor | None], made: tuple[Tensor, None]) -> Any:
        _, pooled, guidance = given
        repeated = (None if part is None else part.repeat_interleave(t.shape[1], dim=0) for part in (pooled, guidance))
        frames = type(module).forward(module, t.flatten() * STEPS, *repeated)[0]
        ahead, states = (0, None) if front is None else (front.tokens.shape[1], front.states)
        return Times(made[0], frames.unflatten(0, t.shape), frame_of, seen, ahead, states), made[1]

    return embedded


def _rotation(positions: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
    """The class's rotation at any positions `(1 or B, N, 3)`: cosines and sines `(N, head)`, or `(B, N, head)`."""
    from diffusers.models.embeddings import get_1d_rotary_pos_embed

    axes = zip(rope.rope_dim, positions.float().flatten(0, 1).unbind(-1), strict=True)
    parts = [get_1d_rotary_pos_embed(size, at, rope.theta, use_real=True) for size, at in axes]
    turned = (torch.cat(both, dim=1).unflatten(0, positions.shape[:2]) for both in zip(*parts, strict=True))
    cos, sin = (part[0] if len(part) == 1 else part for part in turned)
    return cos, sin


class _Attention:
    """The class's own attention, which gives all samples one rotation; the same with one for each."""

    def __init__(self, own: Any) -> None:
        self.own = own

    # the names are those that the library looks for
    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        x, text, rotation = hidden_states, encoder_hidden_states, image_rotary_emb
        if rotation is None or rotation[0].ndim == 2:
            made: tuple[Tensor, Tensor] = self.own(attn, x, text, attention_mask, rotation)
            return made
        count, apart = x.shape[1], attn.add_q_proj is not None

        def headed(*layers: Any, of: Tensor) -> list[Tensor]:
            return [layer(of).unflatten(2, (attn.heads, -1)) for layer in layers]

        query, key, value = headed(attn.to_q, attn.to_k, attn.to_v, of=x if apart else torch.cat([x, text], dim=1))
        query, key = attn.norm_q(query), attn.norm_k(key)
        query, key = (torch.cat([_turned(part[:, :count], rotation), part[:, count:]], dim=1) for part in (query, key))
        if apart:
            words = headed(attn.add_q_proj, attn.add_k_proj, attn.add_v_proj, of=text)
            words[:2] = attn.norm_added_q(words[0]), attn.norm_added_k(words[1])
            query, key, value = (torch.cat(both, dim=1) for both in zip((query, key, value), words, strict=True))
        query, key, value = (part.transpose(1, 2) for part in (query, key, value))
        mixed = F.scaled_dot_product_attention(query, key, value, attention_mask).transpose(1, 2).flatten(2)
        x, text = mixed.tensor_split([count], dim=1)
        return (attn.to_out[0](x), attn.to_add_out(text)) if apart else (x, text)


def _turned(x: Tensor, rotation: tuple[Tensor, Tensor]) -> Tensor:
    """Turn pairs of channels of `(B, N, heads, head)`, as the class does, in fp32."""
    cos, sin = (part[:, :, None].to(x.device) for part in rotation)
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return (x.float() * cos + torch.stack([-odd, even], dim=-1).flatten(3) * sin).to(x.dtype)


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
                hidden_states=seen,
                encoder_hidden_states=words,
                attention_mask=times.masked(mask),
                image_rotary_emb=rotary,
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
                attention_mask=times.masked(mask),
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
