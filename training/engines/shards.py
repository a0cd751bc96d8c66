"""What ZeRO leaves on a rank: its fragments of the weights, and their gradients."""

from collections.abc import Iterator, Mapping
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from longtake.training.engines.group import device


class Fragment(NamedTuple):
    """The part of a parameter or buffer that this rank holds: flat elements from `start` on."""

    name: str
    shape: torch.Size
    start: int
    value: Tensor
    learns: bool


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's share of the module's state: each element is on exactly one rank, trained ones in fp32, as updated.

    Nothing is copied or gathered: these are ZeRO's own tensors on this rank, at any stage.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    stage, masters = engine.zero_optimization_stage(), _masters(engine)
    # dealt out by themselves: of LoRA's four tensors a layer two learn, and some ranks would have the averages of none
    numbers = {True: count(), False: count()}
    for name, p in engine.module.named_parameters():
        if stage == 3:
            value = _sharded(p) if p.requires_grad else p.ds_tensor.data
            start = rank * p.ds_tensor.numel()
            value = value.flatten()[: max(0, p.ds_numel - start)]
            if value.numel():
                yield Fragment(name, p.ds_shape, start, value, p.requires_grad)
        elif hasattr(p, "_hp_mapping"):
            if p._hp_mapping is not None:
                start = p._hp_mapping.lp_fragment_address.start
                yield Fragment(name, p.shape, start, p._hp_mapping.hp_fragment.data, p.requires_grad)
        elif next(numbers[p.requires_grad]) % world == rank:
            yield Fragment(name, p.shape, 0, masters.get(id(p), p.data).flatten(), p.requires_grad)
    if rank == 0:
        persistent = engine.module.state_dict().keys()
        for name, buffer in engine.module.named_buffers():
            if name in persistent:
                yield Fragment(name, buffer.shape, 0, buffer.data.flatten(), False)


def _sharded(p: Any) -> Tensor:
    """ZeRO-3's fp32 weights of a parameter on this rank, where they are: on the host if they are offloaded."""
    # `safe_get_local_fp32_param` gives a copy of those, and one that drags along the history of what is made of it
    optimizer = p._z3_optimizer
    value: Tensor = optimizer._get_fp32_opt_state_partition(p, release_swap_buffers=True)[0]
    return value.detach()


def _masters(engine: Any) -> dict[int, Tensor]:
    """Without ZeRO: the fp32 weights of bf16 parameters, whole on every rank, by `id`."""
    if engine.zero_optimization_stage() != 0:
        return {}
    low, full = (getattr(engine.optimizer, f"{kind}_groups", []) for kind in ("fp16", "fp32"))
    return {id(p): m.data for a, b in zip(low, full, strict=True) for p, m in zip(a, b, strict=True)}


def overwrite(engine: Any, values: Mapping[str, Tensor]) -> None:
    """Set parameters of the engine's module, by name, to whole values before the first step. Every rank must call it."""
    masters, sharded = _masters(engine), engine.zero_optimization_stage() == 3
    for name, p in engine.module.named_parameters():
        if name not in values:
            continue
        if not sharded:
            p.data.copy_(values[name])
        flat = values[name].flatten()
        if id(p) in masters:
            masters[id(p)].copy_(values[name])
        elif getattr(p, "_hp_mapping", None) is not None:
            place = p._hp_mapping.lp_fragment_address
            p._hp_mapping.hp_fragment.data.copy_(flat[place.start : place.start + place.numel])
        elif sharded:
            part = p.ds_tensor.numel()
            piece = flat[torch.distributed.get_rank() * part :][:part]
            p.ds_tensor.data[: len(piece)].copy_(piece)


def gradient_norms(engine: Any) -> dict[str, Tensor]:
    """Norm of the gradients of each child of the module, before clipping; call it between the last backward and the update.

    Every rank must call it. Ranks exchange one small vector; the norms stay on the device, so that nothing waits for them.
    """
    children = [name for name, child in engine.module.named_children() if any(True for _ in child.parameters())]
    gradients: dict[str, list[Tensor]] = {name: [] for name in children}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for number, (name, p) in enumerate(engine.module.named_parameters()):
        child = name.partition(".")[0]
        if p.requires_grad and child in gradients:
            gradient = _local_gradient(engine, p, number % world == rank)
            if gradient is not None:
                gradients[child].append(gradient.float())
    norms = [torch.nn.utils.get_total_norm(values).to(device()) for values in gradients.values()]
    squares = torch.stack(norms).square() if norms else torch.zeros(0, device=device())
    torch.distributed.all_reduce(squares)
    return dict(zip(children, squares.sqrt().unbind(), strict=True))


def _local_gradient(engine: Any, p: nn.Parameter, mine: bool) -> Tensor | None:
    """The part of a parameter's gradient that this rank counts."""
    if engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(p)
    if not hasattr(p, "_hp_mapping"):
        return p.grad if mine else None
    mapping: Any = p._hp_mapping
    if mapping is None:
        return None
    gradient = mapping.get_lp_grad_fragment(p._index_in_param_group).flatten()  # type: ignore[attr-defined]
    place = mapping.lp_fragment_address
    return gradient[place.start : place.start + place.numel] if gradient.numel() == p.numel() else gradient
