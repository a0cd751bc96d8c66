"""A diffusion transformer over video latents with a memory: it attends to its own tokens and to those of a `Memory`.

It denoises any latents of a video, in any order, some of them given clean. Their positions in time, row and column enter
by rotation (RoPE, arXiv 2104.09864), so that only differences count. The time of the flow and the class enter through
adaLN-Zero as in Latte; tokens of the memory have the time 0 of clean data, or that of the noise in their history.

The video's own tokens attend to a text, where the model has it, and the memory's tokens do not. A text says what is to be
seen next, and a memory holds what was seen before, by other texts: so a memory is the same whatever is asked for.

The memory is `encoder.Encoder` (arXiv 2512.23851) at one or several rates, or a baseline.
A video's first latent stands for one frame, all others for several: the model sees which latent is the first.

Ranks that share a segment (`common/sequence.py`) have each an equal part of the clean tokens of the memory and an equal part
of the video's: a slice of the positions, of all latents. Both go through every block, and all tokens attend to all, so this
is the same work for each rank, however long a history is. The memory itself is made on every rank.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.training.models.common.causal import fold, unfold
from longtake.training.models.common.condition import Condition, Hidden, class_vectors, draw_hidden
from longtake.training.models.common.dit import Modulation, embedded_time, frequencies, modulated, start_weights
from longtake.training.models.common.recompute import called, chosen
from longtake.training.models.common.rotary import (
    CrossAttention,
    Rotation,
    grid_positions,
    one_after_the_other,
    rotated,
    rotation,
)
from longtake.training.models.common.sequence import SequenceGroup, Shares, own, shares_of, to_heads, to_tokens, whole
from longtake.training.models.common.text import TextAttention, TextIn, text_tokens
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.model import FirstLatentShift, MemoryModel, joint_mask
from longtake.training.models.memory.stretch import Stretch
from longtake.training.models.memory.tokens import Memory


class Block(nn.Module):
    """Attention among all tokens, cross-attention of the last part to φ and to a text where the model has it, then an MLP.

    Tokens come in parts `(B, T, N, D)`, the memory's and the video's, each with its control `(B, T or 1, D)`. Starts
    as the identity. The block that `ends` a model returns the last part alone, since nothing reads the others.
    """

    def __init__(self, config: MemoryDiTConfig, ends: bool = False) -> None:
        super().__init__()
        width = config.width
        self.heads, self.ends = config.heads, ends
        self.modulation = Modulation(width, 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        hidden = config.mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.cross = CrossAttention(width, config.memory_widths[-1], config.heads) if config.cross_attention else None
        self.text = TextAttention(width, config.heads) if config.text_width else None

    def forward(
        self,
        parts: tuple[Tensor, ...],
        controls: tuple[Tensor, ...],
        rotary: Rotation,
        hidden: tuple[Tensor, Rotation, Rotation, Tensor | None] | None = None,
        mask: Tensor | None = None,
        text: Tensor | None = None,
        text_seen: Tensor | None = None,
        shares: Shares | None = None,
    ) -> tuple[Tensor, ...]:
        """New tokens of all parts, or of the last.

        Args:
            rotary: of the tokens of all parts, in order.
            hidden: hidden states for the last part, its rotation and theirs, and which of the states are seen.
            mask: `(B, 1, 1, N)`, which of all tokens, of every rank, are seen; None: all.
            text, text_seen: for the last part, what `TextIn` returns.
            shares: of ranks that have some of the tokens each; None: this one has all.
        """
        modulations = [self.modulation(control) for control in controls]
        inputs = [modulated(x, *m[:2]).flatten(1, 2) for x, m in zip(parts, modulations, strict=True)]
        mixed = self._attention(torch.cat(inputs, dim=1), rotary, mask, shares)
        mixed = mixed.split([x.shape[1] for x in inputs], dim=1)
        if self.ends:
            parts, mixed, modulations = parts[-1:], mixed[-1:], modulations[-1:]
        sums = [(x + m[2] * y.view_as(x)).to(x.dtype) for x, y, m in zip(parts, mixed, modulations, strict=True)]
        if self.cross is not None and hidden is not None:
            sums[-1] = sums[-1] + self.cross(sums[-1].flatten(1, 2), *hidden).view_as(sums[-1])
        if self.text is not None and text is not None:
            sums[-1] = sums[-1] + self.text(sums[-1], text, text_seen)
        return tuple(
            (x + m[5] * self.mlp(modulated(x, *m[3:5]))).to(x.dtype) for x, m in zip(sums, modulations, strict=True)
        )

    def _attention(self, x: Tensor, rotary: Rotation, mask: Tensor | None, shares: Shares | None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = rotated(query, rotary), rotated(key, rotary)
        if shares is not None:
            query, key, value = to_heads((query, key, value), shares)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        if shares is not None:
            mixed = to_tokens(mixed, shares)
        return self.out(mixed.transpose(1, 2).flatten(2))


class MemoryDiT(MemoryModel):
    """The transformer and its memory. Inputs are cast to the dtype of the weights; outputs have it."""

    config: MemoryDiTConfig
    sequence: SequenceGroup | None = None  # ranks that share a segment

    def __init__(self, config: MemoryDiTConfig) -> None:
        super().__init__(config.channels)
        self.config = config
        width, token = config.width, config.channels * config.patch**2
        self.first = FirstLatentShift(config.channels)
        self.token_in = nn.Linear(token, width)
        self.time_in = embedded_time(width)
        self.class_in = nn.Embedding(config.classes + 1, width) if config.classes else None  # the last row: no class
        self.text_in = TextIn(config) if config.text_width else None
        self.layers = nn.ModuleList(Block(config, n + 1 == config.depth) for n in range(config.depth))
        self.modulation_out = Modulation(width, 2)
        self.token_out = nn.Linear(width, token)
        start_weights(self)
        for linear in (self.token_out, *(block.cross.out for block in self.blocks() if block.cross)):
            nn.init.zeros_(linear.weight)
        for block in self.blocks():
            if block.text is not None:
                block.text.start()
        self.memory = nn.ModuleList(config.variant.build(config))
        self.start_memory()

    @property
    def dtype(self) -> torch.dtype:
        return self.token_in.weight.dtype

    def blocks(self) -> Iterator[Block]:
        """The blocks in order, for example for `block.compile()`."""
        yield from self.layers  # type: ignore[misc]

    def _project(self, patches: Tensor) -> Tensor:
        return self.token_in(patches.to(self.dtype))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        times: Tensor,
        memory: Memory | Stretch | None = None,
        condition: Condition | None = None,
        rng: torch.Generator | None = None,
        first: Tensor | None = None,
        seen: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """See `MemoryModel.forward`: `label_dropout` and `text_dropout` are the dropouts of training."""
        if isinstance(memory, Stretch):
            memory = self.remember(memory.high, memory.low, memory.start, first=memory.first, skip=memory.skip)
        self.check_shapes(x, t, times, memory)

        # Tokens, their controls and their positions.
        x = self.first(x, None if first is None else first.to(x.device).expand(len(x), -1))
        patches = fold(x.to(self.dtype), 1, self.config.patch).movedim(1, -1)  # (B, T, h, w, C p p)
        cells = patches.flatten(2, 3)
        shares = shares_of(self.sequence, cells.shape[2])
        tokens = self.token_in(own(cells, shares, 2))
        dropouts = (self.config.label_dropout, self.config.text_dropout)
        lost = draw_hidden(condition, x, *dropouts, rng) if self.training else Hidden()
        control = self._control(t[:, None] if t.ndim == 1 else t, level, x, condition, lost.classes)
        text = text_tokens(self.text_in, condition, x, lost.text)
        head = self.config.width // self.config.heads
        places = grid_positions(times, patches.shape[2], patches.shape[3], x.device).unflatten(1, cells.shape[1:3])
        here = rotation(own(places, shares, 2).flatten(1, 2), head)

        # The memory's tokens come in front.
        parts: tuple[Tensor, ...] = (tokens,)
        controls: tuple[Tensor, ...] = control[:1]
        rotary, hidden, clean = here, None, shares_of(self.sequence, 0)
        mask = None if seen is None else seen.repeat_interleave(cells.shape[2], dim=1)
        if memory is not None and memory.tokens.shape[1]:
            clean = shares_of(self.sequence, memory.tokens.shape[1])
            parts = (own(memory.tokens, clean, 1).to(self.dtype).unsqueeze(1), tokens)
            controls = (control[1], control[0])
            rotary = one_after_the_other(rotation(own(memory.positions, clean, 0)[None], head), here)
            if self.config.cross_attention:
                remote = rotation(memory.positions[None], head)
                hidden = (memory.hidden.to(self.dtype), here, remote, memory.seen)
            mask = joint_mask(memory, mask, cells)

        joint = None
        if shares is not None and clean is not None:
            joint = clean.followed_by(cells.shape[1], shares)
            mask = None if mask is None else _by_rank(mask, clean, shares)
        mask = None if mask is None else mask[:, None, None]
        share = self.config.activation_checkpointing if self.training else 0.0
        for number, block in enumerate(self.layers):
            again = chosen(share, number, len(self.layers))
            parts = called(again, block, parts, controls, rotary, hidden, mask, *text, joint)
        velocity = whole(self.token_out(modulated(parts[-1], *self.modulation_out(control[0]))), shares, 2)
        return unfold(velocity.unflatten(2, tuple(patches.shape[2:4])).movedim(-1, 1), 1, self.config.patch)

    def _control(
        self, t: Tensor, level: Tensor | None, x: Tensor, condition: Condition | None, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The controls of tokens at times t `(B, T or 1)` and of the memory's tokens: `(B, T or 1, D)` and `(B, 1, D)`.

        `hidden` `(B,)` bool are the samples that lose their class; None: none do.
        """
        times = torch.cat([t, torch.zeros_like(t[:, :1]) if level is None else level.to(t)[:, None]], dim=1)
        control = self.time_in(frequencies(times).to(self.dtype))
        vectors = class_vectors(self.class_in, condition, x, hidden)
        if vectors is not None:
            control = control + vectors[:, None]
        return control[:, :-1], control[:, -1:]


def _by_rank(mask: Tensor, clean: Shares, positions: Shares) -> Tensor:
    """A mask of the memory's and the video's tokens `(B, M + T N)` in the order in which the ranks have them."""
    memory, video = mask.tensor_split([sum(clean.lengths)], dim=1)
    slices = video.unflatten(1, (-1, sum(positions.lengths))).split(positions.lengths, dim=2)
    parts = zip(memory.split(clean.lengths, dim=1), slices, strict=True)
    return torch.cat([torch.cat([front, behind.flatten(1)], dim=1) for front, behind in parts], dim=1)
