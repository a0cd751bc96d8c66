"""Columns of captions and of texts for tests: an encoder of words that needs no package, and columns made without Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.datasets import captions, compact, index, schema, storage, text
from longtake.datasets.captions import Caption
from longtake.pipeline.text import Work, make_text

WIDTH, LIMIT = 12, 6
CAPTIONS, TEXTS = "caption-test", "text-test"

Say = Callable[[int], Sequence[str]]  # the captions of a clip by its number in its shard


class Words:
    """A token for each word, and one before the first; the state of a token is drawn from its word."""

    width, limit, digest = WIDTH, LIMIT, "words-of-tests"

    def describe(self) -> dict[str, Any]:
        return text.TextConfig(length=LIMIT).model_dump(mode="json")

    def count(self, texts: Sequence[str]) -> list[int]:
        return [1 + len(one.split()) for one in texts]

    def encode(self, texts: Sequence[str], device: str = "cpu") -> list[Tensor]:
        return [torch.stack([_state(word) for word in ["", *one.split()][:LIMIT]]) for one in texts]


def _state(word: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4])
    return torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def colours(number: int) -> Sequence[str]:
    """Two captions for even clips, one for odd ones, and none for every fifth."""
    if number % 5 == 4:
        return ()
    return ("a red square", "red") if number % 2 == 0 else ("a blue circle moves left",)


def column(folder: Path, dataset: str, say: Say = colours, **changes: Any) -> str:
    """What `caption` and `cache_text` make of a dataset; returns the record's folder. `changes` are of the record."""
    encoder, bases = Words(), {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    for split in schema.SPLITS:
        for shard in index.read_shards(dataset, split):
            table = shard.table.to_pylist()
            rows = [
                captions.row_of(row, [Caption(one) for one in say(number)], "nobody", "")
                for number, row in enumerate(table)
            ]
            url = storage.join(dataset, split, f"{shard.name}.{CAPTIONS}.parquet")
            index.write_index(url, rows, schema.CAPTION_INDEX, 0, "")
            work = Work(dataset, TEXTS, CAPTIONS, 4)
            make_text(encoder, work, split, shard.name, np.ones(len(table), bool), {})
    record: dict[str, Any] = {
        "dataset": storage.absolute(dataset),
        "column": TEXTS,
        "encoder": encoder.describe() | {"digest": encoder.digest, "width": WIDTH},
        "captions": CAPTIONS,
        "view": None,
        "digests": {split: base.digest for split, base in bases.items()},
        "captions_digests": {},
        "counts": {},
    }
    text.write_text(str(folder), text.Text(**record | changes), encoder.encode([""])[0])
    return str(folder)
