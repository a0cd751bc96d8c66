"""The memories that a `memory_dit` may have, a row each: φ, its baselines, and none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn

from longtake.training.models.memory.baselines import FramePack, Patchify, framepack_tokens
from longtake.training.models.memory.encoder import Encoder
from longtake.training.models.memory.tokens import parse_rate, tokens_of

Shape = tuple[int, int, int]  # (T, H, W) in latents


class Variant(NamedTuple):
    """One kind of memory; its functions take the model's config.

    build    returns the modules that make its tokens
    tokens   returns the number of tokens of a history of `Shape`
    rated    tokens stand for cells at the config's `rates`
    low      a branch reads the scaled-down video
    empty    it holds nothing
    joins    memories of chunks are joined; else each chunk makes the memory of the whole history anew
    """

    build: Callable[[Any], list[nn.Module]]
    tokens: Callable[[Any, Shape], int]
    rated: bool = False
    low: bool = False
    empty: bool = False
    joins: bool = True


def _encoders(config: Any) -> list[nn.Module]:
    branches = (config.branches, config.memory_widths, config.memory_heads)
    sizes = (config.patch, config.channels, config.width)
    rates = map(parse_rate, config.rates)
    return [Encoder(rate, *sizes, *branches, config.shrink, config.activation_checkpointing) for rate in rates]


def _patchifiers(config: Any) -> list[nn.Module]:
    return [Patchify(parse_rate(rate), config.patch, config.channels, config.width) for rate in config.rates]


def _packed(config: Any) -> list[nn.Module]:
    return [FramePack(config.patch, config.channels, config.width, config.history)]


def _by_rates(config: Any, shape: Shape) -> int:
    return sum(tokens_of(rate, config.patch, shape) for rate in config.rates)


# fmt: off
VARIANTS = {
    "encoder":   Variant(_encoders,    _by_rates, rated=True, low=True),
    "patchify":  Variant(_patchifiers, _by_rates, rated=True),
    "framepack": Variant(_packed, lambda config, shape: framepack_tokens(config.patch, shape), joins=False),
    "none":      Variant(lambda config: [], lambda config, shape: 0, empty=True),
}
# fmt: on
