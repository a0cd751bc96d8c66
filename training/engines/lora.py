"""Low-rank adaptation (arXiv 2106.09685) of linear and convolution layers, made to be sharded by every ZeRO stage.

Our own instead of the `peft` package: that wants `transformers` and its model classes, and we need few functions.
"""

import copy
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.config import LoraConfig

_DOWN, _UP = "lora_down", "lora_up"
_NEW = "begun_anew"  # attribute of a module


def let_learn(module: nn.Module, new: Iterable[str]) -> None:
    """Have `attach` train these parameters of `module` in full: they are new and random, and need more than a low-rank change."""
    setattr(module, _NEW, frozenset(new))


def attach(module: nn.Module, config: LoraConfig) -> str:
    """Freeze all of `module` except `config.full` and low-rank changes of `config.targets`, or else of its own `lora_targets`.

    A layer gets two children, `lora_down` to `rank` channels with the layer's own kernel and `lora_up` back, the latter
    zero: nothing changes at first. They are modules of their own so that ZeRO-3 gathers them when they are called.
    A layer that is trained in full, or was frozen before, gets none; `full` does not unfreeze it.

    Returns:
        What learns now, as a line to print.

    Raises:
        UserError: a target matches no linear or convolution layer, or one that has groups; `full` matches no parameter.
    """
    layers = {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)}
    targets = [re.compile(target) for target in config.targets or getattr(module, "lora_targets", ())]
    for target in targets:
        if not any(target.fullmatch(name) for name in layers):
            raise UserError(
                f"lora.targets: {target.pattern!r} matches no linear or convolution layer, such as {next(iter(layers), None)}"
            )
    learning = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    full = learning & getattr(module, _NEW, frozenset())
    for pattern in config.full:
        matches = {name for name, _ in module.named_parameters() if re.match(pattern, name)}
        if not matches:
            names = ", ".join(name for name, _ in module.named_children())
            raise UserError(f"lora.full: {pattern!r} matches no parameter; their names begin with {names}")
        full |= matches & learning
    for name, parameter in module.named_parameters():
        parameter.requires_grad_(name in full)
    changed = 0
    for name, layer in layers.items():
        changeable = f"{name}.weight".lstrip(".") in learning - full
        if changeable and any(target.fullmatch(name) for target in targets):
            down, up = _pair(layer, config.rank)
            layer.add_module(_DOWN, down)
            layer.add_module(_UP, up)
            layer.register_forward_hook(_Change(config.scale))
            changed += 1
    return (
        f"lora: {changed} layers learn a change of rank {config.rank}, which counts {config.scale:g} (alpha / rank),"
        f" and {len(full)} tensors learn in full"
    )


class _Change:
    """A forward hook that adds the change; an object, because it must survive a deep copy of the module."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def __call__(self, layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        down, up = getattr(layer, _DOWN), getattr(layer, _UP)
        return output + self.scale * up(down(*inputs))


def _pair(layer: nn.Linear | nn.Conv2d | nn.Conv3d, rank: int) -> tuple[nn.Module, nn.Module]:
    weight = layer.weight
    like: dict[str, Any] = {"device": weight.device, "dtype": weight.dtype}
    if isinstance(layer, nn.Linear):
        down: nn.Module = nn.Linear(layer.in_features, rank, bias=False, **like)
        up: nn.Module = nn.Linear(rank, layer.out_features, bias=False, **like)
    else:
        if layer.groups != 1:
            raise UserError(f"lora.targets: a convolution of {layer.groups} groups cannot be changed; leave it out")
        # a copy, so that the padding of a causal convolution comes with it
        down = copy.deepcopy(layer)
        down.out_channels, down.bias = rank, None
        down.weight = nn.Parameter(torch.empty(rank, *weight.shape[1:], **like))
        pointwise = nn.Conv3d if isinstance(layer, nn.Conv3d) else nn.Conv2d
        up = pointwise(rank, layer.out_channels, 1, bias=False, **like)
    nn.init.kaiming_uniform_(down.weight, a=math.sqrt(5))  # type: ignore[arg-type]
    nn.init.zeros_(up.weight)  # type: ignore[arg-type]
    return down, up


def is_change(name: str) -> bool:
    """Whether a parameter is one of those that `attach` has added."""
    return name.rpartition(".")[0].rpartition(".")[2] in (_DOWN, _UP)


def merged(weights: Mapping[str, Tensor], config: LoraConfig) -> Iterator[tuple[str, Tensor]]:
    """The weights of the module as it was before `attach`, with the changes added to them in fp32; one tensor at a time.

    What is changed stays fp32: of a bf16 weight a change below half an ulp would be lost.
    """
    for name in weights:
        layer, _, last = name.rpartition(".")
        if is_change(name):
            continue
        value = weights[name]
        if last == "weight" and f"{layer}.{_UP}.weight" in weights:
            up, down = weights[f"{layer}.{_UP}.weight"].float(), weights[f"{layer}.{_DOWN}.weight"].float()
            change = torch.einsum("or,ri->oi", up.flatten(1), down.flatten(1)).view(value.shape)
            value = value.float() + config.scale * change
        yield name, value
