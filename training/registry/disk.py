"""Model folders: `config.json` + safetensors. Nothing is ever unpickled.

A model folder has `model.safetensors`, or where that would be large `model-00001-of-00003.safetensors` ... with
`model.safetensors.index.json`, as Hugging Face lays them out. `config.json` has the sha256 of each of these files. A model
of another library has its own files below our `config.json` (see `foreign`).
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.training.models import KINDS, kind_of
from longtake.training.registry.foreign import FOREIGN, check_ours

FORMAT = 2
_WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
_INDEX = "model.safetensors.index.json"
MOST_JSON = {"config.json": 4 << 20, _INDEX: 64 << 20}  # bytes


def save(
    folder: Path,
    model: str,
    config: Mapping[str, Any],
    weights: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    facts: Mapping[str, Any],
    max_bytes: int = 5 << 30,
) -> None:
    """Write a model folder, whole or not at all; an older one is replaced.

    Args:
        model: a name in `KINDS`.
        weights: taken one after the other, so that an iterator needs memory for one file at a time.
        facts: more for config.json, such as its lineage.
        max_bytes: size of a weights file, unless a single tensor is larger.

    Raises:
        UserError: the folder has something else in it.
    """
    parent = folder.absolute().parent
    if folder.exists() and any(folder.iterdir()) and not (folder / "config.json").exists():
        raise UserError(f"{folder}: is there already and is no model; name another folder")
    with storage.failing_clearly(str(folder)):
        parent.mkdir(parents=True, exist_ok=True)
        storage.sweep(str(parent))
        with storage.spool_folder(str(parent)) as spool:
            scratch = spool / "model"
            scratch.mkdir()
            write_weights(scratch, weights.items() if isinstance(weights, Mapping) else weights, max_bytes)
            content = {**facts, **described(model, config, {path.name: path for path in scratch.iterdir()})}
            (scratch / "config.json").write_bytes(storage.canonical_json(content))
            for path in [*scratch.iterdir(), scratch]:
                storage.sync(path)
            if folder.exists():
                folder.rename(spool / "old")
            scratch.rename(folder)
            storage.sync(parent)


def described(model: str, config: Mapping[str, Any], files: Mapping[str, Path]) -> dict[str, Any]:
    """The content of the config.json of a model with these files, but for its facts."""
    return {
        "format": FORMAT,
        "model": model,
        "config": dict(config),
        "sha256": {name: file_digest(path) for name, path in sorted(files.items())},
        "longtake": version("longtake"),
    }


def write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]], max_bytes: int, stem: str = "model") -> None:
    """Write safetensors whose names begin with `stem`, and an index where there are several; one in memory at a time.

    Raises:
        Failure: they could not be written.
    """
    names: list[list[str]] = []  # of the tensors in each file
    total = 0
    for number, shard in enumerate(_shards(weights, max_bytes)):
        try:
            save_file(shard, folder / f"{number}", {"format": "pt"})
            storage.open_up(folder / f"{number}")
        except SafetensorError as e:
            # how it reports a write that failed
            raise Failure(f"{folder}: could not be written ({_line(e)}); free some space and go on") from e
        names.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(names) == 1:
        (folder / "0").rename(folder / f"{stem}.safetensors")
        return
    files: dict[str, str] = {}
    for number, inside in enumerate(names):
        file = f"{stem}-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{number}").rename(folder / file)
        files |= dict.fromkeys(inside, file)
    content = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / f"{stem}.safetensors.index.json").write_bytes(storage.canonical_json(content))


def _shards(weights: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size, names, addresses = 0, set[str](), set[int]()
    for name, value in weights:
        if name in names:
            raise ValueError(f"weights: {name} comes twice")
        tensor = value.detach().cpu().contiguous()
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size, addresses = {}, 0, set()
        if (address := tensor.untyped_storage().data_ptr()) in addresses:
            # a file has no tensors that share memory, such as tied weights
            tensor = tensor.clone()
        names.add(name)
        addresses.add(address)
        shard[name] = tensor
        size += tensor.nbytes
    if not names:
        raise ValueError("weights: there are none")
    yield shard


def read_config(folder: Path) -> dict[str, Any]:
    """config.json of a model folder.

    Raises:
        UserError: there is none, or this longtake does not know such a model.
        Failure: it is damaged.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{folder}: no longtake model here (no config.json)")
    return checked_config(folder, _read_json(folder / "config.json"))


def checked_config(where: Path | str, content: dict[str, Any]) -> dict[str, Any]:
    """The content of config.json, checked to be of this longtake and to name only files of its kind. Raises as `read_config`."""
    if content.get("model") not in (known := [*KINDS, *FOREIGN]):
        raise UserError(
            f"{where}: config.json: unknown model {str(content.get('model'))[:80]!r};"
            f" this longtake knows {', '.join(known)}"
        )
    if content.get("format") != FORMAT:
        raise UserError(
            f"{where}: config.json: format {str(content.get('format'))[:80]}, but this longtake reads {FORMAT};"
            " use the version that wrote it, or train it again"
        )
    files = content.get("sha256")
    if not isinstance(files, dict) or not isinstance(content.get("config"), dict):
        raise Failure(f"{where}: config.json: needs the objects config and sha256")
    foreign = FOREIGN.get(content["model"])
    for name in files:
        if not (foreign.files.fullmatch(name) if foreign else _WEIGHTS.fullmatch(name) or name == _INDEX):
            what = f"file of {foreign.one}" if foreign else "weights file of a model folder"
            raise Failure(f"{where}: config.json: {name[:80]!r} is no {what}")
    return content


