"""A network of pictures in a folder in the layout of `transformers`: its checks before anything is loaded, and loading.

Nothing is downloaded, no code of the folder is run, and weights are read from safetensors alone. Pictures are prepared as
the folder's own preprocessor config says, by PIL, whatever else is installed.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import numpy as np
from pydantic import AfterValidator

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.networks import WEIGHTS, WEIGHTS_INDEX, imported, weights_of
from longtake.datasets.shard import sha256_of
from longtake.datasets.stage import Utf8

if TYPE_CHECKING:
    from torch import Tensor

Purpose = Literal["vectors", "labels"]  # of a model: what it gives a picture

_CONFIG, _PREPROCESSOR = "config.json", ("preprocessor_config.json", "processor_config.json")
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_TOKENS = ("vocab.json", "merges.txt", "spiece.model")  # of older tokenizers

# More is no network of pictures, but a file that is to take all memory.
_WEIGHT_BYTES, _TEXT_BYTES = 64 << 30, 64 << 20
_NUMBER = 1 << 21  # in a config
_SIDE = 4096  # pixels that a picture is scaled to
_COUNTS = re.compile(r"layers|depths?|blocks")  # keys of a config that say how often something is repeated


def _placed(path: str) -> str:
    return storage.absolute(os.path.expanduser(path)) if storage.is_local(path) else path  # noqa: PTH111  # may be a URL


_PICTURE = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(1, 64, 64, 3)  # to see what a model gives

Located = Annotated[Utf8, AfterValidator(_placed)]  # a path that workers find too


@dataclass(frozen=True)
class Folder:
    """A model's folder that was looked at, and not yet loaded.

    key      the setting that names it
    config   its config.json
    weights  its safetensors
    names    of the tensors in them
    values   in the tensors
    """

    path: Path
    key: str
    config: Mapping[str, Any]
    weights: tuple[Path, ...]
    names: frozenset[str]
    values: int

    def refusal(self, why: str) -> UserError:
        return UserError(f"{self.key}: {self.path}: {why}")

    def digest(self) -> str:
        """The sha256 of the names and digests of the files that are read."""
        names = (_CONFIG, *_PREPROCESSOR, *_TOKENIZER, *_TOKENS, WEIGHTS_INDEX)
        paths = [*self.weights, *(self.path / name for name in names)]
        digest = hashlib.sha256()
        for path in sorted(path for path in paths if path.is_file()):
            about = path.stat()
            sha256 = _sha256_of(path, about.st_size, about.st_mtime_ns, about.st_ino)
            digest.update(f"{path.name} {sha256}\n".encode())
        return digest.hexdigest()


@lru_cache(maxsize=256)
def _sha256_of(path: Path, *stamp: int) -> str:
    """Of a file, read once until it is written again: a search asks for it with every text."""
    return sha256_of(path)


def opened(path: str, key: str = "model") -> Folder:
    """The folder of a model, whose weights are not read.

    Raises:
        UserError: no such folder, no model of pictures in it, no preprocessor config; it asks for code of its own, has no
            safetensors, or says sizes that its weights do not have.
    """
    folder = Path(path).expanduser()
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "no such folder"
        raise UserError(
            f"{key}: {path}: {what}; name a folder that `save_pretrained` wrote, with {_CONFIG} and {WEIGHTS}"
        )
    texts = {name: _json(folder / name, key) for name in (_CONFIG, *_PREPROCESSOR, *_TOKENIZER[1:])}
    config = texts[_CONFIG]
    _check_texts(folder, texts, key)
    weights = tuple(weights_of(folder, key))
    size = sum(file.stat().st_size for file in weights)
    if size > _WEIGHT_BYTES:
        raise UserError(
            f"{key}: {folder}: has {size >> 30} GiB of weights, more than {_WEIGHT_BYTES >> 30}; name another"
        )
    shapes = {name: shape for file in weights for name, shape in shapes_of(file, key).items()}
    if any(count > len(shapes) for name, count in _numbers(config) if _COUNTS.search(name)):
        raise UserError(
            f"{key}: {folder}: {_CONFIG} says more layers than its weights have; copy the whole model again"
        )
    values = sum(int(np.prod(shape, dtype=object)) for shape in shapes.values())
    return Folder(folder, key, config, weights, frozenset(shapes), values)


def shapes_of(file: Path, key: str) -> dict[str, list[int]]:
    """The shapes of the tensors in a safetensors file, by its header. Raises UserError where it is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as tensors:
            return {name: tensors.get_slice(name).get_shape() for name in tensors.keys()}  # noqa: SIM118  # it is no dict
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(f"{key}: {file}: no whole safetensors file ({first_line(e)}); copy it again") from e


