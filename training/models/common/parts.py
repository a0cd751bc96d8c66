"""Finished parts of generated videos in a folder, after which the same call goes on."""

import hashlib
import json
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError

_SETTINGS = "settings.json"
_SUFFIX = ".safetensors"
_SUM = "sha256"  # the name of its tensor in a part


def open_folder(folder: str, record: Mapping[str, Any]) -> None:
    """Write down what decides the parts of a folder. Raises UserError where it has parts of something else."""
    url = storage.join(folder, _SETTINGS)
    try:
        content = storage.read(url)
    except FileNotFoundError:
        # two commands at once: the first that ends takes the settings away, and then parts may be of anything
        _remove(folder, lambda name: name.endswith(_SUFFIX))
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
        kept = {name: values.contiguous() for name, values in tensors.items()}
        storage.write(url, safetensors.save(kept | {_SUM: _sum_of(kept)}))


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
        part, known = {name: tensors[name] for name in names}, tensors.pop(_SUM)
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError) as e:
        raise Failure(f"{url}: damaged ({e}); delete it and give the same command again") from e
    if not torch.equal(known, _sum_of(tensors)):
        raise Failure(f"{url}: damaged (other values than were written); delete it and give the same command again")
    return part


def _sum_of(tensors: Mapping[str, Tensor]) -> Tensor:
    """The sha256 of the names, types, shapes and values of tensors, `(32,)`."""
    digest = hashlib.sha256()
    for name, values in sorted(tensors.items()):
        digest.update(f"{name} {values.dtype} {list(values.shape)} ".encode())
        digest.update(values.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
    return torch.tensor(list(digest.digest()), dtype=torch.uint8)


def check_shape(url: str, part: Tensor, shape: tuple[int, ...]) -> None:
    """Raise a Failure for a kept part of another shape."""
    if part.shape != shape:
        raise Failure(f"{url}: has shape {tuple(part.shape)}, not {shape}; delete it and give the same command again")


def forget(folder: str) -> None:
    """Remove the parts that are kept in subfolders of this folder, and each folder that is then empty."""
    fs, path = storage.filesystem(folder)
    for name in storage.names(folder):
        _remove(storage.join(folder, name), lambda file: file == _SETTINGS or file.endswith(_SUFFIX))
        with suppress(OSError):
            fs.rmdir(f"{path}/{name}")
    with suppress(OSError):
        fs.rmdir(path)


def _remove(folder: str, which: Callable[[str], bool]) -> None:
    """Remove these files of a folder, unless another command for the same video has done so meanwhile."""
    fs, path = storage.filesystem(folder)
    for name in filter(which, storage.names(folder)):
        with suppress(FileNotFoundError):
            fs.rm_file(f"{path}/{name}")
