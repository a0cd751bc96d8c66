"""DeepSpeed engines: our config to theirs, in this one place. The process group is in `group`."""

import gc
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.config import TrainConfig
from longtake.training.engines import lora, muon
from longtake.training.engines.group import alone, device, process_group, store
from longtake.training.engines.sequence import groups_of, place, pretend_to_share, share_windows
from longtake.training.engines.shards import Fragment, fragments, gradient_norms, overwrite
from longtake.training.engines.updates import finish, gradient_norm, left_out

__all__ = [
    "Fragment",
    "alone",
    "channels_last",
    "deepspeed_config",
    "device",
    "engines_of",
    "fragments",
    "freeze",
    "gradient_norm",
    "gradient_norms",
    "groups_of",
    "left_out",
    "parameter_groups",
    "place",
    "pretend_to_share",
    "process_group",
    "set_lr",
    "share_windows",
    "store",
]

_MOST_REDUCED = 500_000_000  # elements of gradients in a bucket: DeepSpeed's own default


def deepspeed_config(config: TrainConfig, world: int, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's dict for a TrainConfig. Defaults of DeepSpeed that we rely on are stated.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    readers, shared = groups_of(config, world), config.run.launcher.sequence
    passes = readers * config.accumulate
    if config.batch % passes:
        who = f"{world} processes" if shared == 1 else f"{readers} groups of {shared} processes"
        raise UserError(f"batch: {config.batch} does not divide among {who} x accumulate {config.accumulate}")
    zero: dict[str, Any] = {"stage": config.zero_stage}
    # without ZeRO DeepSpeed refuses fp32 gradients of bf16 weights: `_sum_in_fp32` makes them
    gradients = config.precision if config.zero_stage == 0 else config.gradient_precision
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        # DeepSpeed counts the windows of every process, also those that several of them share
        "train_batch_size": config.batch * shared,
        "train_micro_batch_size_per_gpu": config.batch // passes,
        "gradient_accumulation_steps": config.accumulate,
        # plain fp32 is clipped by `finish`
        "gradient_clipping": 0.0 if config.zero_stage == 0 and config.precision == "fp32" else config.gradient_clip,
        # an update with a gradient that is not finite is left out, and the loop counts it
        "data_types": {"grad_accum_dtype": gradients},
        "communication_data_type": config.gradient_precision,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 1 << 60,
        # its figures are never asked for, and to take them the host waits for the device in each pass
        "timers": {"throughput": {"enabled": False}},
    }


def freeze(module: nn.Module, patterns: tuple[str, ...]) -> None:
    """Freeze the parameters whose names begin with a match. Raises UserError for a pattern that matches none.

    Those of a model of another library begin with `net.`, which may be left out.
    """
    for pattern in patterns:
        named = module.named_parameters()
        parameters = [p for name, p in named if re.match(pattern, name) or re.match(pattern, name.removeprefix("net."))]
        if not parameters:
            names = ", ".join(name for name, _ in module.named_children())
            raise UserError(f"freeze: {pattern!r} matches no parameter; their names begin with {names}")
        for parameter in parameters:
            parameter.requires_grad_(False)


