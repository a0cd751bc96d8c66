"""A diffusion transformer over video latents that remembers: it attends to its tokens and to those of a `Memory`.

What it denoises may be any steps of a video, in any order, some of them given clean: positions are the steps' own, in
time, row and column, and enter by rotation (RoPE, arXiv 2104.09864), so that only their differences count. The time of
the flow and the class enter through adaLN-Zero as in Latte; tokens of the memory are clean, and have time 0.

The memory is `memory.Encoder` (arXiv 2512.23851) at one or several rates, or one of those that it is compared with.
A video's first latent stands for one frame, all others for a group: the model is told which step it is, if any.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from longtake.training.models.common.causal import fold, unfold
from longtake.training.models.common.condition import Condition, class_vectors
from longtake.training.models.common.dit import Modulation, embedded_time, frequencies, modulated, start_weights
from longtake.training.models.common.rotary import (
    CrossAttention,
    Rotation,
    grid_positions,
    one_after_the_other,
    rotated,
    rotation,
)
from longtake.training.models.common.statistics import Normalising, copy_statistics, normalised
from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.baselines import FramePack, Patchify
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.latents import Steps
from longtake.training.models.memory.tokens import Memory, cropped, joined, remembered


class Block(nn.Module):
    """Attention among all tokens, cross-attention of the last part where the model has it, then an MLP.

    Tokens come in parts `(B, T, N, D)`, the memory's and the video's, each with its control `(B, T or 1, D)`. Starts
    as the identity.
    """

    def __init__(self, config: MemoryDiTConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.modulation = Modulation(width, 6)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        hidden = config.mlp_ratio * width
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU("tanh"), nn.Linear(hidden, width))
        self.cross = CrossAttention(width, config.memory_widths[-1], config.heads) if config.cross_attention else None

    def forward(
        self,
        parts: tuple[Tensor, ...],
        controls: tuple[Tensor, ...],
        turned: Rotation,
        hidden: tuple[Tensor, Rotation, Rotation, Tensor | None] | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, ...]:
        """`turned` is of all tokens in order, `mask` `(B, 1, 1, N)` says which of them are seen (None: all).

        `hidden` has states, the rotations of the last part and of theirs, and which of them are seen.
        """
        known = [self.modulation(control) for control in controls]
        seen = [modulated(x, *m[:2]).flatten(1, 2) for x, m in zip(parts, known, strict=True)]
        mixed = self._mixed(torch.cat(seen, dim=1), turned, mask).split([x.shape[1] for x in seen], dim=1)
        after = [(x + m[2] * y.view_as(x)).to(x.dtype) for x, y, m in zip(parts, mixed, known, strict=True)]
        if self.cross is not None and hidden is not None:
            after[-1] = after[-1] + self.cross(after[-1].flatten(1, 2), *hidden).view_as(after[-1])
        return tuple(
            (x + m[5] * self.mlp(modulated(x, *m[3:5]))).to(x.dtype) for x, m in zip(after, known, strict=True)
        )

    def _mixed(self, x: Tensor, turned: Rotation, mask: Tensor | None) -> Tensor:
        query, key, value = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(rotated(query, turned), rotated(key, turned), value, mask)
        return self.out(mixed.transpose(1, 2).flatten(2))


class First(nn.Module):
    """Adds what is learned of a video's first latent to the steps that are one; nothing at the start.

    Weights from before there was this have none of it, which is the same as zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_load_state_dict_pre_hook(_without)

    def forward(self, x: Tensor, first: Tensor | None) -> Tensor:
        """x `(B, C, T, H, W)`; `first` `(B, T)` bool, None: none is."""
        if first is None:
            return x
        return x + first[:, None, :, None, None].to(x) * self.shift.to(x.dtype).view(-1, 1, 1, 1)


