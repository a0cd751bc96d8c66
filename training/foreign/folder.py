"""Folders in the layout of diffusers: a pipeline with its parts side by side, or one part alone. Only files are looked at.

A pipeline folder has `model_index.json`, and a folder for each part: `vae`, `transformer`, `text_encoder`, `scheduler` ...
A part folder has `config.json` and safetensors, in several files with an index where they are large. Nothing else is
read, no code and no pickle; what is missing or half there is one line.
"""

import hashlib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown
from longtake.training.foreign.files import Tensor, file_digests, read_json, tensors_in, weights_of

INDEX, CONFIG, SCHEDULER = "model_index.json", "config.json", "scheduler_config.json"
VAE, TRANSFORMER, TRANSFORMER_2 = "vae", "transformer", "transformer_2"
PIPELINE = "pipeline"  # the model in our config.json
_PART = re.compile(r"[a-z][a-z0-9_]*")
_COUNT = re.compile(r"layers|num_res_blocks")  # in keys of how many modules there are
_MOST_NUMBER = 1 << 28  # of a size in a config
_NOT_OF_MODEL = ("transformers_version", "torch_dtype", "dtype", "architectures")  # keys of transformers' config.json


class Part(NamedTuple):
    """One component of a pipeline.

    folder      where its files are
    name        "vae", "transformer", "transformer_2", "text_encoder" ...
    class_name  its class in diffusers or transformers
    config      its config.json without the names that begin with "_"
    files       its config.json, weights and their index by name
    """

    folder: Path
    name: str
    class_name: str
    config: dict[str, Any]
    files: Mapping[str, Path]

    @property
    def weights(self) -> list[Path]:
        """Its safetensors, sorted."""
        return [self.files[name] for name in sorted(self.files) if name.endswith(".safetensors")]


def is_foreign(folder: Path) -> bool:
    """Whether a folder is of another library: a pipeline or a part of diffusers, or a pipeline that was registered here.

    Raises:
        UserError: its model_index.json or config.json is damaged.
    """
    if (folder / INDEX).is_file():
        return True
    content = read_json(folder / CONFIG) if (folder / CONFIG).is_file() else {}
    return isinstance(content.get("_class_name"), str) or content.get("model") == PIPELINE


def index_of(folder: Path) -> dict[str, Any]:
    """model_index.json, or {} where a folder is a part alone. Raises UserError: it is damaged."""
    return read_json(folder / INDEX) if (folder / INDEX).is_file() else {}


def pipeline_of(folder: Path) -> Path:
    """The pipeline folder that a folder is a part of; the folder itself where it is no such part. Raises UserError: damaged."""
    whole = folder.absolute().parent
    return whole if not (folder / INDEX).is_file() and index_of(whole).get(folder.name) else folder


def scheduler_of(folder: Path) -> dict[str, Any]:
    """The scheduler's config, with the name of its class as `class_name`; {} where there is none. Raises UserError: damaged."""
    path = folder / "scheduler" / SCHEDULER
    if not path.is_file():
        return {}
    content = read_json(path)
    return {"class_name": _class_of(path, content), **_public(content)}


def parts_of(folder: Path) -> tuple[str, ...]:
    """The names of the parts with weights that a pipeline names, or has where it has no model_index.json; sorted.

    Raises:
        UserError: a part that model_index.json names is not there.
    """
    index = index_of(folder)
    if not index:
        return tuple(
            sorted(path.parent.name for path in folder.glob(f"*/{CONFIG}") if _PART.fullmatch(path.parent.name))
        )
    named = {name for name, value in index.items() if isinstance(value, list) and any(value)}
    if odd := sorted(name for name in named if not _PART.fullmatch(name)):
        raise UserError(f"{folder / INDEX}: {shown(odd[0])[:80]!r} is no name of a part; name another folder")
    if missing := sorted(name for name in named if not (folder / name).is_dir()):
        raise UserError(f"{folder}: {INDEX} names {missing[0]}, which is not there; copy or download the whole folder")
    return tuple(sorted(name for name in named if (folder / name / CONFIG).is_file()))


def part_of(folder: Path, name: str) -> Part:
    """A part of a pipeline folder, or of a folder that is this part alone.

    Weights without a variant such as fp16 in their name are taken, else those of the only variant.

    Raises:
        UserError: there is no such folder or part; the part is another; it has a pickle alone; it is half downloaded.
    """
    if folder.suffix == ".safetensors" and folder.is_file():
        raise UserError(
            f"{folder}: is a single file in another layout; convert it to a folder of diffusers"
            " (`from_single_file(FILE)`, then `save_pretrained(FOLDER)`) and name that"
        )
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    alone = (
        not (folder / INDEX).is_file() and (folder / CONFIG).is_file() and "_class_name" in read_json(folder / CONFIG)
    )
    place = folder if alone else folder / name
    if not (place / CONFIG).is_file():
        raise UserError(_why_no_part(folder, name))
    content = read_json(place / CONFIG)
    class_name = _class_of(place / CONFIG, content)
    if alone and name != (own := name_of(class_name)) and not (own and name.startswith(f"{own}_")):
        raise UserError(
            f"{folder}: is a {shown(class_name)[:80]}, and no {name}; name the folder of a pipeline, or of a {name}"
        )
    weights = weights_of(place, class_name)
    part = Part(
        place, name, class_name, _public(content), {CONFIG: place / CONFIG} | {path.name: path for path in weights}
    )
    _check_numbers(part)
    return part


