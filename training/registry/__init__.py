"""The registry: models in MLflow, or in folders.

`disk` reads and writes model folders, `cache` and `fetch` get them from a store, `store` asks MLflow, `log` writes to it,
`promotion` moves the champion. Torch is imported only when a model is loaded, for commands that ask the store alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtake.training.registry.uri import in_store

if TYPE_CHECKING:
    from torch import nn


def load(uri: str) -> "nn.Module":
    """The torch module of a registered model, such as "models:/pv-vae@champion", or of a local model folder.

    The store is MLflow's: set MLFLOW_TRACKING_URI.

    Raises:
        UserError: there is no such model, version or alias.
        Failure: the store cannot be reached; or the model is damaged.
    """
    return load_with_facts(uri)[0]


def load_with_facts(uri: str) -> tuple["nn.Module", dict[str, Any]]:
    """The same, and what its config.json says of it."""
    from longtake.training.registry import cache, disk

    if not in_store(uri):
        return disk.load(Path(uri)), disk.read_config(Path(uri))
    folder = cache.pull(uri)
    content = disk.read_config(folder)
    # the digests of its files were compared just now
    return disk.module_of(folder, content), content


def register(folder: Path, name: str, run_id: str) -> str:
    """Log a model folder to an MLflow run as a pyfunc and register it; returns "models:/NAME/VERSION".

    The version gets the alias `candidate`. A version that this run has registered before is not registered again.
    """
    from longtake.training.registry import disk, log

    content = disk.read_config(folder)
    return log.log_model(folder, name, run_id, disk.digest(content), content.get("lineage", {}))
