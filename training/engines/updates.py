"""What an update does with gradients that are not finite: it is left out, on all ranks at once. Others are clipped.

The kernel of a fused AdamW leaves an update out by itself, so that the host waits for nothing; else the host decides, and
waits for the device. With ZeRO-3, and where the optimizer is offloaded, DeepSpeed's own update decides, on the host too.
"""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.engines.group import device


def finish(engine: Any, clip: float) -> None:
    """Let the engine's updates decide as this module says, where they can; `clip` as in the config."""
    optimizer, base = engine.optimizer, engine.basic_optimizer
    if optimizer is base:
        base.register_step_pre_hook(partial(finish_gradients, clip))
    elif not base.defaults.get("fused") or not _without_waiting(optimizer, clip):
        return
    base.norm, base.left_out = 0.0, False


def _without_waiting(optimizer: Any, clip: float) -> bool:
    """Change one of DeepSpeed's optimizers so that its fused kernel decides; False where that cannot be."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
    from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    if isinstance(optimizer, FP16_UnfusedOptimizer):
        # bf16 without ZeRO
        optimizer.optimizer.register_step_pre_hook(partial(finish_gradients, clip))
        optimizer.step = partial(_step_of_bf16, optimizer)
    elif isinstance(optimizer, BF16_Optimizer):
        # bf16 whose gradients are fp32, with ZeRO-1
        optimizer.step = partial(_step_of_shares, optimizer, clip)
    elif isinstance(optimizer, DeepSpeedZeroOptimizer) and not optimizer.cpu_offload:
        # it asks three times whether something is not finite; one norm of all ranks' gradients answers that
        optimizer.check_overflow = _unasked
        optimizer.scaled_global_norm = partial(_norm_of_shares, optimizer)
        optimizer.unscale_and_clip_grads = partial(_clip_share, optimizer)
    else:
        return False
    return True


def left_out(engine: Any) -> Tensor | bool:
    """Whether the last update was left out, on all ranks, because a gradient was not finite; to read it may wait."""
    base = engine.basic_optimizer
    found: Tensor | bool = base.left_out if hasattr(base, "left_out") else engine.optimizer.overflow
    return found


def gradient_norm(engine: Any) -> Tensor | float:
    """Global norm of the gradients of the update just made, before clipping; to read it may wait for the device."""
    base = engine.basic_optimizer
    norm: Tensor | float = base.norm if hasattr(base, "norm") else engine.get_global_grad_norm()
    return norm


def finish_gradients(clip: float, optimizer: Any, *_: Any) -> None:
    """Clip what an optimizer is about to move by, the same on all ranks; leave the update out where it is not finite."""
    parameters: list[nn.Parameter] = [p for group in optimizer.param_groups for p in group["params"]]
    parameters = [p for p in parameters if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    if optimizer.defaults.get("fused"):
        _note(optimizer, norm)
        if clip:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        return
    # the host waits here for the device, once an update: it decides whether weights change
    optimizer.norm = float(norm)
    optimizer.left_out = not math.isfinite(optimizer.norm)
    if optimizer.left_out:
        for parameter in parameters:
            parameter.grad = None
    elif clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)


def _note(fused: Any, norm: Tensor) -> None:
    """Tell a fused optimizer, on the device, whether its next update is to be left out."""
    fused.norm, fused.left_out = norm, ~norm.isfinite()
    fused.found_inf = fused.left_out.float()


@torch.no_grad()
def _step_of_bf16(optimizer: Any) -> None:
    """In place of the update of DeepSpeed's optimizer without ZeRO: it looks at every gradient from the host.

    Gradients are those of all ranks already. An update that is left out gives the weights of passes the values they have.
    """
    groups = zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True)
    pairs = [pair for low, full in groups for pair in zip(low, full, strict=True)]
    for low, full in pairs:
        full.grad = torch.zeros_like(full) if low.grad is None else low.grad.to(full.dtype)
    optimizer.optimizer.step()
    torch._foreach_copy_([low.data for low, _ in pairs], [full.data for _, full in pairs])
    for _, full in pairs:
        full.grad = None


@torch.no_grad()
def _step_of_shares(optimizer: Any, clip: float) -> None:
    """In place of the update of DeepSpeed's optimizer for shares of bf16 weights: it asks whether the norm is finite.

    Each rank has all gradients, of all ranks, and so the same norm.
    """
    _note(optimizer.optimizer, torch.nn.utils.get_total_norm(optimizer.get_grads_for_norm()[0]))
    if clip:
        _clip(optimizer.get_grads_for_norm(for_clipping=True), optimizer.optimizer.norm, clip)
    shares = optimizer.fp32_groups_flat_partition, optimizer.fp32_groups_gradient_flat_partition
    for share, gradient in zip(*shares, strict=True):
        share.grad = gradient
    optimizer.optimizer.step()
    optimizer._lazy_init_hp_params_optimizer_state()
    optimizer.update_lp_params()
    optimizer.clear_hp_grads()


def _unasked(partition_gradients: bool = True) -> None:
    """In place of DeepSpeed's look at all gradients under ZeRO: what is not finite there is so in their norm too."""


def _norm_of_shares(optimizer: Any) -> float:
    """In place of DeepSpeed's norm of the gradients under ZeRO, which copies a number to the device for each group.

    Returns a finite number of the host, for which nobody waits: the kernel takes the norm itself.
    """
    shares = [g for group in optimizer.averaged_gradients.values() for g in group]
    norms = [torch.linalg.vector_norm(g, dtype=torch.float32) for g in shares if not getattr(g, "_zero_padding", False)]
    square = torch.stack([torch.zeros((), device=device()), *norms]).square().sum()
    torch.distributed.all_reduce(square, group=optimizer.dp_process_group)
    _note(optimizer.optimizer, square.sqrt())
    return 0.0


def _clip_share(optimizer: Any, gradients: list[Tensor], _: float) -> None:
    """In place of DeepSpeed's, which asks again whether the norm is finite."""
    if optimizer.clip_grad:
        _clip(gradients, optimizer.optimizer.norm, optimizer.clip_grad)


def _clip(gradients: list[Tensor], norm: Tensor, most: float) -> None:
    torch._foreach_mul_(gradients, 1.0 / torch.clamp((norm + 1e-6) / most, min=1.0))
