"""Pipelines of other libraries on this machine: a folder that is named, or a registered one, copied or where it lies.

One that is registered by reference has nothing in the store but `reference.json`: its folder, and the sha256 of each file.
"""

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.training.foreign.files import file_digests, read_json
from longtake.training.foreign.folder import CONFIG, is_foreign
from longtake.training.registry import cache, disk
from longtake.training.registry.foreign import PIPELINE, REFERENCE, concerns
from longtake.training.registry.uri import in_store

_FILE = re.compile(r"([a-z]\w*/)?\w[\w.-]*\.(safetensors|json|txt|model|jinja)")  # in a pipeline, or in a part alone
_SHA256 = re.compile(r"[0-9a-f]{64}")


class Pipeline(NamedTuple):
    """A folder in the layout of diffusers, and the sha256 of those of its files that were compared just now."""

    folder: Path
    sha256: Mapping[Path, str]


def found(uri: str, parts: Collection[str] | None = None) -> Pipeline:
    """The pipeline that a URI of the registry, a path or a file:// URL names; the part alone that a path may name, too.

    The files of a registered one are compared with their digests: those of these parts, or all for None.

    Raises:
        UserError: it names something else, or nothing; the folder of one that is registered by reference is gone.
        Failure: as `cache.pull`; a file is not the one that was registered.
    """
    folder = cache.pull(uri, parts) if in_store(uri) else local(uri)
    if not is_foreign(folder):
        raise UserError(f"{uri}: is no pipeline; name a folder in the layout of diffusers, or a registered one")
    return opened(uri, folder, parts)


def local(uri: str) -> Path:
    """The folder of a path or file:// URL. Raises UserError for another URL."""
    if not storage.is_local(uri):
        raise UserError(f"{uri}: is no folder of this machine; copy it here, or name models:/NAME@ALIAS")
    return Path(storage.filesystem(uri)[1])


def opened(uri: str, folder: Path, parts: Collection[str] | None) -> Pipeline:
    """The same of a folder that `is_foreign`: one that was pulled by this URI, or is named by it as a path."""
    if not (folder / CONFIG).is_file() or read_json(folder / CONFIG).get("model") != PIPELINE:
        return Pipeline(folder, {})
    recorded: Mapping[str, str] = disk.read_config(folder)["sha256"]
    if REFERENCE not in recorded and in_store(uri):
        # compared when it was pulled
        return Pipeline(folder, {folder / name: sha256 for name, sha256 in recorded.items()})
    if REFERENCE in recorded:
        folder, recorded = _referenced(uri, folder / REFERENCE)
    names = [name for name in recorded if concerns(name, parts)]
    for name in names:
        if not (folder / name).is_file():
            raise Failure(f"{folder / name}: is not there any more; bring it back, or register {folder} again")
    digests = file_digests({name: folder / name for name in names})
    if changed := [name for name in names if digests[name] != recorded[name]]:
        raise Failure(
            f"{folder / changed[0]}: is not what was registered as {uri}; bring it back, or register it again"
        )
    return Pipeline(folder, {folder / name: sha256 for name, sha256 in digests.items()})


def reference(folder: Path, files: Iterable[Path]) -> bytes:
    """The content of `reference.json` for these files of a folder."""
    digests = file_digests({str(path.relative_to(folder)): path for path in files})
    return storage.canonical_json({"folder": str(folder.absolute()), "sha256": digests})


def _referenced(uri: str, note: Path) -> tuple[Path, dict[str, str]]:
    """The folder that a pulled reference names, and the digests of its files. Raises UserError, Failure."""
    content: dict[str, Any] = read_json(note)
    folder, recorded = content.get("folder"), content.get("sha256")
    if (
        not isinstance(folder, str)
        or not isinstance(recorded, dict)
        or not all(_FILE.fullmatch(name) and _SHA256.fullmatch(str(sha256)) for name, sha256 in recorded.items())
    ):
        raise Failure(f"{note}: damaged; register the pipeline again")
    if not Path(folder).is_dir():
        raise UserError(
            f"{uri}: is registered by reference, and its folder {folder} is not on this machine; mount or copy it there"
        )
    return Path(folder), recorded
