"""Models as `config.json` + safetensors, in a folder or in the MLflow registry. Nothing is ever unpickled.

A model folder has `model.safetensors`, or where that would be large `model-00001-of-00003.safetensors` ... with
`model.safetensors.index.json`, as Hugging Face lays them out. `config.json` has the sha256 of each of these files.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from longtake.datasets import compact, schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.training.registry import promotion
from longtake.training.registry import store as model_store

# name in config.json -> where its config and its module are defined; the module can be made on the device "meta"
MODELS = {
    "pv_vae": ("longtake.training.models.pv_vae.model", "PVVAEConfig", "PVVAE"),
    "latte": ("longtake.training.models.latte.model", "LatteConfig", "Latte"),
    "memory_dit": ("longtake.training.models.memory.dit", "MemoryDiTConfig", "MemoryDiT"),
}
_FORMAT = 2
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
    """Write a model folder, whole or not at all; one that is there is replaced.

    Args:
        model: a name in `MODELS`.
        weights: taken one after the other, so that an iterator needs memory for one file at a time.
        facts: more for config.json, such as its lineage.
        max_bytes: of a weights file, unless a single tensor is larger.

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
            made = spool / "model"
            made.mkdir()
            _write_weights(made, weights.items() if isinstance(weights, Mapping) else weights, max_bytes)
            content = {
                **facts,
                "format": _FORMAT,
                "model": model,
                "config": dict(config),
                "sha256": {path.name: file_digest(path) for path in sorted(made.iterdir())},
                "longtake": version("longtake"),
            }
            (made / "config.json").write_bytes(storage.canonical_json(content))
            for path in [*made.iterdir(), made]:
                storage.sync(path)
            if folder.exists():
                folder.rename(spool / "old")
            made.rename(folder)
            storage.sync(parent)


def _write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]], max_bytes: int) -> None:
    names: list[list[str]] = []  # of the tensors in each file
    total = 0
    for number, shard in enumerate(_shards(weights, max_bytes)):
        try:
            save_file(shard, folder / f"{number}", {"format": "pt"})
        except SafetensorError as e:
            # how it reports a write that failed
            raise Failure(f"{folder}: could not be written ({_line(e)}); free some space and go on") from e
        names.append(list(shard))
        total += sum(tensor.nbytes for tensor in shard.values())
    if len(names) == 1:
        (folder / "0").rename(folder / "model.safetensors")
        return
    where: dict[str, str] = {}
    for number, inside in enumerate(names):
        file = f"model-{number + 1:05d}-of-{len(names):05d}.safetensors"
        (folder / f"{number}").rename(folder / file)
        where |= dict.fromkeys(inside, file)
    content = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / _INDEX).write_bytes(storage.canonical_json(content))


