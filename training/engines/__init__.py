"""Process groups and DeepSpeed engines: our config to theirs, in this one place."""

import importlib
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from longtake.datasets import environment
from longtake.datasets.errors import Failure, UserError
from longtake.training.config import TrainConfig
from longtake.training.engines import lora

_SILENT = 10.0  # seconds that ranks wait for each other before they say so


def deepspeed_config(config: TrainConfig, world: int, universal: bool = False) -> dict[str, Any]:
    """DeepSpeed's dict for a TrainConfig. Whatever DeepSpeed would choose by itself and we rely on is stated.

    Raises:
        UserError: the batch does not divide among the processes.
    """
    passes = world * config.accumulate
    if config.batch % passes:
        raise UserError(
            f"batch: {config.batch} does not divide among {world} processes x accumulate {config.accumulate}"
        )
    zero: dict[str, Any] = {"stage": config.zero_stage}
    # without ZeRO DeepSpeed refuses other gradients than bf16 weights have: there `_sum_in_fp32` sees to them
    summed = config.precision if config.zero_stage == 0 else config.gradient_precision
    if config.offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if config.offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    return {
        "train_batch_size": config.batch,
        "train_micro_batch_size_per_gpu": config.batch // passes,
        "gradient_accumulation_steps": config.accumulate,
        # plain fp32 is clipped by `_finish_gradients`
        "gradient_clipping": 0.0 if config.zero_stage == 0 and config.precision == "fp32" else config.gradient_clip,
        # an update with a gradient that is not finite is left out, and the loop hears of it
        "data_types": {"grad_accum_dtype": summed},
        "communication_data_type": config.gradient_precision,
        "bf16": {"enabled": config.precision == "bf16", "check_grad_overflow": True},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 1 << 60,
    }


@contextmanager
def process_group(stall_seconds: float = 1800.0) -> Iterator[tuple[int, int]]:
    """(rank, world size). Under torchrun or Ray Train the group that their variables describe; alone, one without a port.

    A group that is there already is used as it is. `stall_seconds` is how long a collective waits for a rank.

    Raises:
        UserError: MASTER_PORT is taken.
    """
    rank, world = environment.ranks()
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    else:
        torch.cuda.set_device(device())
    # here, since `_without` must not meet a tracker's thread that imports MLflow
    with _compiler_noise_hidden(), _without("mlflow"):
        importlib.import_module("deepspeed")
    if torch.distributed.is_initialized():
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
        return
    backend = "nccl" if gpu else "gloo"
    # one process alone needs no port, whatever else its scheduler has set
    launched = world > 1
    # the watchdog of the loop speaks first, and says who is missing
    patience = timedelta(seconds=1.5 * stall_seconds + 30)
    alone = {"RANK": "0", "LOCAL_RANK": os.environ.get("LOCAL_RANK", "0"), "WORLD_SIZE": "1"}
    before = {name: os.environ.get(name) for name in alone}
    if launched:
        shared = _joined(rank, world, patience)
        torch.distributed.init_process_group(backend, store=shared, rank=rank, world_size=world, timeout=patience)
    else:
        os.environ |= alone
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
        _leave()
    finally:
        _destroy_group()
        for name, value in before.items():
            if value is None and not launched:
                del os.environ[name]


def _joined(rank: int, world: int, patience: timedelta) -> torch.distributed.Store:
    """The ranks' store once all have come. Waits in a thread, so that signals are heard, and says what it waits for.

    Raises:
        UserError: MASTER_PORT is taken.
        Failure: the others have not come.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    outcome: list[Any] = []

    def join() -> None:
        try:
            outcome.append(next(rendezvous("env://", rank, world, timeout=patience))[0])
        except BaseException as e:
            outcome.append(e)

    thread = threading.Thread(target=join, daemon=True)
    thread.start()
    thread.join(_SILENT)
    if not outcome:
        print(f"training: rank {rank} waits for the others of {world} at {place}", file=sys.stderr, flush=True)
    while not outcome:
        thread.join(0.5)
    if isinstance(outcome[0], torch.distributed.DistNetworkError):
        port = os.environ.get("MASTER_PORT")
        raise UserError(
            f"MASTER_PORT={port}: cannot be used ({str(outcome[0]).splitlines()[0]}); set MASTER_PORT to a free port"
        ) from outcome[0]
    if isinstance(outcome[0], torch.distributed.DistError):
        raise Failure(
            f"training: rank {rank} did not meet the others of {world} at {place} ({str(outcome[0]).splitlines()[0]})"
        ) from outcome[0]
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    # as init_process_group does with a store that it opens itself
    outcome[0].set_timeout(patience)
    return torch.distributed.PrefixStore("default_pg", outcome[0])


def _leave(seconds: float = 60.0) -> None:
    """Let rank 0, which keeps the ranks' store, go last: another may still read there what lets it end."""
    shared, key, end = store(), "longtake/left", time.monotonic() + seconds
    if torch.distributed.get_rank() != 0:
        # the work is done, whatever has become of rank 0
        with suppress(RuntimeError):
            shared.add(key, 1)
        return
    others = torch.distributed.get_world_size() - 1
    while shared.add(key, 0) < others and time.monotonic() < end:
        time.sleep(0.01)


