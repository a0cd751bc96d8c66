"""The body of MAVIN as a diffusion transformer: blocks over space and over time in turn, as Latte's (arXiv 2401.03048).

Each latent has its own time, so that clean ones are known by theirs [assumption]. The length of the gap goes the way of
the time. Only blocks over space attend to text and frames.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from torch import Tensor, nn

from longtake.training.models.common.causal import fold, unfold
from longtake.training.models.common.dit import (
    Modulation,
    attention,
    embedded_time,
    frequencies,
    modulated,
    sincos,
    start_weights,
)
from longtake.training.models.common.recompute import called, chosen
from longtake.training.models.common.text import TextAttention
from longtake.training.models.mavin.config import MavinConfig

_LENGTHS = 1000  # `frequencies` takes 0 to 1


class Block(nn.Module):
    """Attention among the tokens of a frame (`space`) or the frames of a token's position (`time`), then an MLP.

    Tokens `(B, T, N, D)`, their control `(B, T, D)`, and the tokens of `Guide` -> tokens. Starts as the identity.
    """

    def __init__(self, config: MavinConfig, over: Literal["space", "time"]) -> None:
        super().__init__()
        width, hidden = config.width, config.mlp_ratio * config.width
        self.heads, self.over = config.heads, over
        self.modulation = Modulation(width, 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        told = over == "space" and bool(config.text_width or config.image_width)
        self.cross = TextAttention(width, config.heads) if told else None

    def forward(self, x: Tensor, control: Tensor, tokens: Tensor | None, seen: Tensor | None) -> Tensor:
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = self.modulation(control)
        x = (x + gate * self._attention(modulated(x, shift, scale))).to(x.dtype)
        if self.cross is not None and tokens is not None:
            x = x + self.cross(x, tokens, seen)
        return (x + mlp_gate * self.mlp(modulated(x, mlp_shift, mlp_scale))).to(x.dtype)

    def _attention(self, x: Tensor) -> Tensor:
        if self.over == "time":
            x = x.transpose(1, 2)
        rows = self.qkv(x).flatten(0, 1).unflatten(-1, (3, self.heads, -1))
        mixed = attention(*rows.permute(2, 0, 3, 1, 4))
        mixed = self.out(mixed.transpose(1, 2).flatten(2)).unflatten(0, x.shape[:2])
        return mixed.transpose(1, 2) if self.over == "time" else mixed


class DiT(nn.Module):
    """Velocity of inputs `(B, C, T, h, w)` at times `(B, T)`, given the length `(B,)` of the gap and tokens to attend to."""

    def __init__(self, config: MavinConfig) -> None:
        super().__init__()
        self.config = config
        width, token = config.width, config.channels * config.patch**2
        self.token_in = nn.Linear(config.inputs * config.patch**2, width)
        self.time_in = embedded_time(width)
        self.length_in = embedded_time(width)
        self.layers = nn.ModuleList(Block(config, ("space", "time")[i % 2]) for i in range(config.depth))
        self.modulation_out = Modulation(width, 2)
        self.token_out = nn.Linear(width, token)
        start_weights(self)
        nn.init.zeros_(self.token_out.weight)
        for block in self.blocks():
            if isinstance(block, Block) and block.cross is not None:
                block.cross.start()

    @property
    def dtype(self) -> torch.dtype:
        return self.token_in.weight.dtype

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in order."""
        yield from self.layers

    def forward(
        self, x: Tensor, times: Tensor, length: Tensor, tokens: Tensor | None = None, seen: Tensor | None = None
    ) -> Tensor:
        patch = self.config.patch
        if x.shape[3] % patch or x.shape[4] % patch:
            raise ValueError(f"latents are {x.shape[3]}x{x.shape[4]}; this model needs multiples of {patch}")
        control = self.time_in(frequencies(times).to(self.dtype))
        control = control + self.length_in(frequencies(length.float() / _LENGTHS).to(self.dtype))[:, None]
        patches = fold(x.to(self.dtype), 1, patch).movedim(1, -1)  # (B, T, h, w, C p p)
        hidden = (self.token_in(patches) + self._positions(patches)).flatten(2, 3)
        share = self.config.activation_checkpointing if self.training else 0.0
        for number, block in enumerate(self.layers):
            hidden = called(chosen(share, number, len(self.layers)), block, hidden, control, tokens, seen)
        out = self.token_out(modulated(hidden, *self.modulation_out(control)))
        return unfold(out.unflatten(2, patches.shape[2:4]).movedim(-1, 1), 1, patch)

    def _positions(self, patches: Tensor) -> Tensor:
        """The sum of the embeddings of frame, row and column: `(1, T, h, w, D)` in the dtype of the weights."""
        frames, height, width = patches.shape[1:4]
        places = (torch.arange(n, device=patches.device) for n in (frames, height, width))
        time, rows, columns = (
            sincos(place, self.config.width // parts) for place, parts in zip(places, (1, 2, 2), strict=True)
        )
        space = torch.cat([rows[:, None].expand(-1, width, -1), columns[None].expand(height, -1, -1)], dim=-1)
        return (time[:, None, None] + space)[None].to(self.dtype)
