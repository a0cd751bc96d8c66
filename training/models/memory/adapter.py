"""A memory for a transformer that is not ours, such as Wan's or HunyuanVideo's from diffusers.

Wrap it into a `Backbone`, which says how tokens come into it, and `attach_memory`:

    model = attach_memory(backbone, ["4x4x2"], lora=LoraConfig(rank=128, targets=[r".*to_[qkv]"]))
    memory = model.remember(high, low)
    velocity = model(x, t, times, memory, prompt)

Tokens of the memory are concatenated to the backbone's own; cross-attention from φ's hidden states is added to what each
block gives, by a hook; and the backbone itself learns nothing, or low-rank changes of the layers that `lora` names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn

from longtake.training.config import LoraConfig
from longtake.training.engines import lora as low_rank
from longtake.training.models.common.rotary import CrossAttention, Rotation, grid_positions, rotation
from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.encoder import Branches, Encoder
from longtake.training.models.memory.tokens import Memory, parse_rate, remembered


class Backbone(Protocol):
    """A module around a foreign transformer. Its attributes are the transformer's own numbers.

    channels, patch     of its latents, and how many a side make one token, a power of two
    width, heads        of its tokens and attention; a head's width must be even and 6 at least
    """

    channels: int
    patch: int
    width: int
    heads: int

    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks in order. Each gives `(B, M + N, width)` tokens, alone or first of a tuple: M of the memory, then its own."""

    def project(self, patches: Tensor) -> Tensor:
        """Its patch projection: `(..., channels patch patch)`, channels first, then rows, then columns -> `(..., width)`."""

    def velocity(self, x: Tensor, t: Tensor, times: Tensor, memory: Memory | None, *given: Any) -> Tensor:
        """The velocity of x `(B, C, T, H, W)` at t `(B,)` or `(B, T)`, its steps at `times` `(T,)` or `(B, T)`.

        `memory.tokens` are put in front of its own tokens, which are in order of time, row and column, at
        `memory.positions`, and at t = 0 where tokens have times of their own; they are left out of the result.
        `given` is what else it takes, such as a prompt.
        """


class WithMemory(nn.Module):
    """A backbone, its memory φ (names begin with `memory.`) and cross-attention for each block (`cross.`).

    Made by `attach_memory`. Where the backbone recomputes its blocks in the backward pass, that pass must come before the
    next forward pass: the hooks see the states of the last one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        rates: Sequence[str],
        branches: Branches,
        widths: tuple[int, ...],
        heads: int,
        cross_attention: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.seen: tuple[Tensor, Rotation, Rotation] | None = None  # states, and rotations of x and of the states
        of = self._of
        chosen = [parse_rate(rate) for rate in rates]
        shrink = (min(rate[0] for rate in chosen), min(rate[1] for rate in chosen))
        shape = (of.patch, of.channels, of.width)
        self.memory = nn.ModuleList(Encoder(rate, *shape, branches, widths, heads, shrink) for rate in chosen)
        blocks = of.blocks() if cross_attention else []
        self.cross = nn.ModuleList(CrossAttention(of.width, widths[-1], of.heads) for _ in blocks)
        for block, cross in zip(blocks, self.cross, strict=True):
            block.register_forward_hook(_Hook(self, cross))

    @property
    def _of(self) -> Backbone:
        return cast(Backbone, self.backbone)

    def remember(
        self, high: Tensor, low: Tensor | None = None, start: int = 0, pasts: Sequence[Past] | None = None
    ) -> Memory:
        """As `MemoryDiT.remember`."""
        return remembered(list(self.memory), self._of.project, high, low, start, pasts)

    def forward(self, x: Tensor, t: Tensor, times: Tensor, memory: Memory | None = None, *given: Any) -> Tensor:
        """As `Backbone.velocity`."""
        self.seen = None
        if memory is not None and memory.tokens.shape[1] and len(self.cross):
            rows, columns = (side // self._of.patch for side in x.shape[3:])
            head = self._of.width // self._of.heads
            here = rotation(grid_positions(times, rows, columns, x.device), head)
            self.seen = (memory.hidden, here, rotation(memory.positions[None], head))
        return self._of.velocity(x, t, times, memory, *given)


class _Hook:
    """A forward hook that adds to a block's own tokens what they find in φ's hidden states; an object, because it must
    survive a deep copy of the module.
    """

    def __init__(self, model: WithMemory, cross: nn.Module) -> None:
        self.model, self.cross = model, cross

    def __call__(self, block: nn.Module, inputs: Any, given: Any) -> Any:
        if self.model.seen is None:
            return given
        tokens = given[0] if isinstance(given, tuple) else given
        states, here, there = self.model.seen
        memory, own = tokens.split([states.shape[1], tokens.shape[1] - states.shape[1]], dim=1)
        tokens = torch.cat([memory, own + self.cross(own, states, here, there)], dim=1)
        return (tokens, *given[1:]) if isinstance(given, tuple) else tokens


def attach_memory(
    backbone: nn.Module,
    rates: Sequence[str],
    branches: Branches = "both",
    widths: tuple[int, ...] = (64, 128, 256, 512),
    heads: int = 8,
    cross_attention: bool = True,
    lora: LoraConfig | None = None,
) -> WithMemory:
    """`backbone`, a module that is a `Backbone`, with a memory; its own weights stand still but for the changes of `lora`.

    At first the cross-attention adds nothing, and tokens of the memory are those of the scaled-down video alone.

    Raises:
        ValueError: a rate that is none; cross-attention without the high branch, whose states it reads.
        UserError: `lora` names a layer that the backbone has not.
    """
    if cross_attention and branches == "low":
        raise ValueError("cross_attention: needs the high branch, whose states it reads")
    backbone.requires_grad_(False)
    if lora is not None:
        low_rank.attach(backbone, lora)
    return WithMemory(backbone, rates, branches, widths, heads, cross_attention)