def digest(content: Mapping[str, Any]) -> str:
    """The sha256 that a model is known by: of its weights file, or where there are many, of their digests."""
    files: dict[str, str] = content["sha256"]
    return files.get("model.safetensors") or hashlib.sha256(storage.canonical_json(files)).hexdigest()


def load(folder: Path) -> nn.Module:
    """The torch module of a model folder, on the CPU, in evaluation mode.

    Raises:
        UserError: no model is here, or this longtake does not know it.
        Failure: the weights are damaged or belong to another config.
    """
    content = read_config(folder)
    check_ours(folder, content)
    check_files(folder, content)
    return module_of(folder, content)


def check_files(folder: Path, content: Mapping[str, Any]) -> None:
    """Raise Failure where the files of a model folder are not those that its config.json describes."""
    for name, sha256 in content["sha256"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != sha256:
            raise Failure(f"{folder / name}: not the weights that config.json describes; fetch the model again")


def module_of(folder: Path, content: Mapping[str, Any]) -> nn.Module:
    """The torch module of a model folder whose files were compared with its config.json. Raises Failure: they do not fit it."""
    files = weight_files(folder, set(content["sha256"]))
    kind = kind_of(content)
    try:
        config = kind.config(**content["config"])
        # compare the shapes before memory is taken for the module
        with torch.device("meta"):
            shapes = {name: list(t.shape) for name, t in kind.module(config).state_dict().items()}
        check_shapes(folder, _shapes_in(files), shapes)
        module = kind.module(config)
        state = module.state_dict()
        for path in files:
            with safe_open(path, "pt") as tensors, torch.no_grad():
                for name in tensors.keys():  # noqa: SIM118
                    state[name].copy_(tensors.get_tensor(name))
    except (SafetensorError, ValueError, TypeError, RuntimeError) as e:
        if isinstance(e, Failure):
            raise
        raise Failure(f"{folder}: {content['model']}: {_line(e)}") from e
    return module.eval()


def weight_files(folder: Path, named: set[str]) -> list[Path]:
    """The weights files in order, which are those that the index names, where there is one."""
    if _INDEX not in named:
        if named != {"model.safetensors"}:
            raise Failure(f"{folder}: config.json: needs model.safetensors alone, or files with {_INDEX}")
        return [folder / "model.safetensors"]
    where = _read_json(folder / _INDEX).get("weight_map")
    files = where.values() if isinstance(where, dict) else ()
    if not files or any(not isinstance(name, str) for name in files) or set(files) != named - {_INDEX}:
        raise Failure(f"{folder / _INDEX}: names other files than config.json")
    return [folder / name for name in sorted(set(files))]


def _shapes_in(files: list[Path]) -> dict[str, list[int]]:
    """The shapes of the tensors in weights files, by name. Raises Failure where one is in two files."""
    stored: dict[str, list[int]] = {}
    for path in files:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name in stored:
                    raise Failure(f"{path}: tensor {name[:80]} is in another file too")
                stored[name] = tensors.get_slice(name).get_shape()
    return stored


def check_shapes(where: Path, stored: Mapping[str, list[int]], needed: Mapping[str, list[int]]) -> None:
    """Raise Failure where tensors have other names or shapes than the module of their config needs."""
    for what, names in (("missing", needed.keys() - stored.keys()), ("not known", stored.keys() - needed.keys())):
        if names:
            raise Failure(f"{where}: {len(names)} tensors are {what} to this config, such as {min(names)[:80]}")
    if wrong := [name for name in needed if needed[name] != stored[name]]:
        name = wrong[0]
        raise Failure(f"{where}: tensor {name} has shape {stored[name]}, its config needs {needed[name]}")


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON object of a file of sane size. Raises Failure."""
    try:
        if path.stat().st_size > MOST_JSON[path.name]:
            raise ValueError(f"larger than {MOST_JSON[path.name]} bytes")
        return parsed(path, path.read_bytes())
    except (OSError, ValueError) as e:
        raise Failure(f"{path}: damaged ({_line(e)}); fetch the model again") from e


def parsed(what: Path | str, data: bytes) -> dict[str, Any]:
    """A JSON object. Raises Failure."""
    try:
        content = json.loads(data)
        if not isinstance(content, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as e:
        raise Failure(f"{what}: damaged ({_line(e)}); fetch the model again") from e
    return content


def file_digest(path: Path) -> str:
    """The sha256 of a file, in hex."""
    with path.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _line(e: Exception) -> str:
    return shown(" ".join(str(e).split()))[:300] or type(e).__name__
