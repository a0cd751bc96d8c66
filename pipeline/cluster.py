"""Connecting to Ray: the cluster that RAY_ADDRESS names, else one of our own on this machine for as long as it takes."""

import contextlib
import logging
import os
import secrets
import tempfile
from collections.abc import Iterator
from typing import Any

from longtake.datasets.errors import Failure, UserError


@contextlib.contextmanager
def connected(stage: str, cpus: float = 1) -> Iterator[Any]:
    """The `ray` module, connected, with quiet logs and no progress bars of Ray's own.

    Args:
        stage: what to call the work in an error.
        cpus: what one task needs.

    Raises:
        UserError: the cluster has no such CPUs, or RAY_ADDRESS does not answer.
    """
    address = os.environ.get("RAY_ADDRESS") or "local"
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        # else Ray writes a token of its own into the home folder
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    ours = not ray.is_initialized()
    if ours:
        try:
            # Ray puts the working folder on its workers' sys.path, where our `datasets` would hide the package of that name
            with tempfile.TemporaryDirectory() as empty, contextlib.chdir(empty):
                ray.init(
                    address=address,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    **({"include_dashboard": False} if address == "local" else {}),
                )
        except (ConnectionError, OSError) as e:
            raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers ({str(e).splitlines()[0]})") from e
    try:
        have = ray.cluster_resources().get("CPU", 0)
        if have < cpus:
            raise UserError(f"stage {stage}: needs {cpus:g} CPU a task, the Ray cluster has {have:g}; add nodes")
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
