"""Models of other libraries in the registry: their files as they are, below a config.json of ours that has their digests.

None of them is a module of ours. A new kind is a row of `FOREIGN`.
"""

import json
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets.errors import UserError
from longtake.training.foreign.folder import PIPELINE, is_foreign

TEXT_ENCODER, IMAGE_ENCODER = "text_encoder", "image_encoder"  # names in config.json, and of the folders of their files
PARTS = {TEXT_ENCODER: (TEXT_ENCODER, "tokenizer"), IMAGE_ENCODER: (IMAGE_ENCODER,)}  # their folders, in pipelines too
REFERENCE = "reference.json"  # names the folder of a pipeline that is registered where it lies
PICTURES = ("clip", "clip_vision_model")  # types of models of transformers that have CLIP's model of pictures


class Foreign(NamedTuple):
    """A kind of foreign model.

    what     noun for messages, and `one` with its article
    use      what such a model is for, and where it is named
    files    the names that its files have below config.json
    checked  name of the module whose `checked(folder)` returns what config.json says of a model, and its files by these
             names; UserError where the folder has no such model
    """

    what: str
    one: str
    use: str
    files: re.Pattern[str]
    checked: str


# name in config.json -> row
FOREIGN = {
    TEXT_ENCODER: Foreign(
        "text encoder",
        "a text encoder",
        "name it as the `encoder` of a `cache_text` stage",
        re.compile(r"(text_encoder|tokenizer)/\w[\w.-]*\.(safetensors|json)"),
        "longtake.training.text.candidate",
    ),
    IMAGE_ENCODER: Foreign(
        "image encoder",
        "an image encoder",
        "name it as the `image` or `embedder` of a `finetune_mavin` stage",
        re.compile(r"image_encoder/\w[\w.-]*\.(safetensors|json)"),
        "longtake.training.pictures.candidate",
    ),
    PIPELINE: Foreign(
        "pipeline",
        "a pipeline of another library",
        "name it as the `encoder` of a `cache_latents` or `cache_text` stage, as a `vae`, as the `base` of `finetune_backbone`,"
        " `pretrain_memory` or `finetune_memory_prior`, or as the model of `longtake generate`",
        re.compile(
            r"reference\.json|model_index\.json|[a-z]\w*/\w[\w.-]*\.(safetensors|json)|tokenizer\w*/\w[\w.-]*\.(txt|model|jinja)"
        ),
        "longtake.training.foreign.candidate",
    ),
}


def concerns(name: str, parts: Collection[str] | None) -> bool:
    """Whether a file, by its name below config.json, counts for these parts: weights of others do not; None are all parts."""
    part, _, file = name.rpartition("/")
    return parts is None or part in ("", *parts) or not file.endswith(".safetensors")


def check_ours(where: Path | str, content: Mapping[str, Any]) -> None:
    """Raise UserError where a config.json is that of a foreign model."""
    if row := FOREIGN.get(content["model"]):
        raise UserError(f"{where}: is {row.one}, and no model of videos; {row.use}")


def type_of(folder: Path) -> str | None:
    """The `model_type` in the config.json of a folder of transformers; None where there is none."""
    try:
        return str(json.loads((folder / "config.json").read_bytes())["model_type"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def kind_of_folder(folder: Path) -> str:
    """The kind of the model in a folder of another library; a text encoder where nothing says that it is another.

    A folder of CLIP's model of pictures alone is an image encoder, and so is one with `image_encoder` below it. A folder in
    the layout of diffusers is a pipeline, and so is one of its parts with a `_class_name`.

    Raises:
        UserError: it may be either, as a whole CLIP is, or a folder with both side by side.
    """
    if is_foreign(folder) or folder.suffix == ".safetensors":
        return PIPELINE
    kind = type_of(folder)
    if kind is not None:
        texts, pictures = kind != "clip_vision_model", kind in PICTURES
    else:
        texts, pictures = (type_of(folder / name) is not None for name in (TEXT_ENCODER, IMAGE_ENCODER))
    if texts and pictures:
        raise UserError(
            f"{folder}: has a model of texts and one of pictures; say which with --as {TEXT_ENCODER} or --as {IMAGE_ENCODER}"
        )
    return IMAGE_ENCODER if pictures else TEXT_ENCODER