def _json(path: Path, key: str) -> dict[str, Any]:
    """The values in a JSON file; none where there is no file."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _TEXT_BYTES:
            raise ValueError(f"more than {_TEXT_BYTES >> 20} MiB")
        values = json.loads(path.read_bytes())
        if not isinstance(values, dict):
            raise ValueError("no object")
        return values
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{key}: {path}: cannot be read ({first_line(e)}); copy it again") from e


def _check_texts(folder: Path, texts: Mapping[str, dict[str, Any]], key: str) -> None:
    """Raises UserError where a config is none that can be loaded safely."""
    config = texts[_CONFIG]
    for name, values in texts.items():
        if any(each in ("auto_map", "custom_pipelines") for each, _ in _items(values)):
            raise UserError(
                f"{key}: {folder / name}: asks for code of its own (auto_map), which is never run;"
                " name a model whose code is in transformers"
            )
    if (folder / "adapter_config.json").is_file():
        raise UserError(f"{key}: {folder}: is an adapter; merge it into its model and save that (`merge_and_unload`)")
    if not isinstance(config.get("model_type"), str):
        raise UserError(f"{key}: {folder}: no model here ({_CONFIG} with a model_type); name a folder of transformers")
    if "transformers_weights" in config:
        raise UserError(f"{key}: {folder}: {_CONFIG} names other files as its weights; rename them {WEIGHTS}")
    if big := next((name for name, number in _numbers(config) if number > _NUMBER), None):
        raise UserError(f"{key}: {folder}: {_CONFIG} says a {big[:60]} that no network of pictures has; copy it again")
    prepared = texts[_PREPROCESSOR[0]] or texts[_PREPROCESSOR[1]].get("image_processor")
    if not isinstance(prepared, dict):
        raise UserError(f"{key}: {folder}: has no {_PREPROCESSOR[0]}; copy it there (`processor.save_pretrained`)")
    sizes = {name: values for name, values in prepared.items() if name.endswith("size")}
    if any(side > _SIDE for _, side in _numbers(sizes, int | float)):
        raise UserError(
            f"{key}: {folder}: its pictures have more than {_SIDE} pixels a side; lower size in {_PREPROCESSOR[0]}"
        )


def _items(values: Any) -> Iterator[tuple[str, Any]]:
    """The keys of objects in a JSON, at any depth, and what they hold; what a list holds has the key of the list."""
    waiting = [("", values)]
    while waiting:
        key, value = waiting.pop()
        if isinstance(value, dict):
            waiting += [(str(name), each) for name, each in value.items()]
            yield from ((str(name), None) for name in value)
        elif isinstance(value, list):
            waiting += [(key, each) for each in value]
        else:
            yield key, value


def _numbers(values: Any, kinds: Any = int) -> Iterator[tuple[str, float]]:
    return ((key, value) for key, value in _items(values) if isinstance(value, kinds) and not isinstance(value, bool))


class Network(NamedTuple):
    """A model on its device, in fp32 and evaluation mode, and what prepares pictures for it."""

    folder: Folder
    model: Any
    processor: Any
    device: str

    def inputs(self, frames: np.ndarray) -> dict[str, "Tensor"]:
        """What the model takes for frames (N, H, W, 3) uint8."""
        done = self.processor(images=list(frames), return_tensors="pt", input_data_format="channels_last")
        return {name: values.to(self.device) for name, values in done.items()}

    def vectors(self, frames: np.ndarray) -> "Tensor":
        """(N, D) float32 of frames (N, H, W, 3) uint8: the features that a dual encoder projects, else the pooled output.

        Of a model without one, or whose weights have no pooler: the first token, or the mean of a map.
        """
        inputs = self.inputs(frames)
        dual = hasattr(self.model, "get_image_features")
        out = self.model.get_image_features(**inputs) if dual else self.model(**inputs)
        vectors = features_of(out)
        if vectors is None:
            states = out.last_hidden_state
            vectors = states[:, 0] if states.ndim == 3 else states.mean((2, 3))
        return vectors.flatten(1).float()

    def logits(self, frames: np.ndarray) -> "Tensor":
        """(N, labels) float32 of frames (N, H, W, 3) uint8."""
        logits: Tensor = self.model(**self.inputs(frames)).logits
        return logits.float()


def features_of(out: Any) -> Any:
    """The vectors in what `get_image_features` and its like give; None where there are only states."""
    import torch

    if isinstance(out, torch.Tensor):
        return out
    values = (getattr(out, name, None) for name in ("image_embeds", "text_embeds", "pooler_output"))
    return next((value for value in values if value is not None), None)


def units(vectors: np.ndarray) -> np.ndarray:
    """Vectors (..., D) of length 1, float32; zeros stay, and what is not finite too."""
    vectors = vectors.astype(np.float64)
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(norms > 0, norms, 1)).astype(np.float32)


def sketched(folder: Folder, purpose: Purpose) -> Network:
    """The network without its weights, on no device: it takes no memory and no time.

    Raises:
        UserError: it is none that transformers knows, or that is for this purpose; its config is for larger weights.
    """
    import torch

    kind, described = _kind(folder, purpose)
    with torch.device("meta"):
        model = guarded(folder, lambda: kind._from_config(described, dtype=torch.float32, attn_implementation="eager"))
    _without_pooler(folder, model)
    if (values := sum(each.numel() for each in model.parameters())) > 1.1 * folder.values + 1_000_000:
        raise folder.refusal(
            f"{_CONFIG} says {values} values, its weights have {folder.values}; copy the whole model again"
        )
    return Network(folder, model.eval(), _processor(folder), "meta")


def loaded(folder: Folder, purpose: Purpose, device: str) -> Network:
    """The network. Raises UserError as `sketched`, where weights are missing, and where it does not give the same twice."""
    import torch

    sketched(folder, purpose)
    kind, described = _kind(folder, purpose)
    model, about = guarded(
        folder,
        lambda: kind.from_pretrained(
            folder.path,
            config=described,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation="eager",  # as exact as the device's products of matrices
            output_loading_info=True,
            **_LOCAL,
        ),
    )
    _without_pooler(folder, model)
    kept = {name for name, _ in model.named_parameters()} | {name for name, _ in model.named_buffers()}
    if absent := sorted(set(about["missing_keys"]) & kept):
        raise folder.refusal(f"its weights lack {absent[0]}; copy the whole model there")
    network = Network(folder, model.eval().requires_grad_(False).to(device), _processor(folder), device)
    with torch.inference_mode():
        give = network.vectors if purpose == "vectors" else network.logits
        one, other = (guarded(folder, lambda: give(_PICTURE)) for _ in range(2))
    # such as a masked autoencoder, which leaves out parts by chance
    if not torch.equal(one.nan_to_num(), other.nan_to_num()):
        raise folder.refusal("gives one picture two values, by chance; name a model that does not")
    return network


def width_of(folder: Folder) -> int:
    """D of the vectors that a folder's model gives. Raises UserError where it gives none, or as `loaded`."""
    import torch

    network = sketched(folder, "vectors")
    with torch.inference_mode():
        try:
            vectors = network.vectors(_PICTURE)
        except Exception:  # of a model that looks at values, which a sketch does not have
            network = loaded(folder, "vectors", "cpu")
            vectors = guarded(folder, lambda: network.vectors(_PICTURE))
    return vectors.shape[1]


