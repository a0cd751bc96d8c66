"""Activation checkpointing of a share of a model's blocks: the backward pass computes their activations again.

A block that is recomputed keeps its input alone, and costs a forward pass more. The blocks of a share are spread evenly, so
that no stretch of the model keeps all of its activations. Light to import: recipes are checked with it.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, ValidationError, ValidatorFunctionWrapHandler, WrapValidator

if TYPE_CHECKING:
    from torch import nn


def _ends(given: object, read: ValidatorFunctionWrapHandler) -> bool | float:
    try:
        share: bool | float = read(given)
    except ValidationError as e:
        raise ValueError(f"{given!r} is no share of blocks; give true, false, or a number from 0 to 1") from e
    # one way to write all and none, in config.json and in what decides a stage's result
    return bool(share) if share in (0, 1) else share


# of blocks: true is all, false none
Share = Annotated[bool | Annotated[float, Field(ge=0, le=1)], WrapValidator(_ends)]


def chosen(share: bool | float, number: int, count: int) -> bool:
    """Whether block `number`, 0.., of `count` is recomputed. At least one is where the share is not 0.

    The first of each stretch: the last block is recomputed while all others keep theirs, which saves nothing.
    """
    recomputed = math.ceil(share * count - 1e-9)
    return number * recomputed % count < recomputed


def called(again: bool, block: Callable[..., Any], *inputs: Any) -> Any:
    """The output of a block; with `again` the backward pass computes its activations again."""
    if not again:
        return block(*inputs)
    from torch.utils.checkpoint import checkpoint

    return checkpoint(block, *inputs, use_reentrant=False)


def mark(share: bool | float, modules: Iterable[nn.Module]) -> None:
    """Set `recomputed` of each module, spread evenly among those of its class, for `called_as_marked`.

    On the modules themselves, so that a copy of them has it too.
    """
    classes = defaultdict[type, list[Any]](list)
    for module in modules:
        classes[type(module)].append(module)
    for alike in classes.values():
        for number, module in enumerate(alike):
            module.recomputed = chosen(share, number, len(alike))


def called_as_marked(block: Any, *inputs: Any) -> Any:
    """The output of a module that `mark` has seen: what a class of diffusers is given to call its blocks by."""
    return called(block.recomputed, block, *inputs)
