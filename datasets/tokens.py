"""The record of a column of tokens: ids of codes, of windows that were encoded by themselves, and how codes are used."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np

from longtake.datasets import index, record, storage
from longtake.datasets.errors import Failure
from longtake.datasets.latents import state_digest

PREFIX = "tokens-"  # of the names of these columns

Of = Literal["video", "audio"]
NO_SOUND = -1  # stands for the tokens of sound where a clip has none
_HEADER = 128  # bytes before the data in a .npy of these shapes


@dataclass(frozen=True)
class Tokens:
    """A column of tokens. `usage` and `entropy` are those of the train split, without clips that have no sound."""

    dataset: str  # URL
    column: str  # for `Loader(columns=...)`: "tokens-DIGEST"
    model: Mapping[str, Any]  # `uri` of a version, its `digest` and its `config`
    codes: int  # ids are below
    frames: int  # in a window
    stride: int  # every `stride`-th frame of a clip is in its windows
    hop: int  # frames of a clip from a window's first to the next one's
    size: tuple[int, int]  # (height, width) of the video that was encoded
    shape: tuple[int, int, int]  # (t, h, w) of a window
    view: str | None  # URL; only the clips that it keeps have tokens
    digests: Mapping[str, str]  # of the splits' base shards when this was written (see `compact.Rows`)
    usage: float  # share of the codes that occur
    entropy: float  # bits a token, of the codes' frequencies
    of: Of = "video"  # of the same windows


def write_tokens(uri: str, tokens: Tokens) -> None:
    record.write(uri, "tokens", asdict(tokens))


def read_tokens(uri: str) -> Tokens:
    """The record that a `cache_tokens` stage has written. Raises UserError, Failure: see `record.read`."""
    return record.read(uri, "tokens", "cache_tokens", Tokens)


def model_digest(model: Any) -> str:
    """A digest of a torch module that makes tokens, and of its config: padding, for one, is no parameter.

    What its training has recomputed decides no token.
    """
    config = model.config.model_dump(mode="json", exclude={"activation_checkpointing"})
    return state_digest(json.dumps([type(model).__name__, config], sort_keys=True), model)


def dtype_of(codes: int, of: Of = "video") -> np.dtype[Any]:
    """The dtype of stored ids below `codes`; those of sound have `NO_SOUND` beside them."""
    if of == "audio":
        return np.dtype("<i2" if codes <= 1 << 15 else "<i4")
    return np.dtype("<u2" if codes <= 1 << 16 else "<u4")


# Statistics.


def statistics(counts: np.ndarray) -> tuple[float, float]:
    """The share of codes that occur and the entropy in bits, given how often each does. Raises ValueError where none does."""
    if not (total := int(counts.sum())):
        raise ValueError("no tokens")
    shares = counts[counts > 0] / total
    return float((counts > 0).mean()), float(-(shares * np.log2(shares)).sum())


def read_counts(dataset: str, shard: index.Shard) -> np.ndarray:
    """How often each code occurs in a shard of tokens, (codes,), by its notes. Raises Failure where they are damaged."""
    notes = index.read_notes(dataset, shard)
    return np.array(notes["counts"], np.int64)


def train_counts(record: Tokens) -> np.ndarray:
    """How often each code occurs in a column's train split, (codes,). Raises Failure where its notes are damaged."""
    shards = index.read_shards(record.dataset, "train", record.column)
    return sum((read_counts(record.dataset, shard) for shard in shards), np.zeros(record.codes, np.int64))


def read_silent(dataset: str, shard: index.Shard) -> int:
    """How many tokens in a shard stand for no sound. Raises as `read_counts`."""
    return int(index.read_notes(dataset, shard).get("silent", 0))


# Verification.


def problems(dataset: str, shard: index.Shard) -> Iterator[str]:
    """A line for each contradiction in the index of a shard of tokens."""
    url = storage.join(dataset, shard.split, f"{shard.name}.parquet")
    remedy = "delete it and run its `cache_tokens` stage again"
    try:
        total = 0
        for row in shard.table.to_pylist():
            tokens = row["windows"] * row["steps"] * row["height"] * row["width"]
            size = _HEADER + tokens * np.dtype(row["dtype"]).itemsize
            if row["size"] != size or len(row["window_crc32"]) != 4 * row["windows"]:
                yield f"{url}: {row['key']}: its size is not that of its windows; {remedy}"
                return
            total += tokens
        if total != read_counts(dataset, shard).sum() + read_silent(dataset, shard):
            yield f"{url}: its statistics are of another number of tokens; {remedy}"
    except (Failure, KeyError, TypeError, ValueError) as e:
        yield str(e) if isinstance(e, Failure) else f"{url}: not an index of tokens ({e}); {remedy}"
