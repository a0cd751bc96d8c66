"""The lineage of a model: recorded when its training begins, and pinned, since datasets grow and aliases move."""

import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from longtake.datasets import compact, schema, storage
from longtake.datasets.errors import UserError
from longtake.datasets.latents import read_latents
from longtake.datasets.masking import shown
from longtake.datasets.tokens import read_tokens
from longtake.training.foreign.folder import digests_of, is_foreign, parts_for
from longtake.training.registry import pipelines, store
from longtake.training.registry.disk import digest, read_config
from longtake.training.registry.uri import parse

_FILE = "lineage.json"  # in the folder of checkpoints
_MODELS = (
    "vae",
    "vqgan",
    "sound_vqgan",
    "anchors",
    "base",
    "parent",
    "image",
    "encoder",
)  # models, whose aliases may move


def record(inputs: Mapping[str, str]) -> dict[str, Any]:
    """The lineage of a model, for its config.json: call it when training begins, since data and aliases move.

    Args:
        inputs: URIs of datasets, views and models by the config field that names them.

    Returns:
        `inputs`: for each field its `uri`, without a login or key, and `digest` of a dataset (of all its shards), view,
        latents, tokens, captions or texts (sha256 of the file), or `sha256` of a model, whose URI is that of the version,
        and of a folder of another library that of the part which the field names;
        `recipe`: digest of the resolved recipe, of LONGTAKE_RECIPE; `git`: revision of the working folder and whether it had
        changes; `longtake`, `torch`: versions; `run`: MLFLOW_RUN_ID. Unknown facts are None.

    Raises:
        UserError, Failure: an input is missing or damaged.
    """
    return {
        "inputs": {field: _input(field, uri) for field, uri in inputs.items()},
        "recipe": os.environ.get("LONGTAKE_RECIPE"),
        "git": _git(),
        "longtake": version("longtake"),
        "torch": version("torch"),
        "run": os.environ.get("MLFLOW_RUN_ID"),
    }


def _input(field: str, uri: str) -> dict[str, Any]:
    if uri.startswith("models:/"):
        return store.resolve(uri)
    if uri.endswith(".parquet"):
        try:
            return {"uri": shown(uri), "digest": hashlib.sha256(storage.read(uri)).hexdigest()}
        except FileNotFoundError as e:
            raise UserError(f"{uri}: no such view; run its `curate` stage") from e
    if storage.exists(storage.join(uri, "dataset.json")):
        splits = {split: compact.open_split(uri, split)[0].digest for split in schema.SPLITS}
        sha256 = hashlib.sha256(storage.canonical_json(splits)).hexdigest()
        return {"uri": shown(uri), "digest": sha256, "splits": splits}
    for name in ("latents.json", "tokens.json", "captions.json", "text.json"):
        if storage.exists(record := storage.join(uri, name)):
            return {"uri": shown(uri), "digest": hashlib.sha256(storage.read(record)).hexdigest()}
    if model := _of_folder(field, uri):
        return {"uri": uri, "sha256": model}
    raise UserError(f"{uri}: neither a dataset, a view nor a model, nor latents, tokens, captions or text")


def _of_folder(field: str, uri: str) -> str | None:
    """The sha256 of the model in a folder of this machine, of another library's the part; None where there is none."""
    if not storage.is_local(uri):
        return None
    if is_foreign(folder := pipelines.local(uri)):
        place = pipelines.opened(uri, folder, []).folder
        parts = [digest({"sha256": digests_of(part)}) for part in parts_for(place, field)]
        return parts[0] if len(parts) == 1 else hashlib.sha256(storage.canonical_json(parts)).hexdigest()
    return digest(read_config(folder)) if (folder / "config.json").exists() else None


