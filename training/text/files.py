"""The files of an encoder's folder: which are read, what they must not be, and their digests. Nothing is ever downloaded."""

import hashlib
import json
from pathlib import Path
from typing import NamedTuple

from longtake.datasets.errors import UserError
from longtake.datasets.networks import WEIGHTS, weights_of
from longtake.datasets.shard import sha256_of

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
_NOT_OF_STATES = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
    "architectures",
)  # keys of config.json


class Files(NamedTuple):
    """The folders of a model and of its tokenizer, often the same."""

    model: Path
    tokenizer: Path

    def digests(self) -> dict[str, str]:
        """The sha256 of each file that decides states; of config.json without the keys that do not."""
        weights = {path.name: digest_of(path) for path in weights_of(self.model)}
        tokens = {path.name: digest_of(path) for path in self.of_tokenizer()}
        config = json.loads((self.model / "config.json").read_bytes())
        if other := config.get("transformers_weights"):
            raise UserError(f"encoder: {self.model}: config.json names {other} as its weights; rename it {WEIGHTS}")
        config = {name: value for name, value in config.items() if name not in _NOT_OF_STATES}
        return (
            weights | tokens | {"config.json": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()}
        )

    def of_tokenizer(self) -> list[Path]:
        """The files of the tokenizer."""
        return [path for path in (self.tokenizer / name for name in _TOKENIZER) if path.is_file()]


def digest_of(path: Path) -> str:
    """The sha256 of a file, read in blocks. Raises UserError where it cannot be read."""
    try:
        return sha256_of(path)
    except OSError as e:
        raise UserError(f"encoder: {path}: {e.strerror or e}; give read permission, or copy it again") from e


def found(name: str) -> Files:
    """The files of the encoder in a folder: a model with its tokenizer, or `text_encoder` and `tokenizer` side by side.

    Raises:
        UserError: no folder, no model in it, no tokenizer, or weights that are not safetensors.
    """
    folder = Path(name).expanduser().absolute()
    if not folder.is_dir():
        raise UserError(
            f'encoder: {name}: no such folder; name "words", a folder with a model of transformers, or models:/NAME@ALIAS'
        )
    model = folder if _is_model(folder) else folder / "text_encoder"
    if not _is_model(model):
        raise UserError(
            f"encoder: {name}: is no text encoder (no config.json of a model); name a folder that `save_pretrained` wrote"
        )
    weights_of(model)
    # the second encoder of a pipeline, text_encoder_2, has its own
    own = model.name.replace("text_encoder", "tokenizer") if model.name.startswith("text_encoder") else "tokenizer"
    beside = (model, folder / "tokenizer", model.parent / own)
    tokenizer = next((each for each in beside if (each / "tokenizer.json").is_file()), None)
    if tokenizer is None:
        raise UserError(
            f"encoder: {name}: has no tokenizer.json; save its fast tokenizer there (`tokenizer.save_pretrained(folder)`)"
        )
    return Files(model, tokenizer)


def _is_model(folder: Path) -> bool:
    try:
        return "model_type" in json.loads((folder / "config.json").read_bytes())
    except (OSError, ValueError, TypeError):
        return False
