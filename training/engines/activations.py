"""What a forward pass keeps for the backward pass, in the host's memory until it is needed.

Given up: a tensor that several operations keep is copied for each of them. What is small stays on the device, and so do
weights.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.config import TrainConfig
from longtake.training.engines.group import device
from longtake.training.objective import Objective

_SMALL = 1 << 20  # bytes of a tensor that stays where it is

Loss = Callable[[Any], tuple[Tensor, Any]]


def offloaded(objective: Objective, config: TrainConfig) -> Objective:
    """The objective with its activations on the host, where the config says so. UserError where the device is the host."""
    if not config.offload_activations:
        return objective
    if device().type == "cpu":
        raise UserError(
            "offload_activations: this training is in the host's memory already; leave it out without a GPU"
        )
    return replace(objective, loss=on_host(objective.loss, objective.modules))


def on_host(loss: Loss, modules: Mapping[str, nn.Module], host: str = "cpu") -> Loss:
    """The loss, whose backward pass takes what it needs from the host.

    Args:
        modules: whose weights stay on the device.
        host: the device that takes the copies.
    """

    def kept(turn: Any) -> tuple[Tensor, Any]:
        # ZeRO moves weights when it begins
        tensors = (t for module in modules.values() for t in (*module.parameters(), *module.buffers()))
        weights = {_storage(t) for t in tensors}

        def pack(x: Tensor) -> tuple[torch.device | None, Tensor]:
            if x.nbytes < _SMALL or _storage(x) in weights:
                return None, x
            copy = torch.empty_like(x, device=host, pin_memory=x.is_cuda, requires_grad=False)
            return x.device, copy.copy_(x, non_blocking=x.is_cuda)

        def unpack(packed: tuple[torch.device | None, Tensor]) -> Tensor:
            device, x = packed
            if device is None:
                return x
            return torch.empty_like(x, device=device).copy_(x, non_blocking=device.type == "cuda")

        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            return loss(turn)

    return kept


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata
