"""Sequence parallel: ranks that share a window, each with a slice of its tokens (DeepSpeed-Ulysses, arXiv 2309.14509).

A model that takes part has a `sequence`, the group of its rank, which a training sets (`engines.share_windows`). All ranks of
a group call it with the same inputs and get the same outputs, whole. Inside, a rank's blocks have a slice of the tokens.
Attention needs all of them: before it an all-to-all gives each rank a part of the heads of every token, after it another
gives each rank all heads of its own tokens.

What makes and what reads the tokens is the same on all ranks, and so is the loss. Every rank's gradient is that of the sum
of the group's losses along the paths through its own tokens; so the mean over all ranks, which DeepSpeed takes anyway, is
the gradient of the mean loss, and nothing is scaled.

DeepSpeed's own `DistributedAttention` needs slices of equal length, keys without a mask, and one group for the process; its
exchange is opaque to `torch.compile`. Here a rank may have a token more than another, and what crosses goes through torch's
functional collectives, which have a backward pass, and which gloo and NCCL both have.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed._functional_collectives import all_to_all_single, wait_tensor


class Shares(NamedTuple):
    """How the tokens of one sequence are shared in a group of ranks.

    group    its name
    rank     this one's number in it
    lengths  tokens of each rank
    """

    group: str
    rank: int
    lengths: tuple[int, ...]

    @property
    def slice(self) -> slice:
        """This rank's tokens."""
        ends = list(accumulate(self.lengths))
        return slice(ends[self.rank] - self.lengths[self.rank], ends[self.rank])

    def followed_by(self, rows: int, others: Shares) -> Shares:
        """A sequence of which each rank has these tokens, and behind them its slice of others, in so many rows."""
        lengths = zip(self.lengths, others.lengths, strict=True)
        return self._replace(lengths=tuple(here + rows * there for here, there in lengths))


class SequenceGroup(NamedTuple):
    """The ranks that share a window with this one.

    name  of the process group
    rank  of this process in it
    size  number of ranks
    """

    name: str
    rank: int
    size: int

    def shares(self, tokens: int) -> Shares:
        """An equal share of tokens for each rank; the first ones have one more where that does not divide."""
        each, more = divmod(tokens, self.size)
        return Shares(self.name, self.rank, tuple(each + (rank < more) for rank in range(self.size)))


def shares_of(group: SequenceGroup | None, tokens: int) -> Shares | None:
    """The shares of a group; None for a rank that has a window for itself."""
    return None if group is None else group.shares(tokens)


def own(x: Tensor, shares: Shares | None, dim: int) -> Tensor:
    """This rank's slice of a tensor that all ranks have whole."""
    if shares is None:
        return x
    return x.narrow(dim, shares.slice.start, shares.lengths[shares.rank])


def whole(x: Tensor, shares: Shares | None, dim: int) -> Tensor:
    """The slices of all ranks, one after the other."""
    if shares is None:
        return x
    x = x.movedim(dim, 0)
    rest, ranks = prod(x.shape[1:]), len(shares.lengths)
    sent = x.reshape(-1).repeat(ranks)
    flat = _exchanged(sent, [x.numel()] * ranks, [rest * length for length in shares.lengths], shares.group)
    return flat.view(-1, *x.shape[1:]).movedim(0, dim)


def to_heads(parts: Sequence[Tensor], shares: Shares) -> list[Tensor]:
    """Queries, keys and values `(B, heads, n, d)` of this rank's tokens -> `(B, heads / ranks, N, d)` of all tokens.

    Tokens are in the order of their ranks. All parts cross in one exchange.
    """
    ranks = len(shares.lengths)
    sent = torch.stack([part.unflatten(1, (ranks, -1)).movedim(1, 0) for part in parts], dim=1)
    shapes = [(*sent.shape[1:-2], length, sent.shape[-1]) for length in shares.lengths]
    sizes = [prod(shape) for shape in shapes]
    flat = _exchanged(sent.flatten(), [sent[0].numel()] * ranks, sizes, shares.group)
    pieces = [piece.view(shape) for piece, shape in zip(flat.split(sizes), shapes, strict=True)]
    return list(torch.cat(pieces, dim=-2).unbind(0))


def to_tokens(mixed: Tensor, shares: Shares) -> Tensor:
    """What attention made of all tokens `(B, heads / ranks, N, d)` -> `(B, heads, n, d)` of this rank's tokens."""
    ranks, here = len(shares.lengths), shares.lengths[shares.rank]
    sent = [piece.flatten() for piece in mixed.split(shares.lengths, dim=2)]
    shape = (*mixed.shape[:2], here, mixed.shape[3])
    flat = _exchanged(torch.cat(sent), [len(piece) for piece in sent], [prod(shape)] * ranks, shares.group)
    return flat.view(ranks, *shape).movedim(0, 1).flatten(1, 2)


def _exchanged(x: Tensor, sent: list[int], received: list[int], group: str) -> Tensor:
    """All-to-all of flat pieces, a piece of so many elements to and from each rank; the gradients go the way back."""
    name: Any = group
    return wait_tensor(all_to_all_single(x, received, sent, name))
