"""Tokens in front of a window's own, such as those of a memory, and what the blocks of a class are given of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtake.training.models.common.compiling import uncompiled

# classes that take tokens and latents which some samples do not have, and what is added to blocks
CLASSES = frozenset({"WanTransformer3DModel", "HunyuanVideoTransformer3DModel"})


class Front(NamedTuple):
    """Tokens in front of a window's own, such as a memory's.

    Where blocks attend to a text beside their tokens, these attend to "" in place of the window's.

    tokens     `(B, M, width)`, of the width of the backbone's own
    positions  in time, row and column, `(M, 3)` or `(B, M, 3)`, in tokens; any real numbers
    time       `(B,)`, the noise in them as t; None: they are clean
    seen       `(B, M)` bool, False for tokens that a sample does not have; None: it has all
    added      for each block, what it adds to the window's tokens `(B, N, width)`, as a function of them; None: nothing
    """

    tokens: Tensor
    positions: Tensor
    time: Tensor | None = None
    seen: Tensor | None = None
    added: Sequence[Callable[[Tensor], Tensor]] | None = None


class Context(NamedTuple):
    """What blocks attend to in place of a text, where there is more than one; it comes to them as the text.

    text, seen   `(B, N, D)` for the window's tokens, and `(B, tokens, N)` bool, which of it each of them sees; None: all
    none, ahead  `(B, N, D)` for the tokens in front, and their number
    added        see `Front`
    """

    text: Tensor
    seen: Tensor | None
    none: Tensor
    ahead: int
    added: Sequence[Callable[[Tensor], Tensor]] | None


class Adding:
    """A forward hook of block `number` that adds to its window's tokens what a `Context` says.

    All that it needs comes with the block's arguments, because a block that is recomputed in the backward pass is called again.
    """

    def __init__(self, number: int) -> None:
        self.number = number

    # its number would make each block's compilation one of its own
    @uncompiled
    def __call__(self, block: nn.Module, inputs: tuple[Any, ...], tokens: Tensor) -> Tensor:
        context = next((part for part in inputs if isinstance(part, Context)), None)
        if context is None or context.added is None:
            return tokens
        front, own = tokens[:, : context.ahead], tokens[:, context.ahead :]
        return torch.cat([front, own + context.added[self.number](own)], dim=1)


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
