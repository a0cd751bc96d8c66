"""Columns of captions and of texts as their stages write them, without Ray, by an encoder that needs no package."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from longtake.datasets import captions, compact, index, schema, storage, view
from longtake.datasets import text as records
from longtake.datasets.captions import Caption, Captions
from longtake.pipeline import text
from longtake.pipeline.column import by_shard

COLUMN = "caption-test"
TEXT, TEXTS = "text-0123456789abcdef", "text-test"
WIDTH, LIMIT = 8, 6

Said = Callable[[str], Sequence[Caption] | None]


def describe(dataset: str, said: Said | Mapping[str, Sequence[Caption] | None], column: str = COLUMN) -> None:
    """Commit the captions of all clips, given by their keys."""
    of = said if callable(said) else said.get
    for split in schema.SPLITS:
        for base in index.read_shards(dataset, split):
            rows = [captions.row_of(row, of(row["key"]) or (), "none", "") for row in base.table.to_pylist()]
            index.write_table(storage.join(dataset, split, f"{base.name}.{column}.parquet"), rows, schema.CAPTION_INDEX)


def record(folder: Path, dataset: str, column: str = COLUMN) -> str:
    """The output of the stage that has made them."""
    digests = {split: compact.open_split(dataset, split)[0].digest for split in schema.SPLITS}
    captions.write_captions(str(folder), Captions(dataset, column, {}, None, digests, {}))
    return str(folder)


def keys(dataset: str) -> list[str]:
    """Of all clips, in the order of the splits and their shards."""
    return [row["key"] for split in schema.SPLITS for row in index.read_all(dataset, split).to_pylist()]


class Counting:
    """A token for each word, and one before the first, with states drawn from the word; keeps what it is given."""

    width, limit, digest = WIDTH, LIMIT, "counting"

    def __init__(self) -> None:
        self.seen: list[str] = []
        self.batches: list[list[str]] = []

    def describe(self) -> dict[str, Any]:
        return records.TextConfig(length=self.limit).model_dump(mode="json")

    def count(self, texts: Sequence[str]) -> list[int]:
        return [1 + len(one.split()) for one in texts]

    def encode(self, texts: Sequence[str], device: str = "cpu") -> list[torch.Tensor]:
        self.seen += texts
        self.batches.append(list(texts))
        return [self.states(one) for one in texts]

    def states(self, one: str) -> torch.Tensor:
        return torch.stack([self._state(word) for word in ["", *one.split()][: self.limit]])

    def _state(self, word: str) -> torch.Tensor:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:4])
        return torch.randn(self.width, generator=torch.Generator().manual_seed(seed)).to(torch.bfloat16)


def encode(
    dataset: str,
    encoder: Any,
    kept: str | None = None,
    batch: int = 3,
    elsewhere: Mapping[str, Any] | None = None,
    column: str = TEXT,
) -> dict[str, int]:
    """What the stage does with the shards that lack texts, in this process and in turn. Returns the sums of counts."""
    work = text.Work(dataset, column, COLUMN, batch)
    totals: dict[str, int] = {}
    for split in schema.SPLITS:
        base = compact.open_split(dataset, split)[0]
        keeps = by_shard(base, view.kept(base, kept)[0])
        for job in text.missing(dataset, split, column, COLUMN, keeps):
            made = text.make_text(encoder, work, split, job.name, keeps[job.name], elsewhere or {})
            totals = {name: totals.get(name, 0) + value for name, value in made.items()}
    return totals


def states(dataset: str, column: str = TEXT) -> dict[str, list[torch.Tensor] | None]:
    """The states of each caption of each clip, by its key, as numpy reads the tar's members."""
    found: dict[str, list[torch.Tensor] | None] = {}
    for split in schema.SPLITS:
        for shard in index.read_shards(dataset, split, column):
            tar = Path(storage.join(dataset, split, f"{shard.name}.tar")).read_bytes()
            for row in shard.table.to_pylist():
                entries = row["texts"]
                found[row["key"]] = None if entries is None else [_loaded(tar, entry) for entry in entries]
    return found


def _loaded(tar: bytes, entry: Mapping[str, Any]) -> torch.Tensor:
    import io

    bits = np.load(io.BytesIO(tar[entry["offset"] : entry["offset"] + entry["size"]]), allow_pickle=False)
    return torch.from_numpy(bits).view(torch.bfloat16)


def colours(number: int) -> Sequence[str]:
    """Two captions for even clips, one for odd ones, and none for every fifth."""
    if number % 5 == 4:
        return ()
    return ("a red square", "red") if number % 2 == 0 else ("a blue circle moves left",)


def column(
    folder: Path,
    dataset: str,
    say: Callable[[int], Sequence[str]] = colours,
    encoder: Any = None,
    name: str = TEXTS,
    **changes: Any,
) -> str:
    """What `caption` and `cache_text` make of a dataset by an encoder, or a `Counting`; returns the record's folder.

    `say` gives the captions of a clip by its number in its shard. `name` is that of the column. `changes` are of the record.
    """
    encoder, shards = encoder or Counting(), [s for split in schema.SPLITS for s in index.read_shards(dataset, split)]
    keys = [(number, key) for shard in shards for number, key in enumerate(shard.table["key"].to_pylist())]
    describe(dataset, {key: [Caption(one) for one in say(number)] for number, key in keys})
    encode(dataset, encoder, column=name)
    made: dict[str, Any] = {
        "dataset": storage.absolute(dataset),
        "column": name,
        "encoder": encoder.describe() | {"digest": encoder.digest, "width": encoder.width},
        "captions": COLUMN,
        "view": None,
        "digests": {split: compact.open_split(dataset, split)[0].digest for split in schema.SPLITS},
        "captions_digests": {},
        "counts": {},
    }
    records.write_text(str(folder), records.Text(**made | changes), encoder.encode([""])[0])
    return str(folder)
