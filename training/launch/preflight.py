"""What the end of a training needs, tried before its first step: a month of work must not end at a closed door."""

import json
import os
import secrets
from functools import partial

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown, shown_within
from longtake.training.config import TrainConfig
from longtake.training.registry import aliases
from longtake.training.registry import store as model_store

_PROBE = "longtake.probe"  # a tag of registered models


def check(config: TrainConfig) -> None:
    """Write to the model registry, to the run's artifacts and to `upload`; in the process that starts a training alone.

    The run gets the stage's settings as the artifact `config.json`.

    Raises:
        UserError: the key that names what cannot be written, and what to do.
        Failure: a store does not answer.
    """
    # a training of a script's own has no run, and registers nothing
    if run_id := os.environ.get("MLFLOW_RUN_ID"):
        registered(config.name)
        artifacts(run_id, config)
    if config.run.upload:
        uploaded(config.run.upload)


def registered(name: str) -> None:
    """Set a tag of the registered model, which is made where there is none."""
    try:
        if not aliases.create(name, {_PROBE: ""}):
            aliases.tag(name, _PROBE, "")
    except UserError as e:
        raise UserError(f"name: {name} cannot be registered: {e}") from e
    except model_store.Unreachable:
        raise
    except Failure as e:
        raise Failure(f"name: {name} cannot be registered: {e}; ask for the right to, or name another store") from e


def artifacts(run_id: str, config: TrainConfig) -> None:
    """Log the settings to the run."""
    what = f"MLflow: the artifacts of run {run_id}"
    text = json.dumps(shown_within(config.model_dump(mode="json")), indent=2, sort_keys=True)
    with model_store.asking(what) as client:
        client.log_text(run_id, text, "config.json")


def uploaded(url: str) -> None:
    """Write a file to the URL and delete it."""
    target = storage.join(url, f"probe-{secrets.token_hex(8)}")
    fs, path = storage.filesystem(target)
    try:
        storage.write(target, b"")
        storage.retrying(target, partial(fs.rm_file, path))
    except (Failure, OSError) as e:
        why = " ".join(str(e).split())
        raise UserError(
            f"upload: {shown(url)} cannot be written ({why}); give the right to, or name another place"
        ) from e
