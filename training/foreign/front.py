"""Tokens in front of a window's own, such as those of a memory, and what the blocks of a class are given of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# classes that take tokens and latents which some samples do not have, and whose blocks may attend to further states
CLASSES = frozenset({"WanTransformer3DModel", "HunyuanVideoTransformer3DModel"})


class Front(NamedTuple):
    """Tokens in front of a window's own, such as a memory's.

    Where blocks attend to a text beside their tokens, these attend to "" in place of the window's.

    tokens     `(B, M, width)`, of the width of the backbone's own
    positions  in time, row and column, `(M, 3)` or `(B, M, 3)`, in tokens; any real numbers
    time       `(B,)`, the noise in them as t; None: they are clean
    seen       `(B, M)` bool, False for tokens that a sample does not have; None: it has all
    states     what the attention of each block to a memory's states takes beside the window's tokens (see `Attending`);
               None: blocks have none
    """

    tokens: Tensor
    positions: Tensor
    time: Tensor | None = None
    seen: Tensor | None = None
    states: tuple[Any, ...] | None = None


class Context(NamedTuple):
    """What blocks attend to in place of a text, where there is more than one; it comes to them as the text.

    text, seen   `(B, N, D)` for the window's tokens, and `(B, tokens, N)` bool, which of it each of them sees; None: all
    none, ahead  `(B, N, D)` for the tokens in front, and their number
    states       see `Front`
    """

    text: Tensor
    seen: Tensor | None
    none: Tensor
    ahead: int
    states: tuple[Any, ...] | None


class Attending:
    """A forward hook of a block that adds to its window's tokens what they find in a memory's states.

    All that it needs of a window comes with the block's arguments, because a block that is recomputed in the backward pass is
    called again. Its module is no child of the block, so weights keep their names. Compiled, it is a graph behind the block's,
    which all blocks share: told apart by their numbers each would have one of its own.

    attention   of the block's tokens to the states; None: it adds nothing
    """

    def __init__(self) -> None:
        self.attention: nn.Module | None = None

    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], tokens: Tensor) -> Tensor:
        context = inputs[1]
        return self.added(tokens, context.ahead, context.states) if isinstance(context, Context) else tokens

    def added(self, tokens: Tensor, ahead: int, states: tuple[Any, ...] | None) -> Tensor:
        """Tokens of which the first `ahead` are in front of the window's own."""
        if self.attention is None or states is None:
            return tokens
        front, own = tokens.tensor_split([ahead], dim=1)
        return torch.cat([front, own + self.attention(own, *states)], dim=1)


def attend(blocks: Iterable[nn.Module], attentions: Iterable[nn.Module | None]) -> None:
    """Give each block, whose class has such a hook, its attention to a memory's states in place of one that it has."""
    for block, attention in zip(blocks, attentions, strict=True):
        for hook in block._forward_hooks.values():
            if isinstance(hook, Attending):
                hook.attention = attention


def key_mask(inputs: Any, patch: tuple[int, int, int]) -> Tensor | None:
    """Which of all tokens, those in front first, are there to attend to: `(B, 1, 1, M + N)` bool; None: all are."""
    x, front = inputs.x, inputs.front
    if inputs.present is None and (front is None or front.seen is None):
        return None
    counts = [side // size for side, size in zip(x.shape[2:], patch, strict=True)]
    all_ = x.new_ones(len(x), counts[0], dtype=torch.bool)
    own = (all_ if inputs.present is None else inputs.present.to(x.device)).repeat_interleave(
        counts[1] * counts[2], dim=1
    )
    if front is None:
        return own[:, None, None]
    ahead = x.new_ones(front.tokens.shape[:2], dtype=torch.bool) if front.seen is None else front.seen.to(x.device)
    return torch.cat([ahead, own], dim=1)[:, None, None]