def shown(folder: Folder, call: Callable[[], Any]) -> Any:
    """What a network gives frames. Raises Failure: it does not take them, or memory is too small."""
    import torch

    try:
        with torch.inference_mode():
            return call()
    except torch.OutOfMemoryError as e:
        raise Failure(f"{folder.path}: a clip's frames do not fit into the GPU's memory; lower `frames`") from e
    except (RuntimeError, ValueError, TypeError) as e:
        raise Failure(f"{folder.path}: does not take the frames of a clip ({first_line(e)}); name another model") from e


_LOCAL = {"local_files_only": True, "trust_remote_code": False}


def guarded(folder: Folder, load: Callable[[], Any]) -> Any:
    """What a call of transformers gives. Raises UserError with the first line of its error."""
    try:
        return load()
    except Exception as e:  # each model has its own way to say what it cannot do
        raise folder.refusal(f"transformers cannot load it ({first_line(e)}); save it again with this version") from e


def transformers_of(key: str) -> Any:
    """The library. Raises UserError where it is not installed."""
    # before the first import: it is read only then
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    transformers = imported("transformers", key)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


def first_line(error: BaseException) -> str:
    return storage.printable(next(iter(str(error).strip().splitlines()), type(error).__name__))[:200]


def _kind(folder: Folder, purpose: Purpose) -> tuple[Any, Any]:
    """The class of the model, and its config."""
    transformers = transformers_of(folder.key)
    described = guarded(folder, lambda: transformers.AutoConfig.from_pretrained(folder.path, **_LOCAL))
    auto = transformers.AutoModel if purpose == "vectors" else transformers.AutoModelForImageClassification
    kind = auto._model_mapping.get(type(described), None)
    if described.model_type == "clip_vision_model" and "visual_projection.weight" in folder.names:
        kind = transformers.CLIPVisionModelWithProjection if purpose == "vectors" else kind
    if isinstance(kind, tuple):
        kind = kind[0]
    if kind is None or not (hasattr(kind, "get_image_features") or kind.main_input_name == "pixel_values"):
        what = "gives pictures vectors" if purpose == "vectors" else "classifies pictures"
        raise folder.refusal(f"is a {str(described.model_type)[:40]}; name a model that {what}")
    return kind, described


def _processor(folder: Folder) -> Any:
    auto = transformers_of(folder.key).AutoImageProcessor
    return guarded(folder, lambda: auto.from_pretrained(folder.path, backend="pil", **_LOCAL))


def _without_pooler(folder: Folder, model: Any) -> None:
    """Take away a pooler that the weights do not have: it would be random."""
    pooler = getattr(model, "pooler", None)
    if pooler is not None and any(True for _ in pooler.parameters()) and not any("pooler." in n for n in folder.names):
        model.pooler = None