def _destroy_group() -> None:
    """End the group for DeepSpeed too, which remembers it: the next training in this process needs another."""
    comm = sys.modules.get("deepspeed.comm.comm")
    if comm is not None and comm.cdb is not None:
        comm.destroy_process_group()
    else:
        torch.distributed.destroy_process_group()


def device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def store() -> Any:
    """The key-value store that the ranks of the process group share; threads may use it while collectives run."""
    return torch.distributed.distributed_c10d._get_default_store()


def freeze(module: nn.Module, patterns: tuple[str, ...]) -> None:
    """Let the parameters whose names begin with a match stand still. Raises UserError for a pattern that finds none."""
    for pattern in patterns:
        found = [p for name, p in module.named_parameters() if re.match(pattern, name)]
        if not found:
            names = ", ".join(name for name, _ in module.named_children())
            raise UserError(f"freeze: {pattern!r} matches no parameter; their names begin with {names}")
        for parameter in found:
            parameter.requires_grad_(False)


def engines_of(
    modules: Mapping[str, nn.Module],
    lead: str,
    config: TrainConfig,
    world: int,
    universal: bool = False,
    own: Mapping[str, TrainConfig] | None = None,
) -> dict[str, Any]:
    """A DeepSpeed engine for each module, AdamW over its `parameter_groups`. Needs a process group.

    A module that is named in `own` has the rate, betas and weight decay of that.

    The module `lead` is changed as `freeze` and `lora` of the config say. With `universal` the engines will load a
    universal checkpoint (see `checkpoint.for_world`).

    Raises:
        UserError: the batch does not divide among the processes; `freeze` or `lora` finds nothing; nothing learns.
    """
    settings = deepspeed_config(config, world, universal)
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
    made = {}
    for name, module in modules.items():
        how = (own or {}).get(name, config)
        groups = parameter_groups(module, how.weight_decay)
        if not groups:
            raise UserError(f"freeze: nothing is left to learn in {name}")
        optimizer = torch.optim.AdamW(groups, lr=how.lr, betas=how.betas)
        engine = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[0]
        if config.zero_stage == 3:
            _fill_states(engine)
        # DeepSpeed may make AdamW's states by an update without gradients, which is none
        for state in optimizer.state.values():
            state["step"].zero_()
        if world == 1 and config.zero_stage == 0:
            # else all gradients are copied together, sent to nobody and copied back
            engine.enable_backward_allreduce = False
        if config.zero_stage == 0 and config.precision != config.gradient_precision:
            _sum_in_fp32(engine)
        if _plain(engine):
            optimizer.register_step_pre_hook(partial(_finish_gradients, config.gradient_clip))
        made[name] = engine
    return made