def _git() -> dict[str, Any] | None:
    """The commit of the working folder's repository; None where there is none."""
    git = shutil.which("git")

    def ask(*arguments: str) -> str | None:
        try:
            process = subprocess.run([str(git), *arguments], capture_output=True, text=True, check=False, timeout=30)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return process.stdout.strip() if process.returncode == 0 else None

    revision = ask("rev-parse", "HEAD") if git else None
    changes = ask("status", "--porcelain") if revision else None
    return {"revision": revision, "dirty": None if changes is None else bool(changes)} if revision else None


def begin(inputs: Mapping[str, str], folder: Path, begun: Mapping[str, Any] | None) -> None:
    """Keep the lineage of a training in `folder`, before its first process starts.

    Args:
        begun: meta.json of the checkpoint that it goes on from. Its lineage counts, wherever the checkpoint was before.

    Raises:
        UserError: the checkpoint was made from other inputs; and as `pinned`.
    """
    path = folder / _FILE
    if begun is None:
        # of an attempt that ended before its first checkpoint: inputs may have changed since
        path.unlink(missing_ok=True)
    elif begun.get("lineage"):
        storage.write(str(path), storage.canonical_json(begun["lineage"]))
    pinned(inputs, folder)
    if begun is not None and (changed := differences(inputs, folder)):
        raise UserError(
            f"{folder}: its checkpoint was made from other inputs ({', '.join(changed)}); bring them back, or use --force to"
            " begin anew"
        )


def differences(inputs: Mapping[str, str], folder: Path) -> list[str]:
    """The inputs that are others than those kept in `folder`: `FIELD: URI there, URI here`, or that one has changed.

    An alias that has moved since is no other input: the training keeps the version that it began with.
    """
    recorded, found = (kept(folder) or {"inputs": {}})["inputs"], []
    for field, uri in inputs.items():
        was = recorded.get(field, {"uri": "nothing"})
        model, version, alias = parse(uri)
        if (alias or version == "latest") and parse(was["uri"]).name == model:
            continue
        if _identity(_input(field, uri)) != _identity(was):
            both = f"{was['uri']} there, {shown(uri)} here"
            found.append(f"{field}: {both if was['uri'] != shown(uri) else f'{shown(uri)} has changed'}")
    return found


def _identity(record: Mapping[str, Any]) -> str:
    return str(record.get("sha256") or record.get("digest") or record["uri"])


def pinned(inputs: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The inputs with the models' versions as of the beginning of this training; the lineage is kept in `folder`.

    Where latents are an input and no autoencoder is, `vae` is the autoencoder of the latents, or what encodes live ones;
    likewise `vqgan` of tokens, and `sound_vqgan` of those of sound.

    Raises:
        UserError: the model in a folder is another than when the training began; and as `record`.
    """
    path = folder / _FILE
    if not path.exists():
        makers = {"vae": read_latents(inputs["latents"]).encoder["uri"]} if "latents" in inputs else {}
        makers |= {"vae": inputs["encoder"]} if "encoder" in inputs else {}
        for field, maker in (("tokens", "vqgan"), ("audio_tokens", "sound_vqgan")):
            makers |= {maker: read_tokens(inputs[field]).model["uri"]} if field in inputs else {}
        storage.write(str(path), storage.canonical_json(record(makers | dict(inputs))))
    recorded = read(folder)["inputs"]
    for name, uri in inputs.items():
        now = _of_folder(name, uri) if name in _MODELS else None
        if now and now != recorded.get(name, {}).get("sha256"):
            raise UserError(
                f"{name}: {uri} is another model than when this training began; bring it back, or use --force to"
                f" begin anew, elsewhere than in {folder}"
            )
    return dict(inputs) | {name: recorded[name]["uri"] for name in _MODELS if name in recorded}


def read(folder: Path) -> dict[str, Any]:
    """The lineage that `pinned` has kept."""
    return dict(json.loads((folder / _FILE).read_bytes()))


def kept(folder: Path) -> dict[str, Any] | None:
    """`read`, for a checkpoint; None for a training without inputs of ours."""
    return read(folder) if (folder / _FILE).exists() else None
