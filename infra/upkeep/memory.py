"""What the trainings of a recipe take of a GPU's memory, and by how little they would fit (see `longtake.training.fit`)."""

from collections.abc import Iterator
from typing import Any

from longtake.datasets.errors import Failure, UserError
from longtake.infra import stages
from longtake.infra.graph import Node
from longtake.training.config import TrainConfig


def memory(nodes: list[Node], gpu: float | None) -> Iterator[dict[str, Any]]:
    """A row for each training as plain data, in bytes of one rank.

    name     of the stage
    ranks    that share its batch
    takes    {"weights": ..., "activations": ..., "total": ...}, see `Fit`; None where it is not known
    fits     whether that is within the usable part of `gpu` bytes; None where either is not known
    changes  the smallest that make it fit, as lines of a recipe; empty where none are needed, or none help
    then     `takes` with these changes; None without any
    why      it is not known; "" where it is
    """
    from longtake.training import fit, remedies

    sources = sources_of(nodes)
    for node in nodes:
        if not isinstance(node.config, TrainConfig):
            continue
        row: dict[str, Any] = {"name": node.name, "ranks": node.config.run.launcher.processes}
        row |= {"takes": None, "fits": None, "changes": [], "then": None, "why": ""}
        stage = stages.load(node.kind)
        if not hasattr(stage, "largest"):
            yield row | {"why": f"a {node.kind} stage cannot say before it runs"}
            continue
        config, inputs = node.config, sources[node.name].inputs
        try:
            if hasattr(stage, "resolved"):
                config = stage.resolved(config, inputs)
            planned = remedies.Planned(stage, config, inputs)
            takes = planned.fit()
            row |= {"takes": takes._asdict() | {"total": takes.total}}
            if gpu is not None:
                row["fits"] = takes.total <= fit.USABLE * gpu
                if not row["fits"] and (remedy := planned.remedy(fit.USABLE * gpu)):
                    row |= {"changes": list(remedy.changes), "then": remedy.fit._asdict() | {"total": remedy.fit.total}}
        except (UserError, Failure) as e:
            row |= {"why": str(e)}
        yield row


def device_memory() -> int | None:
    """Bytes of this machine's first GPU; None without one."""
    import torch

    return int(torch.cuda.get_device_properties(0).total_memory) if torch.cuda.is_available() else None


def sources_of(nodes: list[Node]) -> dict[str, Any]:
    """The `fit.Source` of each stage."""
    from longtake.training.fit import Source

    found: dict[str, Source] = {}
    for node in nodes:
        inputs = {field: found.get(value) or Source(None, None, value, {}) for field, value in node.inputs.items()}
        found[node.name] = Source(stages.load(node.kind), node.config, node.output, inputs)
    return found
