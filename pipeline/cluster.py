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


def ray_data() -> Any:
    """The module `ray.data`, without its progress bars. Work that needs no actors does without: loading it takes a second."""
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    return ray.data


@contextlib.contextmanager
def connected(stage: str, task: TaskConfig | None = None) -> Iterator[Any]:
    """Connect to Ray for the block, with quiet logs; gives the `ray` module.

    Args:
        stage: name of the work in errors.
        task: what one task needs.

    Raises:
        UserError: no node of the cluster has room for a task, or RAY_ADDRESS does not answer.
        Failure: Ray does not start, even at a second try, or fails later.
    """
    address = environment.ray_address()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # a thread that still asks after the end must not start another Ray
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        # without these Ray writes a token into the home folder
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    ours = not ray.is_initialized()
    # Ray puts the working folder on its workers' sys.path, where our `datasets` would hide the package of that name: start
    # in an empty folder, which must exist as long as the workers do
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as empty:
        if ours:
            with contextlib.chdir(empty):
                _start(stage, ray, address)
        try:
            _require_room(stage, task or TaskConfig(), [node["Resources"] for node in ray.nodes() if node["Alive"]])
            yield ray
        except ray.exceptions.RaySystemError as e:
            raise Failure(
                f"stage {stage}: Ray failed ({str(e).splitlines()[0]}); run the same command again: it goes on where it stopped"
            ) from e
        finally:
            if ours:
                ray.shutdown()


def _start(stage: str, ray: Any, address: str) -> None:
    """Join the cluster at `address`, or start one here; where that one does not come up, on a busy machine, try once more.

    Raises:
        UserError: no cluster answers.
        Failure: no cluster could be started.
    """
    options = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address != "local":
        try:
            ray.init(address=address, **options)
        except (ConnectionError, OSError) as e:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers ({_first_line(e)})") from e
        return
    for attempt in (1, 2):
        try:
            ray.init(address="local", include_dashboard=False, **options)
            return
        except Exception as e:
            # Ray raises many kinds, plain ones among them: what it has started has to end in any case
            ray.shutdown()
            if attempt == 2:
                raise Failure(
                    f"stage {stage}: Ray did not start on this machine, twice ({_first_line(e)});"
                    " run the same command again when it is less busy, or set RAY_ADDRESS to a cluster"
                ) from e


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


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
