"""The scorer `embedding`: vectors of some frames, what a head says of them, and how like pictures they are."""

import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field as Setting
from pydantic import model_validator

from longtake.datasets import schema, storage
from longtake.datasets.errors import UserError
from longtake.datasets.pictures import Located, first_line, loaded, opened, shown, units, width_of
from longtake.datasets.scores import Field
from longtake.datasets.stage import StageConfig
from longtake.pipeline.exact import be_exact
from longtake.pipeline.scorers import torchscript
from longtake.pipeline.scorers.one_by_one import OneByOne, numbers
from longtake.pipeline.scorers.pictures import picture, picture_bytes
from longtake.pipeline.scorers.scorer import Scorer, Values

Name = Annotated[str, Setting(pattern="^[a-z][a-z0-9_]*$")]
Activation = Literal["none", "relu", "gelu"]

_SIZE = 224  # pixels that a TorchScript encoder gets
_HEAD_BYTES = 256 << 20
_LAYER = re.compile(r"(?:.*?\.)?(\d+)\.(weight|bias)|(?:.*\.)?(weight|bias)")
_TAKEN = {"vector", "value", *schema.SCORE_INDEX.names}


class Config(StageConfig):
    """Vectors of length 1 of a clip's frames, for clusters, duplicates and search, by an encoder of yours.

    The field `vector` has the mean of the frames' vectors, or each of them. With a `head` the field `value` has what that
    makes of the vector of a frame, as the mean over frames: LAION's aesthetic is one, on CLIP. Each picture of `likeness`
    has a field of its own, such as `{dogs: dog.jpg}`: the cosine of its vector to the clip's, or to the nearest frame's.

    model       folder of a dual encoder (CLIP, SigLIP) or another model of pictures of `transformers`, with its preprocessor
                config and safetensors; or a TorchScript file, (B, 3, size, size) float32 in 0..1 to (B, D), which is code
                and is run: a file that you trust
    size        pixels a side, for TorchScript alone; null: 224
    frames      of a clip, spread evenly
    pool        mean: one vector a clip; each: one a frame
    head        safetensors with linear layers, one after the other, of which the last has one output
    activation  between the layers of the head: none, relu or gelu
    likeness    pictures by the names of their fields
    """

    model: Located
    size: int | None = Setting(None, ge=1, le=4096)
    frames: int = Setting(8, ge=1, le=64)
    pool: Literal["mean", "each"] = "mean"
    head: Located | None = None
    activation: Activation = "none"
    likeness: dict[Name, Located] = Setting({})

    @model_validator(mode="after")
    def _named_apart(self) -> "Config":
        if taken := sorted(_TAKEN & set(self.likeness)):
            raise ValueError(f"likeness: {taken[0]} is the name of another field; choose another")
        return self

    def decisive(self, settings: dict[str, Any]) -> dict[str, Any]:
        # digests decide, wherever the files are
        kept = {name: value for name, value in settings.items() if name not in ("model", "head", "likeness")}
        # the names of the pictures are those of fields
        return kept | {"likeness": sorted(self.likeness)} if self.likeness else kept


def _is_folder(config: Config) -> bool:
    return storage.is_local(config.model) and Path(config.model).is_dir()


def _check(config: Config) -> None:
    """Raises UserError where nothing is there, or `size` is set for a folder, whose own preprocessor decides."""
    if _is_folder(config) and config.size is not None:
        raise UserError(f"size: {config.model}: its preprocessor config says the size; leave `size` out")
    if not _is_folder(config) and not storage.exists(config.model):
        raise UserError(f"model: {config.model}: no such folder or file; name a model of transformers, or TorchScript")


def _width(config: Config) -> int:
    if _is_folder(config):
        return width_of(opened(config.model))
    return torchscript.width_of(config.model, config.size or _SIZE, "model")


def _digest(config: Config) -> str:
    """Of the encoder, the head and the pictures. Raises UserError where one is not what it should be."""
    _check(config)
    encoder = opened(config.model).digest() if _is_folder(config) else torchscript.digest_of(config.model, "model")
    head = hashlib.sha256(_head_bytes(config.head)).hexdigest() if config.head else ""
    pictures = {
        name: hashlib.sha256(picture_bytes(path, f"likeness.{name}: {path}")).hexdigest()
        for name, path in config.likeness.items()
    }
    if not head and not pictures:
        return encoder
    return hashlib.sha256(json.dumps([encoder, head, pictures], sort_keys=True).encode()).hexdigest()


def _fields(config: Config) -> tuple[Field, ...]:
    _check(config)
    width = _width(config)
    each = config.pool == "each"
    meaning = "vectors of length 1, a frame each" if each else "mean of the frames' vectors, of length 1"
    fields = [Field("vector", "vector", meaning, width=width, count=config.frames if each else None)]
    if config.head:
        _head(config.head, config.activation, width)
        fields.append(Field("value", "number", "what the head makes of a frame, as the mean over frames"))
    of = "the nearest frame's vector" if each else "the clip's vector"
    fields += [Field(name, "number", f"cosine of {of} to that of a picture, -1 to 1") for name in config.likeness]
    return tuple(fields)


