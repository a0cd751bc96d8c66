"""Process groups and DeepSpeed engines: our config to theirs, in this one place."""

import logging
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.config import TrainConfig


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
    return {
        "train_batch_size": config.batch,
        "train_micro_batch_size_per_gpu": config.batch // passes,
        "gradient_accumulation_steps": config.accumulate,
        "gradient_clipping": config.gradient_clip,
        "bf16": {"enabled": config.precision == "bf16"},
        "zero_optimization": {"stage": config.zero_stage},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "checkpoint": {"load_universal": universal},
        "steps_per_print": 1 << 60,
    }


@contextmanager
def process_group() -> Iterator[tuple[int, int]]:
    """(rank, world size). Under torchrun or Ray Train the group that their variables describe; alone, one without a port.

    Raises:
        UserError: MASTER_PORT is taken.
    """
    gpu = torch.cuda.is_available()
    if not gpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
    backend = "nccl" if gpu else "gloo"
    launched = "WORLD_SIZE" in os.environ and "MASTER_ADDR" in os.environ
    if launched:
        try:
            torch.distributed.init_process_group(backend)
        except torch.distributed.DistNetworkError as e:
            port = os.environ.get("MASTER_PORT")
            raise UserError(
                f"MASTER_PORT={port}: cannot be used ({str(e).splitlines()[0]}); set MASTER_PORT to a free port"
            ) from e
    else:
        os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
        torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield torch.distributed.get_rank(), torch.distributed.get_world_size()
    finally:
        torch.distributed.destroy_process_group()
        if not launched:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
                del os.environ[name]


def device() -> torch.device:
    return (
        torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        if torch.cuda.is_available()
        else torch.device("cpu")
    )


def engines_of(
    modules: Mapping[str, nn.Module], config: TrainConfig, world: int, universal: bool = False
) -> dict[str, Any]:
    """A DeepSpeed engine for each module, AdamW over its parameters that take gradients. Needs a process group.

    With `universal` the engines will load a universal checkpoint (see `checkpoint.for_world`).
    """
    settings = deepspeed_config(config, world, universal)
    with _compiler_noise_hidden():
        import deepspeed
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # else a C++ extension is compiled at the first start, for minutes, and a killed build hangs every later one
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=torch.distributed.get_backend(), dist_init_required=False)
    made = {}
    for name, module in modules.items():
        trained = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=config.lr, betas=config.betas, weight_decay=config.weight_decay)
        made[name] = deepspeed.initialize(model=module, optimizer=optimizer, config=settings, dist_init_required=False)[
            0
        ]
    return made


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
def whole(engine: Any) -> Iterator[nn.Module]:
    """The engine's module with all parameters present, to read; under ZeRO-3 they are gathered for the block."""
    if engine.zero_optimization_stage() < 3:
        yield engine.module
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        yield engine.module


def weights(engine: Any) -> dict[str, Tensor]:
    """A copy of the module's state in fp32, on this device. Every rank must call it."""
    with whole(engine) as module:
        return {
            k: v.detach().float().clone() if v.is_floating_point() else v.clone()
            for k, v in module.state_dict().items()
        }


def gradient_norm(engine: Any) -> float | None:
    """Global norm of the gradients of the step just taken, where DeepSpeed reports one."""
    norm = engine.get_global_grad_norm()
    return None if norm is None else float(norm)


def set_lr(engine: Any, lr: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = lr
