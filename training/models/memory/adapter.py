"""A memory for a foreign transformer, such as Wan's or HunyuanVideo's from diffusers.

1. Write a module around the transformer that is a `Backbone`: it projects patches to tokens, lists its blocks, and
   computes the velocity with the memory's tokens in front of its own.
2. Attach a memory to it. Its own weights stand still; `lora` names layers that learn low-rank changes:

       model = attach_memory(backbone, ["4x4x2"], lora=LoraConfig(rank=128, targets=[r".*to_[qkv]"]))

3. Train `model` like a `MemoryDiT`: what learns are the parameters with `requires_grad`.

       memory = model.remember(high, low)               # latents `(B, C, T, H, W)`, and of the scaled-down video
       velocity = model(x, t, times, memory, prompt)    # whatever the backbone takes comes after the memory

Cross-attention to φ's hidden states is added to the output of each block by a hook.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from longtake.training.config import LoraConfig
from longtake.training.engines import lora as low_rank
from longtake.training.models.common.rotary import CrossAttention, Rotation, grid_positions, rotation
from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.encoder import Branches, Encoder
from longtake.training.models.memory.tokens import Memory, parse_rate, run_encoders


class Backbone(Protocol):
    """A module around a foreign transformer, with the transformer's own numbers.

    channels, patch     of its latents, and latents a side of a token, a power of two
    width, heads        of its tokens and attention; a head's width must be even and at least 6
    """

    channels: int
    patch: int
    width: int
    heads: int

    def blocks(self) -> Sequence[nn.Module]:
        """Its blocks in order. Each returns tokens `(B, M + N, width)`, M of the memory and then its own, maybe first of a tuple."""

    def project(self, patches: Tensor) -> Tensor:
        """Project patches to tokens: `(..., channels patch patch)`, channels first, then rows, then columns -> `(..., width)`."""

    def velocity(self, x: Tensor, t: Tensor, times: Tensor, memory: Memory | None, *extra: Any) -> Tensor:
        """The velocity of x `(B, C, T, H, W)` at t `(B,)` or `(B, T)`, its latents at `times` `(T,)` or `(B, T)`.

        `memory.tokens` come in front of its own tokens, which are in order of time, row and column. Their positions are
        `memory.positions`, and their t is 0 where tokens have their own; they are left out of the result. `extra` is
        whatever else it takes, such as a prompt.
        """


class WithMemory(nn.Module):
    """A backbone, its memory φ (names of weights begin with `memory.`) and cross-attention for each block (`cross.`).

    Made by `attach_memory`. Where the backbone recomputes its blocks in the backward pass, that pass must come before the
    next forward pass: the hooks see the states of the latest one.
    """

    def __init__(
        self,
        backbone: Any,  # a module that is a Backbone
        rates: Sequence[str],
        branches: Branches,
        widths: tuple[int, ...],
        heads: int,
        cross_attention: bool,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.hidden: tuple[Tensor, Rotation, Rotation] | None = None  # states, and rotations of x and of the states
        parsed = [parse_rate(rate) for rate in rates]
        shrink = (min(rate[0] for rate in parsed), min(rate[1] for rate in parsed))
        shape = (self.backbone.patch, self.backbone.channels, self.backbone.width)
        self.memory = nn.ModuleList(Encoder(rate, *shape, branches, widths, heads, shrink) for rate in parsed)
        blocks = self.backbone.blocks() if cross_attention else []
        self.cross = nn.ModuleList(CrossAttention(self.backbone.width, widths[-1], self.backbone.heads) for _ in blocks)
        for block, cross in zip(blocks, self.cross, strict=True):
            block.register_forward_hook(_Hook(self, cross))

    def remember(
        self, high: Tensor, low: Tensor | None = None, start: int = 0, pasts: Sequence[Past] | None = None
    ) -> Memory:
        """See `MemoryDiT.remember`."""
        return run_encoders(list(self.memory), self.backbone.project, high, low, start, pasts)

    def forward(self, x: Tensor, t: Tensor, times: Tensor, memory: Memory | None = None, *extra: Any) -> Tensor:
        """See `Backbone.velocity`."""
        self.hidden = None
        if memory is not None and memory.tokens.shape[1] and len(self.cross):
            rows, columns = (side // self.backbone.patch for side in x.shape[3:])
            head = self.backbone.width // self.backbone.heads
            own = rotation(grid_positions(times, rows, columns, x.device), head)
            self.hidden = (memory.hidden, own, rotation(memory.positions[None], head))
        return self.backbone.velocity(x, t, times, memory, *extra)


class _Hook:
    """A forward hook that adds cross-attention to φ's hidden states to a block's own tokens.

    An object and no closure, because it must survive a deep copy of the module.
    """

    def __init__(self, model: WithMemory, cross: nn.Module) -> None:
        self.model, self.cross = model, cross

    def __call__(self, block: nn.Module, inputs: Any, outputs: Any) -> Any:
        if self.model.hidden is None:
            return outputs
        tokens = outputs[0] if isinstance(outputs, tuple) else outputs
        states, own_rotation, remote = self.model.hidden
        memory, own = tokens.split([states.shape[1], tokens.shape[1] - states.shape[1]], dim=1)
        tokens = torch.cat([memory, own + self.cross(own, states, own_rotation, remote)], dim=1)
        return (tokens, *outputs[1:]) if isinstance(outputs, tuple) else tokens


def attach_memory(
    backbone: nn.Module,
    rates: Sequence[str],
    branches: Branches = "both",
    widths: tuple[int, ...] = (64, 128, 256, 512),
    heads: int = 8,
    cross_attention: bool = True,
    lora: LoraConfig | None = None,
) -> WithMemory:
    """Add a memory to `backbone`, a module that is a `Backbone`; its own weights stand still but for the changes of `lora`.

    At first the cross-attention adds nothing, and the memory's tokens are those of the scaled-down video alone. The other
    arguments are those of `MemoryDiTConfig` and `Encoder`.

    Raises:
        ValueError: a malformed rate; cross-attention without the high branch, whose states it reads.
        UserError: `lora` names a layer that the backbone does not have.
    """
    if cross_attention and branches == "low":
        raise ValueError("cross_attention: needs the high branch, whose states it reads")
    backbone.requires_grad_(False)
    if lora is not None:
        low_rank.attach(backbone, lora)
    return WithMemory(backbone, rates, branches, widths, heads, cross_attention)