def _without(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state.setdefault(f"{prefix}shift", torch.zeros_like(module.shift))  # type: ignore[arg-type]


class MemoryDiT(Normalising):
    """Velocity of the rectified flow at steps x_t `(B, C, T, H, W)` of a video, normalised, given a memory of it.

    Inputs are cast to the dtype of the weights; outputs have it. `latent_mean` and `latent_std`, per channel, travel with
    the weights, and `low_mean` and `low_std` of the scaled-down video's latents. Names of the memory's weights begin with
    `memory.`.
    """

    low_mean: Tensor
    low_std: Tensor

    def __init__(self, config: MemoryDiTConfig) -> None:
        super().__init__(config.channels)
        self.config = config
        width, token = config.width, config.channels * config.patch**2
        self.first = First(config.channels)
        self.token_in = nn.Linear(token, width)
        self.time_in = embedded_time(width)
        self.class_in = nn.Embedding(config.classes + 1, width) if config.classes else None  # the last row: no class
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))
        self.modulation_out = Modulation(width, 2)
        self.token_out = nn.Linear(width, token)
        self.register_buffer("low_mean", torch.zeros(config.channels))
        self.register_buffer("low_std", torch.ones(config.channels))
        start_weights(self)
        zeros = [self.token_out, *(block.cross.out for block in self.blocks() if block.cross)]
        for linear in zeros:
            nn.init.zeros_(linear.weight)
        self.memory = nn.ModuleList(config.variant.build(config))
        self.start_memory()

    @property
    def dtype(self) -> torch.dtype:
        return self.token_in.weight.dtype

    def blocks(self) -> Iterator[Block]:
        """The blocks in order, such as for `block.compile()`."""
        yield from self.layers  # type: ignore[misc]

    def start_memory(self) -> None:
        """Let a memory that is a patchifier, or packed, begin as the patch embedding that this transformer has now."""
        for memory in self.memory:
            if isinstance(memory, Patchify | FramePack):
                memory.start_from(self.token_in)

    def set_statistics(
        self, mean: Tensor, std: Tensor, low_mean: Tensor | None = None, low_std: Tensor | None = None
    ) -> None:
        """Normalise by these, `(C,)` each, from now on; those of `low` are left as they are where none are given.

        ValueError for another shape or a std that is not positive.
        """
        super().set_statistics(mean, std)
        if (low_mean is None) != (low_std is None):
            raise ValueError("low_mean and low_std: give both or none")
        if low_mean is not None and low_std is not None:
            copy_statistics(self.low_mean, self.low_std, low_mean, low_std)

    def normalise_low(self, latent: Tensor) -> Tensor:
        """See `normalise`, for latents of the scaled-down video."""
        return normalised(latent, self.low_mean, self.low_std)

    def remember(
        self,
        high: Tensor,
        low: Tensor | None = None,
        start: int = 0,
        pasts: list[Past] | None = None,
        first: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Memory:
        """The memory of a history, of all encoders one after the other; or of the piece of it that begins at step `start`.

        high    `(B, C, T, H, W)`, normalised; T a multiple of `config.group`
        low     `(B, C, T, h, w)`, of the video scaled down by `config.shrink`, normalised; None where that is None
        pasts   one for each of `self.memory`, all of what came before: they go on to the end of this piece
        first   `(B, T)` bool, which steps are a video's first; None: none
        skip    `(B,)`, so many steps in front of each sample, whole groups, are no part of its history; None: none

        Pieces `joined` are the whole; but a framepack memory of a piece is of all that came before too (see `append`).

        Raises:
            ValueError: a wrong shape; latents that are missing.
        """
        for name, given in (("high", high), ("low", low)):
            if given is not None and (given.ndim != 5 or given.shape[1] != self.config.channels):
                raise ValueError(
                    f"{name} has shape {tuple(given.shape)}; it needs (B, {self.config.channels}, T, H, W)"
                )
        if not self.memory:
            empty = torch.empty(high.shape[0], 0, self.config.width, dtype=self.dtype, device=high.device)
            return Memory(empty, torch.empty(0, 3, device=high.device), empty[..., :0])
        high = self.first(high, first)
        low = None if low is None else self.first(low, first)
        return remembered(list(self.memory), self._project, high, low, start, pasts, skip)

    def append(
        self,
        memory: Memory | None,
        high: Tensor,
        low: Tensor | None,
        start: int,
        pasts: list[Past],
        first: Tensor | None = None,
    ) -> Memory:
        """`memory` gone on by a piece as `remember` takes it, and cut to whole groups of the last `config.history` steps."""
        new = self.remember(high, low, start, pasts, first)
        if memory is not None and self.config.variant.joins:
            new = joined([memory, new])
        history, group = self.config.history, self.config.group
        return cropped(new, start + high.shape[2] - history // group * group)

    def _project(self, patches: Tensor) -> Tensor:
        return self.token_in(patches.to(self.dtype))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        times: Tensor,
        memory: Memory | Steps | None = None,
        condition: Condition | None = None,
        rng: torch.Generator | None = None,
        first: Tensor | None = None,
        seen: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """The velocity of x, `(B, C, T, H, W)`.

        In place of a memory it takes the latents that one is to be made of: so that in training one call goes through all
        that learns, as the hooks of ZeRO need it.

        x           any steps in any order, such as a window, a segment to generate, or steps to retrieve
        t           0 (data) to 1 (noise): `(B,)`, or `(B, T)` with 0 for steps that are given clean
        times       positions of the steps in their video, `(T,)` or `(B, T)`, on the scale of the memory's; only differences count
        condition   of the batch; None says nothing. In training mode `label_dropout` of the samples lose theirs, drawn
                    from `rng` (on the device of `x`).
        first       `(B or 1, T)` bool, which steps are a video's first; None: none
        seen        `(B, T)` bool, False for steps that a sample does not have; None: it has all
        level       `(B,)`, how much noise what the memory was made of has, as `t`; None: it was clean

        Raises:
            ValueError: another shape, or a class id that the model does not know.
        """
        if isinstance(memory, Steps):
            memory = self.remember(memory.high, memory.low, memory.start, first=memory.first, skip=memory.skip)
        self._check(x, t, times, memory)
        x = self.first(x, None if first is None else first.to(x.device).expand(len(x), -1))
        patches = fold(x.to(self.dtype), 1, self.config.patch).movedim(1, -1)  # (B, T, h, w, C p p)
        tokens = self.token_in(patches).flatten(2, 3)
        control = self._control(t[:, None] if t.ndim == 1 else t, level, x, condition, rng)
        head = self.config.width // self.config.heads
        here = rotation(grid_positions(times, patches.shape[2], patches.shape[3], x.device), head)
        parts: tuple[Tensor, ...] = (tokens,)
        controls: tuple[Tensor, ...] = control[:1]
        turned, hidden = here, None
        mask = None if seen is None else seen.repeat_interleave(patches.shape[2] * patches.shape[3], dim=1)
        if memory is not None and memory.tokens.shape[1]:
            parts = (memory.tokens.to(self.dtype).unsqueeze(1), tokens)
            controls = (control[1], control[0])
            there = rotation(memory.positions[None], head)
            turned = one_after_the_other(there, here)
            if self.config.cross_attention:
                hidden = (memory.hidden.to(self.dtype), here, there, memory.seen)
            mask = _together(memory, mask, tokens)
        mask = None if mask is None else mask[:, None, None]
        for block in self.layers:
            if self.config.activation_checkpointing and self.training:
                parts = checkpoint(block, parts, controls, turned, hidden, mask, use_reentrant=False)
            else:
                parts = block(parts, controls, turned, hidden, mask)
        made = self.token_out(modulated(parts[-1], *self.modulation_out(control[0])))
        return unfold(made.unflatten(2, tuple(patches.shape[2:4])).movedim(-1, 1), 1, self.config.patch)

    def _control(
        self,
        t: Tensor,
        level: Tensor | None,
        x: Tensor,
        condition: Condition | None,
        rng: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """What modulates tokens at times `(B, T or 1)`, and the memory's: `(B, T or 1, D)` and `(B, 1, D)`."""
        both = torch.cat([t, torch.zeros_like(t[:, :1]) if level is None else level.to(t)[:, None]], dim=1)
        control = self.time_in(frequencies(both).to(self.dtype))
        vectors = class_vectors(self.class_in, condition, x, self.config.label_dropout if self.training else 0.0, rng)
        if vectors is not None:
            control = control + vectors[:, None]
        return control[:, :-1], control[:, -1:]

    def _check(self, x: Tensor, t: Tensor, times: Tensor, memory: Memory | None) -> None:
        patch, width = self.config.patch, self.config.width
        if x.ndim != 5 or x.shape[1] != self.config.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; this model needs (B, {self.config.channels}, T, H, W)")
        if x.shape[3] % patch or x.shape[4] % patch:
            raise ValueError(f"x is {x.shape[3]}x{x.shape[4]}; its height and width must be multiples of {patch}")
        batch, steps = x.shape[0], x.shape[2]
        if t.shape not in ((batch,), (batch, steps)):
            raise ValueError(f"t has shape {tuple(t.shape)}; it needs ({batch},) or ({batch}, {steps})")
        if times.shape not in ((steps,), (batch, steps)):
            raise ValueError(f"times has shape {tuple(times.shape)}; it needs ({steps},) or ({batch}, {steps})")
        if memory is not None and (memory.tokens.shape[0], memory.tokens.shape[2]) != (batch, width):
            raise ValueError(f"memory has tokens {tuple(memory.tokens.shape)}; it needs ({batch}, N, {width})")


def _together(memory: Memory, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Which of the memory's tokens and then of `(B, T, N, D)` others are seen, `(B, M + T N)`; None: all."""
    if memory.seen is None and mask is None:
        return None
    all_of = [
        torch.ones(some.shape[0], count, dtype=torch.bool, device=tokens.device) if given is None else given
        for some, count, given in (
            (memory.tokens, memory.tokens.shape[1], memory.seen),
            (tokens, tokens.shape[1] * tokens.shape[2], mask),
        )
    ]
    return torch.cat(all_of, dim=1)
