"""The registry: models in MLflow, or in folders.

`disk` reads and writes model folders, `cache` and `fetch` get them from a store, `store` asks MLflow, `log` writes to it,
`promotion` moves the champion. Torch is imported only when a model is loaded, for commands that ask the store alone.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from longtake.datasets.errors import UserError
from longtake.training.registry.uri import in_store

if TYPE_CHECKING:
    from torch import nn


def load(uri: str, part: Literal["vae", "transformer"] | None = None) -> "nn.Module":
    """The torch module of a registered model, such as "models:/pv-vae@champion", or of a local model folder.

    The store is MLflow's: set MLFLOW_TRACKING_URI.

    Args:
        part: of a pipeline of another library, or of a folder with this part alone: then a `ForeignCodec` or a `Backbone`.
            Models of this project have no parts, and it makes no difference.

    Raises:
        UserError: there is no such model, version or alias; it is a foreign one, and has no such part or none is named.
        Failure: the store cannot be reached; or the model is damaged.
    """
    return load_with_facts(uri, part)[0]


def load_with_facts(
    uri: str, part: Literal["vae", "transformer"] | None = None, expert: Literal["high", "low", "first"] | None = None
) -> tuple["nn.Module", dict[str, Any]]:
    """The same, and what its config.json says of it, or would say of a foreign one (see `foreign.load`).

    Args:
        expert: of two transformers that share the times, which has to be named; `first` is the one for high noise of two,
            or the only one.
    """
    from importlib import import_module

    from longtake.training.foreign.folder import is_foreign
    from longtake.training.registry import cache, disk, pipelines
    from longtake.training.registry.foreign import FOREIGN, PIPELINE, check_ours

    parts = {f"{part}_2" if expert == "low" else part} if part else frozenset[str]()
    folder = cache.pull(uri, parts) if in_store(uri) else pipelines.local(uri)
    if (part and not (folder / "config.json").is_file()) or is_foreign(folder):
        if part is None:
            raise UserError(f"{uri}: is {FOREIGN[PIPELINE].one}; {FOREIGN[PIPELINE].use}")
        # by name, since it imports this package
        foreign: Any = import_module("longtake.training.foreign.load")
        place, known = pipelines.opened(uri, folder, parts)
        made: tuple[nn.Module, dict[str, Any]] = (
            foreign.codec_of(place, known) if part == "vae" else foreign.backbone_of(place, expert, known)
        )
        return made
    if not in_store(uri):
        return disk.load(folder), disk.read_config(folder)
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


def register_foreign(folder: Path, name: str, kind: str | None, place: str | None, by_reference: bool = False) -> str:
    """Check a folder of another library, and register its files as the champion; returns "models:/NAME/VERSION".

    Args:
        kind: a name in `foreign.FOREIGN`; None: as `foreign.kind_of_folder` says.
        place: URL where the store keeps artifacts, if it has no place of its own.
        by_reference: of a pipeline, register where it lies and the sha256 of its files, and copy nothing.

    Raises:
        UserError: the folder has no such model, or may be of two kinds; a file is a link out of it; the name is that of
            other models.
        Failure: the store cannot be reached.
    """
    import tempfile
    from importlib import import_module

    from longtake.training.registry import disk, log, promotion
    from longtake.training.registry.foreign import FOREIGN, PIPELINE, REFERENCE, kind_of_folder
    from longtake.training.registry.pipelines import reference

    kind = kind or kind_of_folder(folder)
    row = FOREIGN[kind]
    if by_reference and kind != PIPELINE:
        raise UserError(f"--by-reference: {folder} is {row.one}, which is copied; leave it out")
    config, files = import_module(row.checked).checked(folder)
    if odd := [file for file in files if not row.files.fullmatch(file)]:
        raise UserError(f"{folder}: {odd[0]} is no file that {row.one} is registered with; save it again")
    with tempfile.TemporaryDirectory() as scratch:
        if by_reference:
            note = Path(scratch) / REFERENCE
            note.write_bytes(reference(folder, files.values()))
            size = sum(path.stat().st_size for path in files.values())
            config, files = {**config, "folder": str(folder.absolute()), "bytes": size}, {REFERENCE: note}
        else:
            _check_links(folder, files)
        content = disk.described(kind, config, files)
        uri = log.log_files(files, content, name, disk.digest(content), place)
    promotion.promote(uri)
    return uri


def _check_links(folder: Path, files: Mapping[str, Path]) -> None:
    """Raise UserError where a file that is to be copied is a link out of the folder, but for the hub's own cache."""
    whole = folder.resolve()
    # a snapshot of the hub's client has links to the blobs beside all snapshots
    roots = [whole, whole.parent.parent / "blobs"] if whole.parent.name == "snapshots" else [whole]
    for path in files.values():
        if not any(path.resolve().is_relative_to(root) for root in roots):
            raise UserError(f"{path}: is a link out of {folder}, which is not followed; copy the file there")
