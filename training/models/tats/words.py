"""Words of captions as tokens: byte pairs that are learned from a dataset's captions, whose embeddings a TATS learns itself.

They need no encoder beside the model, and know no word that the captions do not have: a prompt with another is refused. What
they give up against `cache_text` is all that a large encoder has read.
"""

from __future__ import annotations

import difflib
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from longtake.datasets import compact, view
from longtake.datasets.captions import Captions
from longtake.datasets.errors import UserError
from longtake.datasets.loader.split import open_columns
from longtake.datasets.networks import imported
from longtake.training.models.common.prompts import check_bytes
from longtake.training.text.cleaning import RULES

_UNKNOWN = "[unknown]"  # what stands for characters that no caption has
_MOST_KNOWN = 50_000  # words that a model knows: the commonest
_SUGGESTED = 5_000  # of which some are named to who asks for another


class Words:
    """A vocabulary of pieces of words, and how many of them a text may have.

    A word that no caption had is refused, though its pieces be known; so is one rarer than 50,000 others.

    size  of the vocabulary
    """

    def __init__(self, tokenizer: Mapping[str, Any], unseen: Sequence[int], known: Sequence[str], length: int) -> None:
        """`tokenizer` is its JSON; `unseen` the ids that no caption has; `known` the captions' words, the commonest first."""
        self._tokenizer = imported("tokenizers").Tokenizer.from_str(json.dumps(tokenizer))
        self._unseen, self._known, self._length = frozenset(unseen), dict.fromkeys(known), length
        self.size: int = self._tokenizer.get_vocab_size()

    @classmethod
    def learned(cls, texts: Sequence[str], size: int, length: int) -> Words:
        """The vocabulary of these captions, at most of this size. UserError where they have no word."""
        tokenizers = imported("tokenizers")
        tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(unk_token=_UNKNOWN))
        tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=size, special_tokens=[_UNKNOWN], show_progress=False, limit_alphabet=max(1, size // 2)
        )
        cleaned = sorted(map(_cleaned, texts))
        tokenizer.train_from_iterator(cleaned, trainer)
        found = Counter(number for encoding in tokenizer.encode_batch(cleaned) for number in encoding.ids)
        if not found:
            raise UserError("captions: have no word to learn; name others, or leave them out")
        unseen = [number for number in range(tokenizer.get_vocab_size()) if number and not found[number]]
        heard = Counter(word for text in cleaned for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
        known = [word for word, _ in heard.most_common(_MOST_KNOWN)]
        return cls(json.loads(tokenizer.to_str()), [0, *unseen], known, length)

    @classmethod
    def of(cls, facts: Mapping[str, Any], length: int) -> Words:
        """The words of a model, as its config.json has them."""
        return cls(facts["tokenizer"], facts["unseen"], facts["known"], length)

    def record(self) -> dict[str, Any]:
        """All of it as plain data, for config.json."""
        tokenizer = json.loads(self._tokenizer.to_str())
        return {"tokenizer": tokenizer, "unseen": sorted(self._unseen), "known": list(self._known)}

    def check(self, prompts: Sequence[str]) -> None:
        """UserError for a prompt with a word that no caption has, or with more tokens than the model takes."""
        check_bytes(prompts)
        for prompt in prompts:
            text = _cleaned(prompt)
            encoding = self._tokenizer.encode(text)
            words = self._tokenizer.pre_tokenizer.pre_tokenize_str(text)
            strange = next((word for word, _ in words if word not in self._known), None)
            if strange is not None or self._unseen & set(encoding.ids):
                known = list(islice(self._known, _SUGGESTED))
                near = difflib.get_close_matches(strange or text, known, 3, 0.5) or known[:5]
                raise UserError(
                    f"prompt {prompt[:40]!r}: no caption that this model has learned from has {(strange or text)[:40]!r};"
                    f" it knows words such as {', '.join(near)}"
                )
            if len(encoding.ids) > self._length:
                raise UserError(
                    f"prompt {prompt[:40]!r}: has {len(encoding.ids)} tokens, and {self._length} fit; shorten it"
                )

    def encoded(self, texts: Sequence[str | None]) -> tuple[Tensor, Tensor]:
        """The ids `(B, N, 1)` of texts, the first ones of a long one, and their mask `(B, N)`; None has none."""
        found = self._tokenizer.encode_batch([_cleaned(text or "") for text in texts])
        rows = [torch.tensor(encoding.ids[: self._length], dtype=torch.int64) for encoding in found]
        masks = [torch.ones(len(row), dtype=torch.bool) for row in rows]
        return pad_sequence(rows, batch_first=True)[..., None], pad_sequence(masks, batch_first=True)

    def states(self, prompts: Sequence[str | None], device: torch.device) -> tuple[Tensor, Tensor] | tuple[None, None]:
        """What `encoded` makes of prompts; None for both if all are None. Raises as `check`."""
        texts = [prompt for prompt in prompts if prompt is not None]
        if not texts:
            return None, None
        self.check(texts)
        ids, mask = self.encoded(prompts)
        return ids.to(device), mask.to(device)


def learned_from(inputs: Mapping[str, str], record: Captions) -> list[str]:
    """The captions of the training clips that a stage's view keeps."""
    base, _ = compact.open_split(inputs["dataset"], "train")
    rows = open_columns(base, {"caption": record.column}, None)[0].columns["caption"]
    keep, _, _ = view.kept(base, inputs.get("view"))
    clips = [clip for shard in range(len(rows.shards)) for clip in rows.of(shard)["captions"].to_pylist()]
    return [caption["text"] for clip, kept in zip(clips, keep, strict=True) if kept for caption in clip or ()]


def _cleaned(text: str) -> str:
    """A text as it is cut into tokens: entities resolved, white space collapsed, in lower case [paper]."""
    return RULES["wan"](text).lower()
