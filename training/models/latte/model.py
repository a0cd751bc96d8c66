"""Latte (arXiv 2401.03048): a diffusion transformer over video latents, the prior of PV-VAE (arXiv 2605.02134).

Every latent position is a token. Blocks alternate between attention among the positions of each frame and attention
among the frames of each position. The time of the flow and, if the model has classes, the class enter through adaLN-Zero
(arXiv 2212.09748): they shift, scale and gate every block, and every gate starts closed. If the model has text, every block
also attends to it (`common/text.py`).

Ranks that share a window (`common/sequence.py`) have each a slice of the positions, of all frames. So attention over time
needs no other rank, and only attention over space exchanges tokens for heads. Frames would be the other choice, but there
are few of them, and they seldom divide.

Two things are not in the papers. Each frame has its own time, so that leading frames can be clean (`flow.py`). A window
knows whether it begins its clip. With both, `sample.generate` can continue a video without end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from longtake.training.models.common.causal import fold, unfold
from longtake.training.models.common.condition import Condition, Hidden, class_vectors, draw_hidden
from longtake.training.models.common.dit import (
    Modulation,
    attention,
    embedded_time,
    frequencies,
    modulated,
    sincos,
    start_weights,
)
from longtake.training.models.common.recompute import Share, called, chosen
from longtake.training.models.common.sequence import SequenceGroup, Shares, own, shares_of, to_heads, to_tokens, whole
from longtake.training.models.common.statistics import Normalising
from longtake.training.models.common.text import TextAttention, TextIn, check_fields, text_tokens

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {  # parameters with 64 channels, patch 1, no classes
    "latte_xl":   dict(depth=28, width=1152, heads=16),  # 674M
    "latte_l":    dict(depth=24, width=1024, heads=16),  # 457M
    "latte_b":    dict(depth=12, width=768,  heads=12),  # 129M
    "latte_s":    dict(depth=12, width=384,  heads=6),   # 33M
    "latte_tiny": dict(depth=4,  width=128,  heads=4),   # 1.3M
}
# fmt: on


class LatteConfig(BaseModel):
    """The numbers of one Latte. "Assumption" marks what the papers do not say.

    depth           blocks, even: one over space, one over time, and so on [paper: 28 for XL]
    width           channels of a token, a multiple of 4 and of `heads` [paper: 1152]
    heads           of the attention [paper: 16]
    channels        of the input: 64 for PV-VAE latents, 3 for pixels
    patch           positions along one side of a token: 1 for PV-VAE latents [paper]; 16 gives pixels as many tokens
    mlp_ratio       hidden width of the MLPs over `width` [paper: 4]
    classes         number of classes, with ids 0..classes-1; 0 is an unconditional model
    label_dropout   probability that training hides a class, for guidance [paper: 0.1]
    text_width, text_dropout, text_null, text_empty, text_padding, text_length   of text (see `common.text`)
    conditioning    probability that a training sample has clean leading frames [assumption: 0.3]; the objective draws
                    them (`flow.training_loss`). A model with 0 cannot continue beyond one window.
    shape           (latents, height, width) of its training windows, the default of `sample.generate`
    scale           factors on row and column positions; less than 1 spreads a frame over the positions of the smaller
                    frames that a base has learned [PixArt-α, arXiv 2310.00426]
    activation_checkpointing   share of the blocks that the backward pass recomputes, true is all: less memory, more time
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    channels: PositiveInt = 64
    patch: PositiveInt = 1
    mlp_ratio: PositiveInt = 4
    classes: NonNegativeInt = 0
    label_dropout: float = Field(0.1, ge=0, le=1)
    text_width: NonNegativeInt = 0
    text_dropout: float = Field(0.1, ge=0, le=1)
    text_null: Literal["empty", "zeros", "learned"] = "empty"
    text_empty: NonNegativeInt = 0
    text_padding: Literal["mask", "zeros"] = "mask"
    text_length: PositiveInt = 512
    conditioning: float = Field(0.3, ge=0, le=1)
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    scale: tuple[PositiveFloat, PositiveFloat] = (1.0, 1.0)
    activation_checkpointing: Share = False

    @model_validator(mode="after")
    def _divides(self) -> LatteConfig:
        if self.depth % 2:
            raise ValueError(f"depth is {self.depth}; blocks over space and time alternate, so it must be even")
        if self.width % self.heads or self.width % 4:
            raise ValueError(f"width is {self.width}; it must be a multiple of 4 and of heads, {self.heads}")
        if self.shape and (self.shape[1] % self.patch or self.shape[2] % self.patch):
            raise ValueError(f"shape: {self.shape[1]}x{self.shape[2]} is no multiple of patch {self.patch}")
        check_fields(self)
        return self


