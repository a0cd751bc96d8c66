"""What all encoders do with a text before its tokens, and the digest of what they do."""

import hashlib
import json
from collections.abc import Mapping, Sequence

from longtake.datasets.errors import UserError
from longtake.datasets.text import TextConfig
from longtake.training.text.cleaning import RULES

VERSION = 1  # raise it when the same files and settings would give other states

_PLACE = "{}"  # where the text stands in a template


def prepared(config: TextConfig, texts: Sequence[str]) -> list[str]:
    """The texts, cleaned and set into the template."""
    clean, template = RULES[config.clean], config.template
    cleaned = (clean(text) for text in texts)
    return list(cleaned) if template is None else [template.replace(_PLACE, text, 1) for text in cleaned]


def check_crop(config: TextConfig, tokens: int) -> None:
    """Raises UserError where `crop` is more than the `tokens` of an empty text in its template."""
    if config.crop > tokens:
        what = "an empty text" if config.template is None else "its template"
        raise UserError(f"crop: {config.crop}: {what} has {tokens} tokens; lower it")


def digest(config: TextConfig, model: str, files: Mapping[str, str]) -> str:
    """A digest of all that decides states: the settings but for the place of the files, the model's kind, its files' digests."""
    settings = config.model_dump(mode="json", exclude={"encoder"})
    record = json.dumps([VERSION, model, settings, dict(files)], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(record.encode()).hexdigest()
