"""The row of WanTransformer3DModel: Wan 2.1 and 2.2, from text and from a start image.

A text is padded by zeros to 512 states, after its encoder, and all of them are attended to. A model from an image has
channels for it: noise, a mask of which frames are shown, and the codec's latents of a video that shows only those.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.foreign.backbone_config import BackboneConfig, Sizes
from longtake.training.foreign.backbone_inputs import Inputs, held, padded, positions_of, token_times
from longtake.training.foreign.front import Attending, Context, key_mask

TEXT_LENGTH = 512
STRIDE = (4, 8)
EVEN_TIMES = False
TARGETS = (r"net\.blocks\.\d+\.attn[12]\.to_(q|k|v|out\.0)", r"net\.blocks\.\d+\.ffn\.net\.(0\.proj|2)")
_THETA = 10000.0  # the class's own, of its rotation


def sizes(settings: Mapping[str, Any]) -> Sizes:
    """A model from an image takes more channels than it gives: a mask of as many as a latent has frames, then latents."""
    channels = int(settings.get("out_channels") or settings.get("in_channels", 16))
    time, rows, columns = settings.get("patch_size", (1, 2, 2))
    return Sizes(
        channels=channels,
        text_width=int(settings.get("text_dim", 4096)),
        width=int(settings.get("num_attention_heads", 40) * settings.get("attention_head_dim", 128)),
        patch=(int(time), int(rows), int(columns)),
        image_channels=int(settings.get("in_channels", 16)) - channels,
        image_width=int(settings.get("image_dim") or 0),
        longest=int(settings.get("rope_max_seq_len", 1024)),
    )


def build(make: Callable[..., Any], settings: Mapping[str, Any]) -> nn.Module:
    net: nn.Module = make(**settings)
    rope: Any = net.rope
    if rope.freqs_cos.is_meta:
        # no file has them: they are computed
        with torch.device("cpu"):
            net.rope = type(rope)(rope.attention_head_dim, rope.patch_size, rope.max_seq_len)
    for block in blocks(net):
        block.register_forward_hook(Attending())
        block.attn1.set_processor(_SelfAttention(block.attn1.processor))  # type: ignore[operator, union-attr]
        block.attn2.set_processor(_TextAttention(block.attn2.processor))  # type: ignore[operator, union-attr]
    return net


def blocks(net: Any) -> Iterator[nn.Module]:
    yield from net.blocks


def tokens(net: Any, x: Tensor) -> Tensor:
    missing = net.config.in_channels - x.shape[1]
    # without a start image its channels are zero
    x = torch.cat([x, x.new_zeros(len(x), missing, *x.shape[2:])], dim=1) if missing else x
    made: Tensor = net.patch_embedding(x).flatten(2).transpose(1, 2)
    return made


def velocity(net: Any, config: BackboneConfig, inputs: Inputs) -> Tensor:
    size = config.sizes
    inputs = _with_channels(inputs, config) if size.image_channels else held(inputs)
    if size.image_width and inputs.image_states is None:
        raise ValueError("image_states: this model attends to the states of its start image; give them")
    rows, columns = (side // patch for side, patch in zip(inputs.x.shape[3:], size.patch[1:], strict=True))
    text, context = _texts(inputs, config, rows * columns)
    with _extended(net, inputs, config, context):
        predicted: Tensor = net(
            inputs.x, token_times(inputs, rows * columns), text, inputs.image_states, return_dict=False
        )[0]
    return predicted


def _texts(inputs: Inputs, config: BackboneConfig, in_frame: int) -> tuple[Tensor, Context | None]:
    """The states that the class embeds, and what then comes of them where tokens attend to different texts.

    A `Context` of `(text, seen, none, ahead, states)` whose `text` and `none` are yet to be cut from what is embedded.
    """
    length, front = config.longest_text, inputs.front
    if inputs.seen.ndim == 2:
        text, seen = padded(inputs.text, inputs.seen, length), None
    else:
        text, seen = _padded_by_latent(inputs.text, inputs.seen, length)
        seen = seen.repeat_interleave(in_frame, dim=1)
    if front is None and seen is None:
        return text, None
    if not len(inputs.none):
        raise ValueError('text: this model does not know the states of "" yet, to which tokens in front attend')
    none = padded(inputs.none[None], torch.ones(1, len(inputs.none), dtype=torch.bool), length).expand(
        len(text), -1, -1
    )
    ahead, states = (0, None) if front is None else (front.tokens.shape[1], front.states)
    return torch.cat([text, none], dim=1), Context(text, seen, none, ahead, states)


def _padded_by_latent(text: Tensor, seen: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """States and `length` zeros behind them; each latent `(B, T, N)` sees as many of these as make `length` with its text."""
    missing = length - seen.sum(-1, keepdim=True)
    if bool((missing < 0).any()):
        raise ValueError(f"text has {int(seen.sum(-1).max())} tokens; this model takes {length}: shorten it")
    zeros = torch.arange(length, device=text.device) < missing
    return torch.cat([text, text.new_zeros(len(text), length, text.shape[2])], dim=1), torch.cat([seen, zeros], dim=-1)


class _SelfAttention:
    """The class's own self-attention; its rotation may bring a mask along, which the class has no argument for."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, attn: Any, x: Tensor, text: None, mask: None, rotation: tuple[Tensor, ...]) -> Tensor:
        made: Tensor = self.own(attn, x, text, rotation[2] if len(rotation) == 3 else None, rotation[:2])
        return made