def config_from_preset(preset: str, **overrides: Any) -> LatteConfig:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return LatteConfig(**PRESETS[preset] | overrides)


class Block(nn.Module):
    """Attention among the tokens of a frame (`space`) or the frames of a token's position (`time`), then an MLP.

    Between the two the tokens attend to the text, where the model has it. Tokens `(B, T, N, D)`, their control
    `(B, T or 1, D)` and what `TextIn` returns -> tokens. Starts as the identity. `shares` are of ranks with a slice of the
    positions each.
    """

    def __init__(self, config: LatteConfig, over: Literal["space", "time"]) -> None:
        super().__init__()
        width = config.width
        self.heads, self.over = config.heads, over
        self.modulation = Modulation(width, 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        hidden = config.mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.text = TextAttention(width, config.heads) if config.text_width else None

    def forward(
        self,
        x: Tensor,
        control: Tensor,
        text: Tensor | None = None,
        text_seen: Tensor | None = None,
        shares: Shares | None = None,
    ) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(control)
        x = (x + gate * self._attention(modulated(x, shift, scale), shares)).to(x.dtype)
        if self.text is not None and text is not None:
            x = x + self.text(x, text, text_seen)
        return (x + mlp_gate * self.mlp(modulated(x, mlp_shift, mlp_scale))).to(x.dtype)

    def _attention(self, x: Tensor, shares: Shares | None) -> Tensor:
        if self.over == "time":
            x = x.transpose(1, 2)
        rows = self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        if shares is not None and self.over == "space":
            mixed = to_tokens(attention(*to_heads(rows.unbind(0), shares)), shares)
        else:
            mixed = attention(*rows)
        mixed = self.out(mixed.transpose(1, 2).flatten(2)).unflatten(0, x.shape[:2])
        return mixed.transpose(1, 2) if self.over == "time" else mixed


class Latte(Normalising):
    """Velocity of the rectified flow at x_t `(B, C, T, H, W)`, normalised, for any T and any H, W in multiples of `patch`.

    Inputs are cast to the dtype of the weights; outputs have it.
    """

    sequence: SequenceGroup | None = None  # ranks that share a window

    def __init__(self, config: LatteConfig) -> None:
        super().__init__(config.channels)
        self.config = config
        width, token = config.width, config.channels * config.patch**2
        self.token_in = nn.Linear(token, width)
        self.time_in = embedded_time(width)
        self.class_in = nn.Embedding(config.classes + 1, width) if config.classes else None  # the last row: no class
        self.text_in = TextIn(config) if config.text_width else None
        self.layers = nn.ModuleList(Block(config, ("space", "time")[i % 2]) for i in range(config.depth))
        self.modulation_out = Modulation(width, 2)
        self.token_out = nn.Linear(width, token)
        start_weights(self)
        nn.init.zeros_(self.token_out.weight)
        for block in self.blocks():
            if block.text is not None:
                block.text.start()

    @property
    def dtype(self) -> torch.dtype:
        return self.token_in.weight.dtype

    def blocks(self) -> Iterator[Block]:
        """The blocks in order, for example for `block.compile()`."""
        yield from self.layers  # type: ignore[misc]

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        start: Tensor | int = 0,
        rng: torch.Generator | None = None,
    ) -> Tensor:
        """The velocity.

        t           0 (data) to 1 (noise): `(B,)`, or `(B, T)` with 0 for clean frames
        condition   of the batch; None is an empty one. In training mode a share `label_dropout` of the samples loses
                    its class, and `text_dropout` its text, drawn from `rng` (on the device of `x`).
        start       index of the first frame in its clip, one for all or `(B,)`. Only whether it is 0 matters: the
                    first latent of a clip stands for one frame, all others for a group.

        Raises:
            ValueError: another shape, a class id that the model does not know, or text for a model without.
        """
        hidden, control, shares = self._hidden(x, t, condition, start, rng, self.config.depth)
        tokens = whole(self.token_out(modulated(hidden, *self.modulation_out(control))), shares, 2)
        height, width = (side // self.config.patch for side in x.shape[3:])
        return unfold(tokens.unflatten(2, (height, width)).movedim(-1, 1), 1, self.config.patch)

    def features(
        self, x: Tensor, t: Tensor, layer: int, condition: Condition | None = None, start: Tensor | int = 0
    ) -> Tensor:
        """Hidden states after block `layer`, 1..depth (the paper probes 14 of 28): `(B, width, T, H/patch, W/patch)`."""
        if not 1 <= layer <= self.config.depth:
            raise ValueError(f"layer is {layer}; this model has blocks 1 to {self.config.depth}")
        hidden, _, shares = self._hidden(x, t, condition, start, None, layer)
        height, width = (side // self.config.patch for side in x.shape[3:])
        return whole(hidden, shares, 2).unflatten(2, (height, width)).movedim(-1, 1)

    def _hidden(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | None,
        start: Tensor | int,
        rng: torch.Generator | None,
        layers: int,
    ) -> tuple[Tensor, Tensor, Shares | None]:
        """Tokens `(B, T, N, D)` after the first `layers` blocks, their control `(B, T or 1, D)`, and who has which of N."""
        self._check_shapes(x, t)
        times = t[:, None] if t.ndim == 1 else t
        control = self.time_in(frequencies(times).to(self.dtype))
        dropouts = (self.config.label_dropout, self.config.text_dropout)
        lost = draw_hidden(condition, x, *dropouts, rng) if self.training else Hidden()
        vectors = class_vectors(self.class_in, condition, x, lost.classes)
        if vectors is not None:
            control = control + vectors[:, None]
        text = text_tokens(self.text_in, condition, x, lost.text)
        patches = fold(x.to(self.dtype), 1, self.config.patch).movedim(1, -1)  # (B, T, h, w, C p p)
        places = self._positions(patches.shape, start, x.device).flatten(2, 3)
        shares = shares_of(self.sequence, places.shape[2])
        tokens = self.token_in(own(patches.flatten(2, 3), shares, 2)) + own(places, shares, 2)
        again = self.config.activation_checkpointing if self.training else 0.0
        for number, block in enumerate(list(self.layers)[:layers]):
            tokens = called(chosen(again, number, self.config.depth), block, tokens, control, *text, shares)
        return tokens, control, shares

    def _positions(self, shape: Sequence[int], start: Tensor | int, device: torch.device) -> Tensor:
        """The sum of the embeddings of frame, row and column: `(B or 1, T, h, w, D)` in the dtype of the weights."""
        frames, height, width = shape[1:4]
        if not isinstance(start, Tensor):
            # a number of the host is written by a kernel: a copy of it would wait for the device, in each solver step
            start = torch.full((), start, device=device)
        later = (start.to(device).reshape(-1, 1) > 0).long()
        time = sincos(torch.arange(frames, device=device) + later, self.config.width)
        rows, columns = (
            sincos((torch.arange(n, device=device) + 0.5) * scale - 0.5, self.config.width // 2)
            for n, scale in zip((height, width), self.config.scale, strict=True)
        )
        space = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
        return (time[:, :, None, None] + space).to(self.dtype)

    def _check_shapes(self, x: Tensor, t: Tensor) -> None:
        patch = self.config.patch
        if x.ndim != 5 or x.shape[1] != self.config.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; Latte needs (B, {self.config.channels}, T, H, W)")
        if x.shape[3] % patch or x.shape[4] % patch:
            raise ValueError(f"x is {x.shape[3]}x{x.shape[4]}; Latte needs height and width in multiples of {patch}")
        batch, frames = x.shape[0], x.shape[2]
        if t.shape not in ((batch,), (batch, frames)):
            raise ValueError(f"t has shape {tuple(t.shape)}; Latte needs ({batch},) or ({batch}, {frames})")