def _load(config: Config, device: str) -> OneByOne:
    _check(config)
    be_exact()
    encode, size, width = _encoder(config, device)
    head = _head(config.head, config.activation, width) if config.head else None
    pictures = {
        name: units(encode(picture(path, f"likeness.{name}: {path}", size)[None])[0])
        for name, path in config.likeness.items()
    }

    def values(frames: np.ndarray) -> Values:
        each = units(encode(frames))
        vectors = each if config.pool == "each" else units(each.mean(0, dtype=np.float64))
        likenesses = [float((np.atleast_2d(vectors) @ other).max()) for other in pictures.values()]
        value = {"value": float(head(each).mean())} if head else {}
        return {"vector": vectors} | value | numbers(list(pictures), np.array(likenesses))

    return OneByOne(config.frames, size, values)


def _encoder(config: Config, device: str) -> tuple[Callable[[np.ndarray], np.ndarray], tuple[int, int] | None, int]:
    """Frames (N, H, W, 3) uint8 to vectors (N, D); the size of frames that it takes, None for any; and D."""
    if not _is_folder(config):
        size = config.size or _SIZE
        script = torchscript.Script(config.model, size, device, "model")
        return script, (size, size), script.width
    folder = opened(config.model)
    network = loaded(folder, "vectors", device)

    def encode(frames: np.ndarray) -> np.ndarray:
        return np.asarray(shown(folder, lambda: network.vectors(frames).cpu().numpy()))

    return encode, None, width_of(folder)


def _head_bytes(path: str) -> bytes:
    try:
        if storage.is_local(path) and Path(path).stat().st_size > _HEAD_BYTES:
            raise UserError(f"head: {path}: has more than {_HEAD_BYTES >> 20} MiB; name a file of linear layers alone")
        return storage.read(path)
    except (FileNotFoundError, IsADirectoryError) as e:
        raise UserError(
            f"head: {path}: no such file; write one with `safetensors.torch.save_file(head.state_dict(), …)`"
        ) from e
    except OSError as e:
        raise UserError(f"head: {path}: cannot be read ({first_line(e)}); give read permission") from e


def _head(path: str, activation: Activation, width: int) -> Callable[[np.ndarray], np.ndarray]:
    """The linear layers of a file: vectors (N, width) to numbers (N,), float64. Raises UserError where they are no such head."""
    layers = _layers(path)
    sizes = [width, *(len(weight) for weight, _ in layers)]
    takes = [weight.shape[1] for weight, _ in layers]
    if sizes[:-1] != takes or sizes[-1] != 1:
        what = " -> ".join(f"{weight.shape[1]} to {len(weight)}" for weight, _ in layers)
        raise UserError(
            f"head: {path}: has layers {what}; {width} values must become one number, name another head or model"
        )

    def number(vectors: np.ndarray) -> np.ndarray:
        values = vectors.astype(np.float64)
        for place, (weight, bias) in enumerate(layers):
            values = values @ weight.T + bias
            if place < len(layers) - 1:
                values = _activated(values, activation)
        return np.asarray(values[:, 0])

    return number


def _activated(values: np.ndarray, activation: Activation) -> np.ndarray:
    if activation == "relu":
        return np.maximum(values, 0)
    if activation == "gelu":
        import torch

        return np.asarray(torch.nn.functional.gelu(torch.from_numpy(values)).numpy())
    return values


def _layers(path: str) -> list[tuple[np.ndarray, np.ndarray]]:
    """The weight and bias of each layer in a file, by the numbers in their names, float64."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        tensors = {name: tensor.double().numpy() for name, tensor in load(_head_bytes(path)).items()}
    except (SafetensorError, ValueError, RuntimeError) as e:
        raise UserError(
            f"head: {path}: no safetensors, and so not opened ({first_line(e)});"
            " write it with `safetensors.torch.save_file(head.state_dict(), …)`"
        ) from e
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, values in tensors.items():
        match = _LAYER.fullmatch(name)
        wanted = 2 if match and (match[2] or match[3]) == "weight" else 1
        if match is None or values.ndim != wanted:
            raise UserError(f"head: {path}: {storage.printable(name)[:60]} is of no linear layer; save those alone")
        layers.setdefault(int(match[1] or 0), {})[match[2] or match[3]] = values
    for layer in layers.values():
        if "weight" not in layer or layer.get("bias", layer["weight"][:, 0]).shape != (len(layer["weight"]),):
            raise UserError(f"head: {path}: a layer's weight and bias do not fit; save the head again")
    ordered = [layers[number] for number in sorted(layers)]
    if not ordered:
        raise UserError(f"head: {path}: has no layer; save the head again")
    return [(layer["weight"], layer.get("bias", np.zeros(len(layer["weight"])))) for layer in ordered]


SCORER = Scorer(Config, 1, _fields, _load, _digest, gpu=True)
