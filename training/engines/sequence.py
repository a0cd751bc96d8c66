"""Windows that several ranks share: which ranks, what each of them reads, and the models that can be shared."""

from collections.abc import Callable, Iterable
from datetime import timedelta
from typing import Any

import torch
from torch import nn

from longtake.datasets.errors import UserError
from longtake.training.config import TrainConfig
from longtake.training.models.common.sequence import SequenceGroup

_kept: list[Any] = []  # groups that names alone would not keep


def groups_of(config: TrainConfig, world: int) -> int:
    """How many windows `world` processes read at once. Raises UserError where they do not divide into groups."""
    size = config.run.launcher.sequence
    if world % size:
        raise UserError(
            f"run.launcher.sequence: {size} processes to a window, but there are {world}, which {size} does not divide;"
            " start a multiple of it, or lower it"
        )
    return world // size


def place(config: TrainConfig) -> tuple[int, int]:
    """Which share of the windows is this rank's, and of how many: (rank, world) of its group among the groups."""
    world = torch.distributed.get_world_size()
    return torch.distributed.get_rank() // config.run.launcher.sequence, groups_of(config, world)


def share_windows(modules: Iterable[nn.Module], config: TrainConfig) -> None:
    """Let neighbouring ranks share windows, as the config says. Every rank must call it.

    Raises:
        UserError: the processes do not divide into groups, or the heads of a model among the ranks; a model cannot be shared.
    """
    groups_of(config, torch.distributed.get_world_size())
    _share(modules, config.run.launcher.sequence, lambda: _group(config))


def pretend_to_share(modules: Iterable[nn.Module], config: TrainConfig) -> None:
    """As `share_windows` on the first rank of a group, without the others: what it has and does, but with wrong numbers.

    For a trace of its memory. Raises UserError likewise.
    """
    size = config.run.launcher.sequence
    _share(modules, size, lambda: _pretended(size))


def _share(modules: Iterable[nn.Module], size: int, group_of: Callable[[], SequenceGroup]) -> None:
    modules = list(modules)
    for module in modules if size > 1 else ():
        _check(module, size)
    group = group_of() if size > 1 else None
    for module in modules:
        if hasattr(module, "sequence"):
            module.sequence = group  # type: ignore[assignment]


def _check(module: Any, size: int) -> None:
    if not hasattr(module, "sequence"):
        raise UserError(
            f"run.launcher.sequence: {size}: a {type(module).__name__} cannot be shared among processes; leave it out"
        )
    heads = module.config.heads
    if heads % size:
        raise UserError(
            f"run.launcher.sequence: {size} does not divide the model's {heads} heads; set a number that does, or other heads"
        )


def _group(config: TrainConfig) -> SequenceGroup:
    patience = timedelta(seconds=1.5 * config.run.stall_seconds + 30)
    group, _ = torch.distributed.new_subgroups(config.run.launcher.sequence, timeout=patience)
    return SequenceGroup(group.group_name, group.rank(), group.size())


def _pretended(size: int) -> SequenceGroup:
    """A group that exchanges nothing, beside the process group and without one."""
    from torch._C._distributed_c10d import FakeProcessGroup, _register_process_group

    # a new one each time, since the end of a process group forgets all names
    name: Any = f"longtake/pretended/{len(_kept)}"
    kind = torch.distributed.ProcessGroup.BackendType.CUSTOM
    group = torch.distributed.ProcessGroup(torch.distributed.HashStore(), 0, size)
    backend = FakeProcessGroup._create_internal(0, size)
    for device in ("cpu", "cuda"):
        group._register_backend(torch.device(device), kind, backend)
    group._set_default_backend(kind)
    _register_process_group(name, group)
    _kept.append(group)
    return SequenceGroup(name, 0, size)
