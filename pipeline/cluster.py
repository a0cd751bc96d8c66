"""Connecting to Ray: the cluster that RAY_ADDRESS names, else a local one that ends with the work."""

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any, ClassVar

from pydantic import Field

from longtake.datasets import environment
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.stage import StageConfig


class TaskConfig(StageConfig):
    """What one task asks of Ray, and how long the work may stand still.

    cpus            CPUs of a task
    memory_bytes    memory of a task; 0 reserves none
    custom          custom resources of your nodes, such as {spot: 1}
    stall_seconds   a group that has not moved for this long is named; if none has, the stage fails
    """

    COSTLY: ClassVar[frozenset[str]] = frozenset({"cpus", "memory_bytes", "custom"})

    cpus: float = Field(1, gt=0)
    memory_bytes: int = Field(0, ge=0)
    custom: dict[str, float] = Field({})
    stall_seconds: float = Field(3600, gt=0)

    def options(self) -> dict[str, Any]:
        """Arguments of Ray's tasks."""
        reserved = {"memory": self.memory_bytes} if self.memory_bytes else {}
        return {"num_cpus": self.cpus, **reserved, **({"resources": self.custom} if self.custom else {})}


@contextlib.contextmanager
def connected(stage: str, task: TaskConfig | None = None) -> Iterator[Any]:
    """Connect to Ray for the block, with quiet logs and without Ray's progress bars; gives the `ray` module.

    Args:
        stage: name of the work in errors.
        task: what one task needs.

    Raises:
        UserError: no node of the cluster has room for a task, or RAY_ADDRESS does not answer.
    """
    address = environment.ray_address()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        # without these Ray writes a token into the home folder
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    ours = not ray.is_initialized()
    # Ray puts the working folder on its workers' sys.path, where our `datasets` would hide the package of that name: start
    # in an empty folder, which must exist as long as the workers do
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        if ours:
            try:
                options = {"include_dashboard": False} if address == "local" else {}
                with contextlib.chdir(empty):
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **options)
            except (ConnectionError, OSError) as e:
                raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers ({str(e).splitlines()[0]})") from e
        try:
            _require_room(stage, task or TaskConfig(), [node["Resources"] for node in ray.nodes() if node["Alive"]])
            context = ray.data.DataContext.get_current()
            context.enable_progress_bars = False
            context.print_on_execution_start = False
            logging.getLogger("ray.data").setLevel(logging.ERROR)
            yield ray
        except ray.exceptions.RaySystemError as e:
            raise Failure(
                f"stage {stage}: Ray failed ({str(e).splitlines()[0]}); run the same command again: it goes on where it stopped"
            ) from e
        finally:
            if ours:
                ray.shutdown()


def _require_room(stage: str, task: TaskConfig, nodes: list[dict[str, float]]) -> None:
    """Raises UserError where no node can hold a task: Ray would wait for ever."""
    needs = {"cpus": ("CPU", task.cpus), "memory_bytes": ("memory", task.memory_bytes)}
    needs |= {f"custom.{name}": (name, amount) for name, amount in task.custom.items()}
    if any(all(node.get(name, 0) >= amount for name, amount in needs.values()) for node in nodes):
        return
    for key, (name, amount) in needs.items():
        most = max((node.get(name, 0) for node in nodes), default=0)
        if most < amount:
            raise UserError(
                f"stage {stage}: run.{key}: a task needs {amount:g} {name}, no node of the Ray cluster has more than"
                f" {most:g}; lower it, or add a larger node"
            )
    raise UserError(
        f"stage {stage}: task: no single node of the Ray cluster has all that a task needs ({task.options()})"
    )