@contextmanager
def _garbage_left() -> Iterator[None]:
    """DeepSpeed collects all garbage several times for each engine; what is there already is looked through no more."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@_garbage_left()
def engines_of(
    modules: Mapping[str, nn.Module],
    lead: str,
    config: TrainConfig,
    world: int,
    universal: bool = False,
    settings: Mapping[str, TrainConfig] | None = None,
) -> dict[str, Any]:
    """A DeepSpeed engine for each module, with the config's optimizer over its `parameter_groups`. Needs a process group.

    The module `lead` is changed as `freeze` and `lora` of the config say.

    Args:
        universal: the engines will load a universal checkpoint (see `checkpoint.for_world`).
        settings: by name of a module, its own rate, betas and weight decay.

    Raises:
        UserError: the batch does not divide among the processes; `freeze`, `lora` or `optimizer` finds nothing; nothing learns.
    """
    deepspeed_settings = deepspeed_config(config, world, universal)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # else a C++ extension is compiled at the first start, for minutes, and a killed build hangs every later one
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False)
    freeze(modules[lead], config.freeze)
    if config.lora:
        learns = lora.attach(modules[lead], config.lora)
        if torch.distributed.get_rank() == 0:
            print(learns, flush=True)
    if config.optimizer == "muon":
        muon.check_matrices(modules[lead])
    engines = {}
    fused = config.fused(on_gpu=device().type != "cpu")
    for name, module in modules.items():
        own = (settings or {}).get(name, config)
        wide = _kept_in_fp32(module, config)
        matrices = muon.matrices_of(module) if config.optimizer == "muon" else []
        groups = parameter_groups(module, own.weight_decay, matrices)
        if not groups:
            raise UserError(f"freeze: nothing is left to learn in {name}")
        make = muon.Muon if matrices else torch.optim.AdamW
        # DeepSpeed may make its states by an update without gradients: at this rate no weight decays
        optimizer: torch.optim.Optimizer = make(groups, lr=0.0, betas=own.betas, fused=fused or None)
        # DeepSpeed allocates buckets for gradients of their full size: no larger than what learns
        learning = sum(p.numel() for group in groups for p in group["params"])
        zero = deepspeed_settings["zero_optimization"] | {"reduce_bucket_size": min(_MOST_REDUCED, learning)}
        engine = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            config=deepspeed_settings | {"zero_optimization": zero},
            dist_init_required=False,
        )[0]
        set_lr(engine, own.lr)
        overwrite(engine, wide)
        if config.zero_stage == 3:
            _fill_states(engine)
        # nor does that update count
        for state in optimizer.state.values():
            if "step" in state:
                state["step"].zero_()
        if world == 1 and config.zero_stage == 0:
            # else all gradients are copied into one buffer and back, for no other rank
            engine.enable_backward_allreduce = False
        if config.zero_stage == 0 and config.precision != config.gradient_precision:
            _sum_in_fp32(engine)
        finish(engine, config.gradient_clip)
        engines[name] = engine
    return engines


def channels_last(module: nn.Module) -> None:
    """Give 3D convolutions inputs with the channels last in memory, as tensor cores take them. Outputs have it too.

    Weights stay as they are, since ZeRO keeps them in flat buffers; cuDNN converts them at little cost.
    """

    def converted(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].contiguous(memory_format=torch.channels_last_3d), *inputs[1:])

    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            layer.register_forward_pre_hook(converted)


def parameter_groups(
    module: nn.Module, weight_decay: float, matrices: Sequence[nn.Parameter] = ()
) -> list[dict[str, Any]]:
    """The parameters that take gradients, for an optimizer: weights of linear and convolution layers decay, others do not.

    Norms, biases, embeddings and tokens have a scale that means something; an empty group is left out. `matrices`, which
    decay too, get a group of their own.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    weights = {id(layer.weight) for layer in layers}
    apart = {id(p) for p in matrices}
    learning = [p for p in module.parameters() if p.requires_grad and id(p) not in apart]
    # what ZeRO cuts from one buffer is of one type
    kept = {id(p) for part in _keeping(module) for p in part.keep_fp32().values()}
    groups = [
        {
            "params": [p for p in learning if (id(p) in weights) == decays and (id(p) in kept) == wide],
            "weight_decay": decay,
        }
        for wide in (False, True)
        for decays, decay in ((True, weight_decay), (False, 0.0))
    ]
    if matrices:
        groups.append({"params": list(matrices), "weight_decay": weight_decay, "matrices": True})
    return [group for group in groups if group["params"]]


def _keeping(module: nn.Module) -> list[Any]:
    """Its parts that keep some of their weights in fp32, which `keep_fp32` names, in any dtype of the others."""
    return [part for part in module.modules() if hasattr(part, "keep_fp32")]


def _kept_in_fp32(module: nn.Module, config: TrainConfig) -> dict[str, Tensor]:
    """Copies of what parts of a module keep in fp32 while the rest is bf16, by name: DeepSpeed rounds them at its start.

    ZeRO-3 cuts all that learns from one buffer: there such a part keeps nothing, if any of it learns. Its weights are still
    updated in fp32, and passes use them as bf16.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    copies: dict[str, Tensor] = {}
    for part in _keeping(module) if config.precision == "bf16" else ():
        kept = [p for p in part.keep_fp32().values() if id(p) in names]
        part.holds_fp32 = not (config.zero_stage == 3 and any(p.requires_grad for p in kept))
        copies |= {names[id(p)]: p.detach().float().clone() for p in kept if part.holds_fp32}
    return copies


def _sum_in_fp32(engine: Any) -> None:
    """Give bf16 parameters gradients of fp32, to add up passes and ranks in."""
    parameters: list[nn.Parameter] = [p for group in engine.optimizer.fp16_groups for p in group]
    for p in parameters:
        p.grad, p.grad_dtype = None, torch.float32

    def gradients() -> tuple[list[Tensor], dict[str, list[Tensor]]]:
        # DeepSpeed's own fills what is missing on this rank with bf16
        for p in parameters:
            p.grad = torch.zeros_like(p, dtype=torch.float32) if p.grad is None else p.grad
        return [p.grad for p in parameters if p.grad is not None], {}

    engine.optimizer.get_grads_for_reduction = gradients


def _fill_states(engine: Any) -> None:
    """Give AdamW its states before the first update: a checkpoint from before it could not be made universal at ZeRO-3."""
    optimizer = engine.optimizer.optimizer
    for p in engine.optimizer.fp32_partitioned_groups_flat:
        zeros = torch.zeros_like(p, requires_grad=False)
        # a fused kernel reads it on the device
        step = torch.tensor(0.0, device=p.device if optimizer.defaults["fused"] else "cpu")
        optimizer.state[p] = {"step": step, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def set_lr(engine: Any, lr: float) -> None:
    """Set the learning rate of all parameters."""
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
