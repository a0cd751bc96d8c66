"""The same random draws on every device: made on the CPU, whatever generator and device are asked for."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only


class SameDraws(TorchDispatchMode):
    """Within it, operations that draw do so on the CPU, from one random state that begins with `seed`; it counts them.

    Attention is left as it is: its kernels count as drawing for the sake of a dropout that is not used here.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.draws, self._rng = 0, Generator().manual_seed(seed)

    def __torch_dispatch__(self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if torch.Tag.nondeterministic_seeded not in func.tags or "attention" in func.name():
            return func(*args, **kwargs)
        self.draws += 1
        named = {argument.name for argument in func._schema.arguments}
        tensors = [a for a in args if isinstance(a, Tensor)]
        device = kwargs.get("device") or (tensors[0].device if tensors else torch.device("cpu"))
        if "device" in named:
            kwargs["device"] = torch.device("cpu")
        if "generator" in named:
            kwargs["generator"] = self._rng
        else:
            torch.default_generator.manual_seed(int(torch.randint(1 << 62, (), generator=self._rng)))
        on_cpu = tree_map_only(Tensor, Tensor.cpu, [a for a in args if not isinstance(a, Generator)])
        made = func(*on_cpu, **kwargs)
        if func._schema.is_mutable:
            return args[0].copy_(made)
        return tree_map_only(Tensor, lambda tensor: tensor.to(device), made)
