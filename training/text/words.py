"""The encoder "words": a packaged table of word embeddings, a vector a token whatever stands beside it.

It is the default since it needs nothing but an installed package of 19 MB (wordllama, MIT): no download, no folder, no GPU,
thousands of captions a second on a laptop. Its vocabulary is a real one of 32,000 word pieces, with embeddings of 256 values
that were made from those of large language models, so that words of one meaning are close. What it gives up is context: the
state of "left" is the same in every caption, and no state says where in the caption it stands.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from longtake.datasets.errors import UserError, not_installed
from longtake.datasets.networks import imported
from longtake.datasets.text import WORDS, TextConfig
from longtake.training.text import prompts
from longtake.training.text.files import digest_of

_PACKAGE = "wordllama"
_WEIGHTS, _TOKENIZER = "weights/l2_supercat_256.safetensors", "tokenizers/l2_supercat_tokenizer_config.json"
_LENGTH = 512


class Words:
    """The embeddings of a text's tokens, from a table."""

    def __init__(self, config: TextConfig) -> None:
        """Raises UserError: the package is not installed, or a setting asks for what a table does not have."""
        if config.layer != -1:
            raise UserError(f"layer: {config.layer}: the encoder {WORDS!r} has no layers; leave it out")
        if config.side != "right":
            raise UserError(f"side: {config.side}: the encoder {WORDS!r} has no padding; leave it out")
        folder = _folder()
        self.limit = config.length or _LENGTH
        self._config = config.model_copy(update={"length": self.limit, "precision": "fp32"})
        self._tokenizer = imported("tokenizers").Tokenizer.from_file(str(folder / _TOKENIZER))
        self._table = _table(folder / _WEIGHTS)
        self.width = self._table.shape[1]
        files = {name: digest_of(folder / name) for name in (_WEIGHTS, _TOKENIZER)}
        self.digest = prompts.digest(self._config, WORDS, files)
        prompts.check_crop(self._config, len(self._tokens([""])[0]))

    def encode(self, texts: Sequence[str], device: str = "cpu") -> list[Tensor]:
        kept = slice(self._config.crop, self._config.crop + self.limit)
        rows = [self._ends(ids)[kept] for ids in self._tokens(texts)]
        return [self._table[torch.tensor(ids)].to(torch.bfloat16) for ids in rows]

    def count(self, texts: Sequence[str]) -> list[int]:
        return [len(self._ends(ids)) - self._config.crop for ids in self._tokens(texts)]

    def describe(self) -> dict[str, Any]:
        return self._config.model_dump(mode="json")

    def _tokens(self, texts: Sequence[str]) -> list[list[int]]:
        found = self._tokenizer.encode_batch(prompts.prepared(self._config, texts))
        return [encoding.ids for encoding in found]

    def _ends(self, ids: list[int]) -> list[int]:
        """The tokens of a text, one at least after the crop: the last of the template where the text has none."""
        return ids if len(ids) > self._config.crop else [*ids, ids[-1]]


def _folder() -> Path:
    """Where the package is; it is not imported. Raises UserError where it is not installed, or is another version."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise not_installed(_PACKAGE, "text", f"encoder: {WORDS}")
    folder = Path(spec.submodule_search_locations[0])
    if missing := [name for name in (_WEIGHTS, _TOKENIZER) if not (folder / name).is_file()]:
        raise UserError(f"encoder: {WORDS}: {folder / missing[0]} is missing; pip install --force-reinstall {_PACKAGE}")
    return folder


def _table(path: Path) -> Tensor:
    from safetensors.torch import load_file

    (table,) = load_file(path).values()
    return table.float()
