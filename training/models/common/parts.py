"""Finished parts of generated videos in a folder, after which the same call goes on."""

import json
from collections.abc import Collection, Mapping
from contextlib import suppress
from typing import Any

from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError

_SETTINGS = "settings.json"
_SUFFIX = ".safetensors"


def open_folder(folder: str, record: Mapping[str, Any]) -> None:
    """Write down what decides the parts of a folder. Raises UserError where it has parts of something else."""
    url = storage.join(folder, _SETTINGS)
    try:
        content = storage.read(url)
    except FileNotFoundError:
        storage.write(url, storage.canonical_json(record))
        return
    if content != storage.canonical_json(record):
        try:
            previous = json.loads(content)
            now = json.loads(storage.canonical_json(record))
            other = [name for name in now | previous if previous.get(name) != now.get(name)]
        except (ValueError, TypeError, AttributeError):
            other = ["damaged settings"]
        if other:
            raise UserError(
                f"{folder}: has segments of a run that was stopped, with other {', '.join(other)};"
                " delete it, or give the same command again to go on with that run"
            )


def url_of(folder: str | None, number: int) -> str:
    """Where part `number` is kept; "" without a folder."""
    return storage.join(folder, f"{number:05d}{_SUFFIX}") if folder else ""


def save(url: str, name: str, values: Tensor) -> None:
    """Keep a part, where there is a folder."""
    save_all(url, {name: values})


def save_all(url: str, tensors: Mapping[str, Tensor]) -> None:
    """Keep a part of several tensors, where there is a folder."""
    if url:
        storage.write(url, safetensors.save({name: values.contiguous() for name, values in tensors.items()}))


def load(url: str, name: str) -> Tensor | None:
    """A kept part; None where there is none. Raises Failure where it is damaged."""
    part = load_all(url, (name,))
    return None if part is None else part[name]


def load_all(url: str, names: Collection[str]) -> dict[str, Tensor] | None:
    """A kept part of several tensors, as `load`."""
    if not url:
        return None
    try:
        tensors = safetensors.load(storage.read(url))
        return {name: tensors[name] for name in names}
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError) as e:
        raise Failure(f"{url}: damaged ({e}); delete it and give the same command again") from e


def check_shape(url: str, part: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a Failure for a kept part of another shape."""
    if part.shape != shape:
        raise Failure(f"{url}: has shape {tuple(part.shape)}, not {shape}; delete it and give the same command again")


def forget(folder: str) -> None:
    """Remove the parts that are kept in subfolders of this folder, and each folder that is then empty."""
    fs, path = storage.filesystem(folder)
    for name in storage.names(folder):
        inner = storage.join(folder, name)
        for file in storage.names(inner):
            if file == _SETTINGS or file.endswith(_SUFFIX):
                fs.rm_file(f"{path}/{name}/{file}")
        with suppress(OSError):
            fs.rmdir(f"{path}/{name}")
    with suppress(OSError):
        fs.rmdir(path)
