"""A folder with a text encoder that is to be registered: what is said of it, and its files."""

import json
from pathlib import Path
from typing import Any

from longtake.datasets.networks import files_of
from longtake.datasets.text import TextConfig
from longtake.training.text.encoder import load_encoder
from longtake.training.text.files import Files, found


def checked(folder: Path) -> tuple[dict[str, Any], dict[str, Path]]:
    """What is said of the encoder in a folder, and its files by their names in the registry. Raises as `load_encoder`.

    Model and tokenizer stay in one folder if they are, since a tokenizer may be told what it is by the model's config.
    """
    encoder = load_encoder(TextConfig(encoder=str(folder), precision="bf16"))  # in half the memory, to look at it
    files = found(str(folder))
    config = json.loads((files.model / "config.json").read_bytes())
    return {"model_type": config["model_type"], "width": encoder.width}, _names(files)


def _names(files: Files) -> dict[str, Path]:
    tokenizer = "text_encoder" if files.tokenizer == files.model else "tokenizer"
    model = {f"text_encoder/{path.relative_to(files.model)}": path for path in files_of(files.model)}
    return model | {f"{tokenizer}/{path.name}": path for path in files.of_tokenizer()}
