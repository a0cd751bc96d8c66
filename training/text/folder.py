"""Text encoders in the registry: the files of a folder that are registered, and the folder of one that is."""

import json
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets.errors import UserError
from longtake.datasets.text import TextConfig
from longtake.training.models import kind_of
from longtake.training.registry import cache, disk
from longtake.training.text.files import Files, found

KIND = "text_encoder"  # in config.json


class Registered(NamedTuple):
    """An encoder of the registry on this machine: the version that was named, and its folder."""

    uri: str
    folder: Path


def pulled(uri: str) -> Registered:
    """The encoder that a URI of the registry names, fetched if it is not here.

    Raises:
        UserError: there is no such model, or it is no text encoder.
        Failure: as `cache.pull`.
    """
    try:
        folder = cache.pull(uri)
    except UserError as e:
        raise UserError(f"encoder: {e}") from e
    content = disk.read_config(folder)
    if content["model"] != KIND:
        raise UserError(
            f"encoder: {uri}: is a {kind_of(content).what}, and no text encoder; register one by `longtake models import`"
        )
    return Registered(cache.version_of(uri), folder)


def checked(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What is said of the encoder in a folder, and its files by their names in the registry. Raises as `load_encoder`.

    Model and tokenizer stay in one folder if they are, since a tokenizer may be told what it is by the model's config.
    """
    from longtake.training.text.encoder import load_encoder

    encoder = load_encoder(TextConfig(encoder=str(folder), precision="bf16"))  # in half the memory, to look at it
    files = found(str(folder))
    config = json.loads((files.model / "config.json").read_bytes())
    return {"model_type": config["model_type"], "width": encoder.width}, _names(files)


def _names(files: Files) -> dict[str, Path]:
    tokenizer = "text_encoder" if files.tokenizer == files.model else "tokenizer"
    model = {f"text_encoder/{path.relative_to(files.model)}": path for path in files.of_model()}
    return model | {f"{tokenizer}/{path.name}": path for path in files.of_tokenizer()}
