"""A folder in the layout of diffusers that is to be registered: what is said of it, and its files."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from longtake.datasets.errors import UserError
from longtake.training.foreign.files import read_json
from longtake.training.foreign.folder import (
    CONFIG,
    INDEX,
    Part,
    index_of,
    name_of,
    part_of,
    parts_of,
    tensors_of,
)
from longtake.training.foreign.load import KNOWN, check

_SMALL = ("*.json", "*.txt", "*.model", "*.jinja")  # files of tokenizers, schedulers and processors
_MOST = 64 << 20  # bytes of one of them


def checked(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What is said of the parts in a folder, and its files by their names in the registry; no weights are read.

    A part alone gets the name that it has in a pipeline.

    Raises:
        UserError: there is no such folder; a part is not whole, or has another config than its weights; none of them is
            an autoencoder or a transformer that is known here.
    """
    index = index_of(folder)
    alone = not index and (folder / CONFIG).is_file() and read_json(folder / CONFIG).get("_class_name")
    names = [name_of(str(alone)) or "vae"] if alone else list(parts_of(folder))
    parts = {name: part_of(folder, name) for name in names or ["vae"]}
    for part in parts.values():
        if part.class_name in KNOWN:
            check(part)
    if not any(part.class_name in KNOWN for part in parts.values()):
        classes = ", ".join(sorted(part.class_name for part in parts.values()))
        raise UserError(f"{folder}: has {classes}, none of which is known here; there are {', '.join(KNOWN)}")
    files = {f"{name}/{path.name}": path for name, part in parts.items() for path in part.files.values()}
    if index:
        files |= {INDEX: folder / INDEX} | {f"{path.parent.name}/{path.name}": path for path in _beside(folder, parts)}
    described = {name: _described(part) for name, part in sorted(parts.items())}
    pipeline = {"class_name": index["_class_name"]} if "_class_name" in index else {}
    return {**pipeline, "parts": described}, dict(sorted(files.items()))


def _beside(folder: Path, parts: Mapping[str, Part]) -> Iterator[Path]:
    """The files of what has no weights, such as the tokenizer and the scheduler."""
    for name, value in sorted(index_of(folder).items()):
        if isinstance(value, list) and any(value) and name not in parts:
            for path in sorted(path for pattern in _SMALL for path in (folder / name).glob(pattern)):
                if path.stat().st_size > _MOST:
                    raise UserError(f"{path}: is larger than {_MOST} bytes; take it out of the folder")
                yield path


def _described(part: Part) -> dict[str, Any]:
    tensors = tensors_of(part).values()
    return {
        "class_name": part.class_name,
        "parameters": sum(math.prod(tensor.shape) for tensor in tensors),
        "bytes": sum(path.stat().st_size for path in part.files.values()),
    }
