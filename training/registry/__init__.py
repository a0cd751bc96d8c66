"""The registry: models in MLflow, or in folders.

`disk` reads and writes model folders, `cache` and `fetch` get them from a store, `store` asks MLflow, `log` writes to it,
`promotion` moves the champion. Torch is imported only when a model is loaded, for commands that ask the store alone.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from longtake.datasets.errors import UserError
from longtake.training.registry.uri import in_store

if TYPE_CHECKING:
    from torch import nn


def load(uri: str) -> "nn.Module":
    """The torch module of a registered model, such as "models:/pv-vae@champion", or of a local model folder.

    The store is MLflow's: set MLFLOW_TRACKING_URI.

    Raises:
        UserError: there is no such model, version or alias, or it is a foreign one.
        Failure: the store cannot be reached; or the model is damaged.
    """
    return load_with_facts(uri)[0]


def load_with_facts(uri: str) -> tuple["nn.Module", dict[str, Any]]:
    """The same, and what its config.json says of it."""
    from longtake.training.registry import cache, disk
    from longtake.training.registry.foreign import check_ours

    if not in_store(uri):
        return disk.load(Path(uri)), disk.read_config(Path(uri))
    folder = cache.pull(uri)
    content = disk.read_config(folder)
    check_ours(uri, content)
    # the digests of its files were compared just now
    return disk.module_of(folder, content), content


def register(folder: Path, name: str, run_id: str) -> str:
    """Log a model folder to an MLflow run as a pyfunc and register it; returns "models:/NAME/VERSION".

    The version gets the alias `candidate`. A version that this run has registered before is not registered again.
    """
    from longtake.training.registry import disk, log

    content = disk.read_config(folder)
    return log.log_model(folder, name, run_id, disk.digest(content), content.get("lineage", {}))


def register_foreign(folder: Path, name: str, kind: str | None, place: str | None) -> str:
    """Check a folder of another library, and register its files as the champion; returns "models:/NAME/VERSION".

    Args:
        kind: a name in `foreign.FOREIGN`; None: as `foreign.kind_of_folder` says.
        place: URL where the store keeps artifacts, if it has no place of its own.

    Raises:
        UserError: the folder has no such model, or may be of two kinds; the name is that of other models.
        Failure: the store cannot be reached.
    """
    from importlib import import_module

    from longtake.training.registry import disk, log, promotion
    from longtake.training.registry.foreign import FOREIGN, kind_of_folder

    kind = kind or kind_of_folder(folder)
    row = FOREIGN[kind]
    config, files = import_module(row.checked).checked(folder)
    if odd := [file for file in files if not row.files.fullmatch(file)]:
        raise UserError(f"{folder}: {odd[0]} is no file that {row.one} is registered with; save it again")
    content = disk.described(kind, config, files)
    uri = log.log_files(files, content, name, disk.digest(content), place)
    promotion.promote(uri)
    return uri