def name_of(class_name: str) -> str | None:
    """The name that a part of this class has in a pipeline: "vae" or "transformer"; None for a class of another kind."""
    if class_name.startswith("Autoencoder"):
        return VAE
    return TRANSFORMER if "Transformer" in class_name else None


def parts_for(folder: Path, field: str) -> list[Part]:
    """What a field of a config such as `vae` or `base` names of a folder: its autoencoder, or all its transformers.

    One of several models, `models.0`, may be all of them.

    Raises:
        UserError: as `part_of`.
    """
    if field.startswith("models."):
        alone = name_of(str(read_json(folder / CONFIG).get("_class_name"))) if (folder / CONFIG).is_file() else None
        names = [name for name in parts_of(folder) if name in (VAE, TRANSFORMER, TRANSFORMER_2)]
        return [part_of(folder, name) for name in names or [alone or VAE]]
    if field != "base":
        return [part_of(folder, VAE)]
    two = TRANSFORMER_2 in parts_of(folder)
    return [part_of(folder, name) for name in (TRANSFORMER, *([TRANSFORMER_2] if two else []))]


def listing_of(parts: Iterable[Part]) -> str:
    """A digest of the paths, sizes and times of the files of parts, which are not read."""
    facts = [(path, path.stat()) for part in parts for path in part.files.values()]
    lines = sorted(f"{path.absolute()} {each.st_size} {each.st_mtime_ns}" for path, each in facts)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def tensors_of(part: Part) -> dict[str, Tensor]:
    """The tensors of a part by name, from the headers of its files.

    Raises:
        UserError: a file is damaged or not whole, or one tensor is in two files.
    """
    tensors: dict[str, Tensor] = {}
    for path in part.weights:
        for name, tensor in tensors_in(path).items():
            if name in tensors:
                raise UserError(
                    f"{path}: tensor {shown(name)[:80]} is in another file too; delete what does not belong here"
                )
            tensors[name] = tensor
    return tensors


def digests_of(part: Part, known: Mapping[Path, str] | None = None) -> dict[str, str]:
    """The sha256 of each file that decides what a part is: of its weights, and of its config without notes of its writer.

    `known` are those of files that were read just now, and are not read again.
    """
    known = known or {}
    config = {name: value for name, value in part.config.items() if name not in _NOT_OF_MODEL}
    described = storage.canonical_json([part.class_name, config])
    weights = file_digests({path.name: path for path in part.weights if path not in known})
    weights |= {path.name: known[path] for path in part.weights if path in known}
    return {CONFIG: hashlib.sha256(described).hexdigest(), **weights}


def digest_of(part: Part) -> str:
    """The sha256 that a part is known by, over config and weights; that of `registry.disk` for its facts."""
    return hashlib.sha256(storage.canonical_json(digests_of(part))).hexdigest()


def _why_no_part(folder: Path, name: str) -> str:
    """Why a folder has no such part, and the remedy."""
    parts = parts_of(folder)
    if not parts and (loose := sorted(folder.glob("*.safetensors"))):
        return (
            f"{folder}: has {loose[0].name}, but nothing that says what it is; name a folder in the layout of diffusers, as"
            " `save_pretrained` writes it"
        )
    if not parts:
        return (
            f"{folder}: is no model (no {INDEX}, no {CONFIG} of diffusers); name a folder that `save_pretrained` wrote"
        )
    pair = index_of(folder).get(name)
    if isinstance(pair, list) and any(pair):
        return f"{folder}: has no {name}/{CONFIG}, though {INDEX} names it; copy or download the whole folder"
    return f"{folder}: has no {name}; its parts are {', '.join(parts)}"


def _class_of(path: Path, content: Mapping[str, Any]) -> str:
    """The class that a config names; of transformers the first of its architectures."""
    architectures = content.get("architectures")
    name = content.get("_class_name") or (
        architectures[0] if isinstance(architectures, list) and architectures else None
    )
    if not isinstance(name, str) or not name.isidentifier():
        raise UserError(
            f"{path}: does not say which class it is of (`_class_name`); name a folder in the layout of diffusers"
        )
    if name == "WanModel":
        raise UserError(
            f"{path}: is the layout of Wan's authors (WanModel); name the folder of the same model for diffusers"
        )
    return name


def _check_numbers(part: Part) -> None:
    """Refuse a config of more layers than there are tensors, or of huge numbers: a module of it would never be made.

    Raises:
        UserError: as `tensors_of`; the config has such a number.
    """
    tensors = len(tensors_of(part))
    for key, value in part.config.items():
        most = tensors if _COUNT.search(key) else _MOST_NUMBER
        numbers = [each for each in (value if isinstance(value, list) else [value]) if isinstance(each, int | float)]
        if odd := [each for each in numbers if each > most]:
            raise UserError(
                f"{part.files[CONFIG]}: {shown(key)[:80]} is {odd[0]:.6g}, and the weights have {tensors} tensors;"
                " copy or download the whole folder"
            )


def _public(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in content.items() if not name.startswith("_")}
