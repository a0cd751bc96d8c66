"""One shard of captions to one shard of token states: copy what is there already, encode the rest, commit. Plain functions.

Each distinct caption of a shard is encoded once, in batches that are formed inside the shard by length, then by sha. So the
bytes do not depend on who else is at work. States go to a spool as they come: memory holds one batch.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from isal import isal_zlib

from longtake.datasets import captions as spoken
from longtake.datasets import index, schema, storage
from longtake.datasets.errors import Failure
from longtake.datasets.text import PREFIX, Span, Stored, packed, rows_of, spans_of, stored
from longtake.pipeline import column as columns
from longtake.pipeline.commit import store_tar

Report = Callable[[int, str], None]

_COUNTED = 1024  # texts whose tokens are counted at once


def column_name(encoder: str, captions: str, view: str) -> str:
    """`text-DIGEST`, by the digests of the encoder and of the view ("" without one), and the column of captions."""
    record = json.dumps([encoder, captions, view], sort_keys=True)
    return f"{PREFIX}{hashlib.sha256(record.encode()).hexdigest()[:16]}"


@dataclass(frozen=True)
class Work:
    """What all shards of a column have in common."""

    dataset: str
    column: str
    captions: str  # the column of captions
    batch: int  # texts that are encoded together
    others: Sequence[str] = ()  # columns of other captions by the same encoder
    device: str = "cpu"

    def old_states(self, split: str, name: str) -> dict[str, Stored]:
        """Where states are of texts that a shard has now, in this column or in those of other captions."""
        found: dict[str, Stored] = {}
        for column in (*self.others, self.column):
            found |= old_states(self.dataset, split, f"{name}.{column}")
        return found


# What is missing.


def missing(dataset: str, split: str, column: str, captions: str, keeps: Mapping[str, np.ndarray]) -> list[columns.Job]:
    """The base shards that a column of texts lacks, or has from other clips or captions.

    Raises:
        Failure: a shard has no captions.
    """
    described = set(index.shard_names(dataset, split, captions))
    if absent := sorted(name for name in keeps if f"{name}.{captions}" not in described):
        raise Failure(f"{dataset} ({split}): {absent[0]} has no {captions}; run its `caption` stage again")

    def is_of(base: index.Shard, made: index.Shard) -> bool:
        said = index.read_shard(dataset, split, f"{base.name}.{captions}")
        return _is_of(dataset, base, made, said.rows_sha256)

    return list(columns.missing(dataset, split, column, keeps, is_of))


def _is_of(dataset: str, base: index.Shard, made: index.Shard, captions_sha256: str) -> bool:
    return columns.fits(base, made) and index.read_notes(dataset, made).get("captions_sha256") == captions_sha256


# A shard.


def make_text(
    encoder: Any,
    work: Work,
    split: str,
    name: str,
    keep: np.ndarray,
    elsewhere: Mapping[str, Stored],
    report: Report = lambda clips, position: None,
) -> dict[str, int]:
    """Encode the captions of one shard and commit them as a column's shard.

    Args:
        encoder: as `longtake.text_encoder` gives it.
        keep: (N,) bool, the clips whose captions are encoded.
        elsewhere: where states of texts are that several shards have.
        report: called with the number of clips that are done, and what is at work.

    Returns:
        Counts: `clips`, `texts` in the shard, `encoded` and `copied` of them, `texts_cut` and `tokens` in the shard,
        `bytes`.

    Raises:
        Failure: the captions are of other clips, or the base shard is another than before.
    """
    dataset, folder = work.dataset, storage.join(work.dataset, split)
    base = index.read_shard(dataset, split, name)
    said = index.read_shard(dataset, split, f"{name}.{work.captions}")
    if not columns.fits(base, said) or len(keep) != len(base.table):
        raise Failure(
            f"{dataset} ({split}): {name} has other clips than its captions or its view; run their stages again"
        )
    rows = [row if kept else [] for row, kept in zip(said.table["captions"].to_pylist(), keep.tolist(), strict=True)]
    spans = [spans_of(row) for row in rows]
    texts = {spoken.sha_of(one["text"]): one["text"] for row in rows for one in row or ()}

    done = work.old_states(split, name) | {s: elsewhere[s] for s in texts if s in elsewhere}
    with storage.spool_folder(folder) as spool:
        copied = {sha for sha in sorted(texts) if sha in done and copy(done[sha], spool / f"{sha}.npy")}
        tokens = {sha: done[sha].tokens for sha in copied}
        rest = {sha: text for sha, text in texts.items() if sha not in copied}
        for sha, count in encoded(encoder, rest, work, spool):
            tokens[sha] = count
            report(len(rows) * len(tokens) // (len(texts) + 1), f"text {len(tokens)} of {len(texts)}")
        cut = sum(count > encoder.limit for count in counted(encoder, [texts[sha] for sha in sorted(texts)]))
        notes = {"captions": work.captions, "captions_sha256": said.rows_sha256, "width": encoder.width}
        notes |= {"encoder": encoder.digest}
        notes |= {"texts": len(texts), "texts_cut": cut, "tokens": sum(tokens.values())}
        size = _commit(work, base, spans, tokens, spool, notes)
    facts = {"clips": len(rows), "texts": len(texts), "encoded": len(rest), "copied": len(copied), "bytes": size}
    return facts | {"texts_cut": cut, "tokens": sum(tokens.values())}


def old_states(dataset: str, split: str, name: str) -> dict[str, Stored]:
    """Where the states are of the texts that a shard of the column has now; empty where there is none, or it is damaged."""
    if not storage.exists(storage.join(dataset, split, f"{name}.parquet")):
        return {}
    with suppress(Failure, KeyError):
        return stored(dataset, index.read_shard(dataset, split, name))
    return {}


def others(dataset: str, column: str, encoder: str) -> list[str]:
    """The columns of texts of a dataset, but for `column`, that an encoder with this digest has made."""
    shards: dict[str, tuple[str, str]] = {}  # one of each column
    for split in schema.SPLITS:
        for name in storage.names(storage.join(dataset, split)):
            shard, _, ending = name.removesuffix(".parquet").partition(".")
            if name.endswith(".parquet") and ending.startswith(PREFIX) and ending != column:
                shards.setdefault(ending, (split, f"{shard}.{ending}"))

    def is_same(place: tuple[str, str]) -> bool:
        with suppress(Failure):
            return bool(index.read_notes(dataset, index.read_shard(dataset, *place)).get("encoder") == encoder)
        return False

    return sorted(other for other, place in shards.items() if is_same(place))


def copy(place: Stored, path: Path) -> bool:
    """Copy the .npy of a text to `path`; returns whether it is whole."""
    try:
        data = storage.read_range(place.tar, place.offset, place.size)
    except FileNotFoundError:
        return False
    if len(data) != place.size or isal_zlib.crc32(data) != place.crc32:
        return False
    path.write_bytes(data)
    return True


def encoded(encoder: Any, texts: Mapping[str, str], work: Work, spool: Path) -> Iterator[tuple[str, int]]:
    """Encode texts, given by their sha, into the spool; gives the sha of each and its number of tokens."""
    lengths = dict(zip(texts, counted(encoder, list(texts.values())), strict=True))
    shas = sorted(texts, key=lambda sha: (min(lengths[sha], encoder.limit), sha))
    for first in range(0, len(shas), work.batch):
        batch = shas[first : first + work.batch]
        for sha, states in zip(batch, encoder.encode([texts[sha] for sha in batch], work.device), strict=True):
            if not states.isfinite().all():
                raise Failure(f"{texts[sha][:80]!r}: its states are not finite; set `precision: fp32`")
            (spool / f"{sha}.npy").write_bytes(packed(states))
            yield sha, len(states)


def counted(encoder: Any, texts: Sequence[str]) -> list[int]:
    """The tokens of each text before it is cut."""
    parts = (texts[first : first + _COUNTED] for first in range(0, len(texts), _COUNTED))
    return [count for part in parts for count in encoder.count(part)]


def _commit(
    work: Work,
    base: index.Shard,
    spans: Sequence[Sequence[Span] | None],
    tokens: Mapping[str, int],
    spool: Path,
    notes: Mapping[str, Any],
) -> int:
    """Commit a shard; returns the bytes of its tar.

    One that another worker has committed meanwhile stays. The index of any other one is deleted first, so that no tar is
    read by it.
    """
    name = f"{base.name}.{work.column}"
    url = storage.join(work.dataset, base.split, name)
    if name in index.shard_names(work.dataset, base.split, work.column):
        there = index.read_shard(work.dataset, base.split, name)
        if _is_of(work.dataset, base, there, notes["captions_sha256"]):
            return there.tar_bytes
    fs, path = storage.filesystem(f"{url}.parquet")
    with suppress(FileNotFoundError):
        storage.retrying(path, partial(fs.rm_file, path))
    members = ((sha, {"npy": (spool / f"{sha}.npy").read_bytes()}) for sha in sorted(tokens))
    found, size, digest = store_tar(f"{url}.tar", members)
    places = {m.key: Stored(f"{url}.tar", m.offset, m.size, m.crc32, tokens[m.key]) for m in found}
    index.write_index(f"{url}.parquet", rows_of(base.table, spans, places), schema.TEXT_INDEX, size, digest, notes)
    return size