class _TextAttention:
    """The class's own attention to a text, or to the texts of a `Context`."""

    def __init__(self, own: Any) -> None:
        self.own = own

    def __call__(self, attn: Any, x: Tensor, text: Tensor | Context, mask: None, rotation: None = None) -> Tensor:
        if not isinstance(text, Context):
            made: Tensor = self.own(attn, x, text, None, None)
            return made
        front, window = x[:, : text.ahead], x[:, text.ahead :]
        parts = [self.own(attn, front, text.none, None, None)] if text.ahead else []
        parts.append(self.own(attn, window, text.text, None if text.seen is None else text.seen[:, None], None))
        return torch.cat(parts, dim=1)


def _with_channels(inputs: Inputs, config: BackboneConfig) -> Inputs:
    """The latents with the channels of a start image, its mask first: as many as a latent has frames."""
    x, image = inputs.x, inputs.image
    if image is None:
        raise ValueError("image: this model goes on from a start image; give its latents")
    if image.shape != x.shape:
        raise ValueError(f"image has shape {tuple(image.shape)}; a window of {tuple(x.shape)} needs latents like it")
    mask = x.new_zeros(len(x), config.sizes.image_channels - x.shape[1], *x.shape[2:])
    mask[:, :, 0] = 1
    return inputs._replace(x=torch.cat([x, mask, image], dim=1), image=None)


@contextmanager
def _extended(net: Any, inputs: Inputs, config: BackboneConfig, context: Context | None) -> Iterator[None]:
    """Let the class's own forward have tokens in front, other positions, a mask and other texts, for the block."""
    front, hooks = inputs.front, []
    if front is not None:
        # the class flattens `(B, D, T, H, W)`, of which only the order of the tokens counts
        def with_front(_: nn.Module, __: Any, made: Tensor) -> Tensor:
            return torch.cat([front.tokens.transpose(1, 2), made.flatten(2)], dim=2)[:, :, None, None]

        def without(_: nn.Module, __: Any, made: Tensor) -> Tensor:
            return made[:, front.tokens.shape[1] :]

        hooks += [net.patch_embedding.register_forward_hook(with_front), net.proj_out.register_forward_hook(without)]
    if context is not None:
        length = config.longest_text

        def with_context(_: nn.Module, __: Any, made: tuple[Any, ...]) -> tuple[Any, ...]:
            text, none = made[2].tensor_split([made[2].shape[1] - length], dim=1)
            return (*made[:2], context._replace(text=text, none=none), *made[3:])

        hooks.append(net.condition_embedder.register_forward_hook(with_context))
    mask = key_mask(inputs, config.patch)
    if front is not None or inputs.places is not None or mask is not None:
        rotation = _rotation(positions_of(inputs, config.patch), net.rope)
        turned = rotation if mask is None else (*rotation, mask)
        hooks.append(net.rope.register_forward_hook(lambda *_: turned))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _rotation(positions: Tensor, rope: Any) -> tuple[Tensor, Tensor]:
    """The cosines and sines `(1 or B, N, 1, head)` of the class's rotation at any positions `(1 or B, N, 3)`."""
    angles = []
    for axis, size in enumerate((rope.t_dim, rope.h_dim, rope.w_dim)):
        rates = _THETA ** -(torch.arange(0, size, 2, device=positions.device).double() / size)
        angles.append((positions[..., axis, None] * rates).repeat_interleave(2, dim=-1))
    turned = torch.cat(angles, dim=-1)[:, :, None]
    return turned.cos().float(), turned.sin().float()