def _shards(weights: Iterable[tuple[str, Tensor]], max_bytes: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    size, seen, lies = 0, set[str](), set[int]()
    for name, value in weights:
        if name in seen:
            raise ValueError(f"weights: {name} comes twice")
        tensor = value.detach().cpu().contiguous()
        if shard and size + tensor.nbytes > max_bytes:
            yield shard
            shard, size, lies = {}, 0, set()
        if (at := tensor.untyped_storage().data_ptr()) in lies:
            # a file has no tensors that share memory, such as tied weights
            tensor = tensor.clone()
        seen.add(name)
        lies.add(at)
        shard[name] = tensor
        size += tensor.nbytes
    if not seen:
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
    """What config.json says, unless it is none of this longtake or names other files than weights. Raises as above."""
    if content.get("model") not in list(MODELS):
        raise UserError(
            f"{where}: config.json: unknown model {str(content.get('model'))[:80]!r};"
            f" this longtake knows {', '.join(MODELS)}"
        )
    if content.get("format") != _FORMAT:
        raise UserError(
            f"{where}: config.json: format {str(content.get('format'))[:80]}, but this longtake reads {_FORMAT};"
            " use the version that wrote it, or train it again"
        )
    files = content.get("sha256")
    if not isinstance(files, dict) or not isinstance(content.get("config"), dict):
        raise Failure(f"{where}: config.json: needs the objects config and sha256")
    for name in files:
        if not _WEIGHTS.fullmatch(name) and name != _INDEX:
            raise Failure(f"{where}: config.json: {name[:80]!r} is no weights file of a model folder")
    return content


def digest(content: Mapping[str, Any]) -> str:
    """The sha256 that a model is known by: of its weights file, or where there are many, of their digests."""
    files: dict[str, str] = content["sha256"]
    return files.get("model.safetensors") or hashlib.sha256(storage.canonical_json(files)).hexdigest()


def load_folder(folder: Path) -> nn.Module:
    """The torch module of a model folder, on the CPU, in evaluation mode.

    Raises:
        UserError: no model is here, or this longtake does not know it.
        Failure: the weights are damaged or belong to another config.
    """
    content = read_config(folder)
    for name, sha256 in content["sha256"].items():
        if not (folder / name).is_file() or file_digest(folder / name) != sha256:
            raise Failure(f"{folder / name}: not the weights that config.json describes; fetch the model again")
    return _module(folder, content)


def _module(folder: Path, content: Mapping[str, Any]) -> nn.Module:
    files = _weight_files(folder, set(content["sha256"]))
    where, config, model = MODELS[content["model"]]
    code = importlib.import_module(where)
    try:
        made = getattr(code, config)(**content["config"])
        # what it needs is compared with what there is before memory is taken for it
        with torch.device("meta"):
            shapes = {name: list(t.shape) for name, t in getattr(code, model)(made).state_dict().items()}
        _check_shapes(folder, files, shapes)
        module = getattr(code, model)(made)
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


def _weight_files(folder: Path, named: set[str]) -> list[Path]:
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


def _check_shapes(folder: Path, files: list[Path], shapes: Mapping[str, list[int]]) -> None:
    found: dict[str, list[int]] = {}
    for path in files:
        with safe_open(path, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118
                if name in found:
                    raise Failure(f"{path}: tensor {name[:80]} is in another file too")
                found[name] = tensors.get_slice(name).get_shape()
    for what, names in (("missing", shapes.keys() - found.keys()), ("not known", found.keys() - shapes.keys())):
        if names:
            raise Failure(f"{folder}: {len(names)} tensors are {what} to this config, such as {min(names)[:80]}")
    if wrong := [name for name in shapes if shapes[name] != found[name]]:
        name = wrong[0]
        raise Failure(f"{folder}: tensor {name} has shape {found[name]}, its config needs {shapes[name]}")


def load(uri: str) -> nn.Module:
    """The torch module of a registered model, such as "models:/pv-vae@champion", or of a local model folder.

    The store is MLflow's: set MLFLOW_TRACKING_URI.

    Raises:
        UserError: there is no such model, version or alias.
        Failure: the store cannot be reached; or the model is damaged.
    """
    return load_with_facts(uri)[0]


def load_with_facts(uri: str) -> tuple[nn.Module, dict[str, Any]]:
    """The same, and what its config.json says of it."""
    from longtake.training.registry import cache as pull

    if not uri.startswith(("models:/", "runs:/")):
        return load_folder(Path(uri)), read_config(Path(uri))
    folder = pull.pull(uri)
    content = read_config(folder)
    # the digests of its files were compared just now
    return _module(folder, content), content


def register(folder: Path, name: str, run_id: str) -> str:
    """Log a model folder to an MLflow run as a pyfunc and register it; returns "models:/NAME/VERSION".

    The version gets the alias `candidate`. A version that this run has registered before is not registered again.
    """
    content = read_config(folder)
    return model_store.log_model(folder, name, run_id, digest(content), content.get("lineage", {}))


def promote(uri: str) -> None:
    """Give a registered version ("models:/NAME/VERSION") the alias `champion`, and what had it `previous`."""
    promotion.promote(uri)


def lineage(inputs: Mapping[str, str]) -> dict[str, Any]:
    """What a model is made of, for its config.json: call it when training begins, since data and aliases move.

    Args:
        inputs: URIs of datasets, views and models by the config field that names them.

    Returns:
        `inputs`: for each field its `uri`, without a login or key, and `digest` of a dataset (of all its shards), view or
        latents (sha256 of the file), or `sha256` of a model, whose URI is that of the version; `recipe`: digest of the
        resolved recipe, of LONGTAKE_RECIPE; `git`: revision of the working folder and whether it had changes; `longtake`,
        `torch`: versions; `run`: MLFLOW_RUN_ID. What is not known is None.

    Raises:
        UserError, Failure: an input is not there or damaged.
    """
    return {
        "inputs": {field: _input(uri) for field, uri in inputs.items()},
        "recipe": os.environ.get("LONGTAKE_RECIPE"),
        "git": _git(),
        "longtake": version("longtake"),
        "torch": version("torch"),
        "run": os.environ.get("MLFLOW_RUN_ID"),
    }


def _input(uri: str) -> dict[str, Any]:
    if uri.startswith("models:/"):
        return model_store.resolve(uri)
    if uri.endswith(".parquet"):
        try:
            return {"uri": shown(uri), "digest": hashlib.sha256(storage.read(uri)).hexdigest()}
        except FileNotFoundError as e:
            raise UserError(f"{uri}: no such view; run its `curate` stage") from e
    if storage.exists(storage.join(uri, "dataset.json")):
        splits = {split: compact.open_split(uri, split)[0].digest for split in schema.SPLITS}
        sha256 = hashlib.sha256(storage.canonical_json(splits)).hexdigest()
        return {"uri": shown(uri), "digest": sha256, "splits": splits}
    if storage.exists(record := storage.join(uri, "latents.json")):
        return {"uri": shown(uri), "digest": hashlib.sha256(storage.read(record)).hexdigest()}
    if (Path(uri) / "config.json").exists():
        return {"uri": uri, "sha256": digest(read_config(Path(uri)))}
    raise UserError(f"{uri}: neither a dataset, a view nor a model, nor latents")


def _git() -> dict[str, Any] | None:
    """The commit of the working folder's repository; None where there is none."""
    git = shutil.which("git")

    def ask(*arguments: str) -> str | None:
        try:
            done = subprocess.run([str(git), *arguments], capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    revision = ask("rev-parse", "HEAD") if git else None
    changes = ask("status", "--porcelain") if revision else None
    return {"revision": revision, "dirty": None if changes is None else bool(changes)} if revision else None


def reconstruct(model: nn.Module, video: np.ndarray) -> np.ndarray:
    """What a video model makes of uint8 videos (B, T, H, W, 3): uint8 of the same shape.

    Raises:
        UserError: the array is not of that shape and type, or the model cannot divide it.
    """
    from longtake.datasets.loader import to_model, to_pixels

    if not isinstance(video, np.ndarray) or video.dtype != np.uint8 or video.ndim != 5 or video.shape[-1] != 3:
        got = f"{video.dtype} {video.shape}" if isinstance(video, np.ndarray) else type(video).__name__
        raise UserError(f"videos: need a uint8 array (B, T, H, W, 3), got {got}")
    device = next(model.parameters()).device
    pixels = torch.from_numpy(np.ascontiguousarray(video)).permute(0, 4, 1, 2, 3).to(device)
    with torch.inference_mode():
        try:
            made = model.reconstruct(to_model(pixels))  # type: ignore[operator]
        except ValueError as e:
            raise UserError(f"videos: {e}") from e
    return to_pixels(made).permute(0, 2, 3, 4, 1).cpu().numpy()


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