def channels_last(module: nn.Module) -> None:
    """Give 3D convolutions inputs with the channels last in memory, as tensor cores take them; what they make is so too.

    Weights stay as they are, since ZeRO keeps them in flat buffers; cuDNN turns them, which is little.
    """

    def turned(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return (inputs[0].contiguous(memory_format=torch.channels_last_3d), *inputs[1:])

    for layer in module.modules():
        if isinstance(layer, nn.Conv3d):
            layer.register_forward_pre_hook(turned)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters that take gradients, for an optimizer: weights of linear and convolution layers decay, all else does not.

    Norms, biases, embeddings and tokens have a scale that means something; an empty group is left out.
    """
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.modules.conv._ConvNd)]
    weights = {id(layer.weight) for layer in layers}
    learning = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in learning if id(p) in weights], "weight_decay": weight_decay},
        {"params": [p for p in learning if id(p) not in weights], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _sum_in_fp32(engine: Any) -> None:
    """Give bf16 parameters gradients of fp32, in which passes are added up, and ranks; they are cast as they come."""
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
        optimizer.state[p] = {"step": torch.tensor(0.0), "exp_avg": zeros, "exp_avg_sq": zeros.clone()}


def _plain(engine: Any) -> bool:
    """Whether the engine's parameters are the fp32 weights themselves, whole on every rank."""
    return engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled()


def _finish_gradients(clip: float, optimizer: Any, *_: Any) -> None:
    """What DeepSpeed does itself at all other stages: clip, and leave the weights alone where a gradient is not finite."""
    parameters = [p for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    optimizer.norm, optimizer.left_out = float(norm), not bool(torch.isfinite(norm))
    if optimizer.left_out:
        for parameter in parameters:
            parameter.grad = None
    elif clip:
        torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)


def left_out(engine: Any) -> bool:
    """Whether the last update was left out, on all ranks, because a gradient was not finite."""
    return bool(engine.optimizer.left_out if _plain(engine) else engine.optimizer.overflow)


@contextmanager
def _compiler_noise_hidden() -> Iterator[None]:
    """DeepSpeed tries at import what it could compile, and the linker's complaints go straight to the terminal."""
    sys.stderr.flush()
    kept, null = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(null)


@contextmanager
def _without(package: str) -> Iterator[None]:
    """DeepSpeed's autotuner imports MLflow where it can, which takes most of the seconds that importing DeepSpeed takes."""
    if package in sys.modules or "deepspeed" in sys.modules:
        yield
        return
    sys.modules[package] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[package]


class Fragment(NamedTuple):
    """The part of a parameter or buffer that this rank holds: `value` is flat, elements from `start` on."""

    name: str
    shape: torch.Size
    start: int
    value: Tensor
    learns: bool


def fragments(engine: Any) -> Iterator[Fragment]:
    """This rank's share of the module's state, each element on exactly one rank; what learns in fp32, as updated.

    Nothing is copied or gathered: this reads what ZeRO has on this rank, whatever the stage.
    """
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    stage = engine.zero_optimization_stage()
    low, full = (
        (getattr(engine.optimizer, f"{kind}_groups", []) for kind in ("fp16", "fp32")) if stage == 0 else ([], [])
    )
    masters = {id(p): m.data for a, b in zip(low, full, strict=True) for p, m in zip(a, b, strict=True)}
    for number, (name, p) in enumerate(engine.module.named_parameters()):
        if stage == 3:
            from deepspeed.utils import safe_get_local_fp32_param

            value = safe_get_local_fp32_param(p) if p.requires_grad else p.ds_tensor.data
            start = rank * p.ds_tensor.numel()
            value = value.flatten()[: max(0, p.ds_numel - start)]
            if value.numel():
                yield Fragment(name, p.ds_shape, start, value, p.requires_grad)
        elif hasattr(p, "_hp_mapping"):
            if p._hp_mapping is not None:
                start = p._hp_mapping.lp_fragment_address.start
                yield Fragment(name, p.shape, start, p._hp_mapping.hp_fragment.data, p.requires_grad)
        elif number % world == rank:
            yield Fragment(name, p.shape, 0, masters.get(id(p), p.data).flatten(), p.requires_grad)
    if rank == 0:
        kept = engine.module.state_dict().keys()
        for name, buffer in engine.module.named_buffers():
            if name in kept:
                yield Fragment(name, buffer.shape, 0, buffer.data.flatten(), False)


def gradient_norms(engine: Any) -> dict[str, float]:
    """Norm of the gradients of each child of the module, before clipping; between the last backward and the update.

    Every rank must call it. Adds up what each rank has and shares one small vector.
    """
    children = [name for name, child in engine.module.named_children() if any(True for _ in child.parameters())]
    held: dict[str, list[Tensor]] = {name: [] for name in children}
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    for number, (name, p) in enumerate(engine.module.named_parameters()):
        child = name.partition(".")[0]
        if p.requires_grad and child in held:
            gradient = _local_gradient(engine, p, number % world == rank)
            if gradient is not None:
                held[child].append(gradient.float())
    norms = [torch.nn.utils.get_total_norm(gradients).to(device()) for gradients in held.values()]
    squares = torch.stack(norms).square() if norms else torch.zeros(0, device=device())
    torch.distributed.all_reduce(squares)
    return dict(zip(children, squares.sqrt().tolist(), strict=True))


def _local_gradient(engine: Any, p: nn.Parameter, mine: bool) -> Tensor | None:
    if engine.zero_optimization_stage() == 3:
        from deepspeed.utils import safe_get_local_grad

        return safe_get_local_grad(p)
    if not hasattr(p, "_hp_mapping"):
        return p.grad if mine else None
    held: Any = p._hp_mapping
    if held is None:
        return None
    gradient = held.get_lp_grad_fragment(p._index_in_param_group).flatten()  # type: ignore[attr-defined]
    place = held.lp_fragment_address
    return gradient[place.start : place.start + place.numel] if gradient.numel() == p.numel() else gradient


def gradient_norm(engine: Any) -> float:
    """Global norm of the gradients of the update just made, before clipping."""
    return float(engine.optimizer.norm if _plain(engine) else engine.get_global_grad_norm())


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
