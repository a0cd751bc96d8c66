"""Captions of clips: what manifests say of a source, what a clip gets of it, and the record of a column of captions.

A source's annotations may have `caption` (a text), `captions` (a list of texts, or of objects with `text` and perhaps
`start`, `end`, `language` and `source`) and `shots` (a list of objects like those, or of [start, end, text]). Seconds are
those of the source, and are cut to each clip. Null is no caption; an empty text is one.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from longtake.datasets import index, record, schema, storage
from longtake.datasets.annotations import rows_of
from longtake.datasets.errors import UserError

NAMES = ("caption", "captions", "shots")  # of annotations that are captions

_FIELDS = frozenset(("text", "start", "end", "language", "source"))
_PLACES = 3  # digits of seconds behind the point
_ROUNDING = 0.0015  # seconds that rounding may take from a span
_WORD = re.compile(r"\w+")
_SMALL = frozenset(
    ("a", "an", "and", "are", "as", "at", "by", "for", "from", "in", "into", "is", "it", "its", "of", "on", "or", "that",
     "the", "then", "to", "while", "with")
)  # fmt: skip


class Caption(NamedTuple):
    """A text about a clip, or about a part of it."""

    text: str
    start: float | None = None  # seconds in the clip; None: from its start
    end: float | None = None  # None: to its end
    language: str | None = None
    source: str = "manifest"  # who made it: "manifest", "shots", or a captioner's name


def sha_of(text: str) -> str:
    """The name of a text: 32 hex digits of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:32]


# What the annotations of a source say.


def of_source(columns: Mapping[str, Any]) -> list[Caption]:
    """The captions in one row of annotations, with the seconds of the source.

    Raises:
        ValueError: a value that is no caption; begins with the name of its column.
    """
    found = []
    caption = columns.get("caption")
    if caption is not None:
        if not isinstance(caption, str):
            raise ValueError(f"caption: {_short(caption)} is no text")
        found.append(Caption(caption))
    for name, source in (("captions", "manifest"), ("shots", "shots")):
        for number, entry in enumerate(_listed(columns.get(name), name), 1):
            try:
                found.append(_caption(entry, source, timed=name == "shots"))
            except ValueError as e:
                raise ValueError(f"{name}: entry {number}: {e}") from e
    for one in found:
        for text in (one.text, one.language or "", one.source):
            try:
                text.encode()
            except UnicodeEncodeError as e:
                raise ValueError(f"caption: {ascii(text)[:80]} has half a character, which UTF-8 cannot hold") from e
    return found


def _listed(value: Any, name: str) -> Sequence[Any]:
    """A list of captions; in a cell of CSV it is JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as e:
            raise ValueError(f"{name}: {_short(value)} is no list in JSON") from e
    if value is None:
        return []
    if not isinstance(value, list | tuple):
        raise ValueError(f"{name}: {_short(value)} is no list")
    return value


def _caption(entry: Any, source: str, timed: bool) -> Caption:
    if timed and isinstance(entry, list | tuple) and len(entry) == 3:
        entry = dict(zip(("start", "end", "text"), entry, strict=True))
    if isinstance(entry, str) and not timed:
        entry = {"text": entry}
    if not isinstance(entry, Mapping):
        raise ValueError(
            f"{_short(entry)} is no {'[start, end, text] and no object' if timed else 'text and no object'}"
        )
    if unknown := entry.keys() - _FIELDS:
        raise ValueError(f"unknown {', '.join(sorted(unknown))}; there are text, start, end, language and source")
    text, language = entry.get("text"), entry.get("language")
    maker = entry.get("source")
    if not isinstance(text, str):
        raise ValueError(f"its text is {_short(text)}, no text")
    if not all(value is None or isinstance(value, str) for value in (language, maker)):
        raise ValueError("its language and its source are texts")
    start, end = (_seconds(entry.get(name), name) for name in ("start", "end"))
    if timed and (start is None or end is None):
        raise ValueError("a shot needs its start and its end")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"it ends at {end:g} s, and starts at {start or 0.0:g} s")
    return Caption(text, start, end, language, source if maker is None else maker)


def _seconds(value: Any, name: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
        raise ValueError(f"its {name} is {_short(value)}, no seconds")
    return float(value)


def _short(value: Any) -> str:
    return ascii(value)[:80]


def of_annotations(annotations: str | None) -> list[Caption]:
    """The captions of a source that several rows of manifests may name, each once. Raises ValueError: see `of_source`."""
    found = dict.fromkeys(caption for row in rows_of(annotations) for caption in of_source(row))
    return list(found)


def digest_of(captions: Sequence[Caption]) -> str:
    """A digest of the captions in a source's annotations; "" without any."""
    return hashlib.sha256(json.dumps(captions).encode()).hexdigest()[:16] if captions else ""


def of_clip(captions: Sequence[Caption], start: float, seconds: float, frame: float = 0.0) -> list[Caption]:
    """The captions of a source that are about a clip of it, `start` seconds into the source, with the seconds of the clip.

    A span that is only partly in the clip is cut to it. One that covers it all is as long as the clip, without seconds. One
    that reaches into it by less than a `frame`, in seconds, is not about it: no frame shows it.
    """
    cut = (_cut(caption, start, seconds, frame) for caption in captions)
    return list(dict.fromkeys(caption for caption in cut if caption is not None))


def _cut(caption: Caption, start: float, seconds: float, frame: float) -> Caption | None:
    if caption.start is None and caption.end is None:
        return caption
    first = start if caption.start is None else caption.start
    last = start + seconds if caption.end is None else caption.end
    # before rounding, which may move a span of the next shot into this one
    overlap = min(last, start + seconds) - max(first, start)
    reaches_in = first < start or last > start + seconds
    if overlap <= 0 or (reaches_in and overlap < min(frame, seconds) - _ROUNDING):
        return None
    begin = max(0.0, round(first - start, _PLACES))
    end = seconds if caption.end is None else min(seconds, round(last - start, _PLACES))
    if begin >= end:
        return None
    whole = begin == 0.0 and end == seconds
    return caption._replace(start=None, end=None) if whole else caption._replace(start=begin, end=end)


# A column, and its record.


def rows_to_captions(value: Sequence[Mapping[str, Any]] | None) -> list[Caption]:
    """The captions in a row of a column."""
    return [Caption(**each) for each in value or ()]


def row_of(
    base: Mapping[str, Any], captions: Sequence[Caption], reason: str | None, annotations: str
) -> dict[str, Any]:
    """A row of schema.CAPTION_INDEX for a row of the base shard; the reason counts only without captions."""
    return {
        "key": base["key"],
        "base_sha256": base["sha256"],
        "captions": [caption._asdict() for caption in captions] or None,
        "reason": None if captions else reason,
        "annotations": annotations,
    }


@dataclass(frozen=True)
class Captions:
    """A column of captions."""

    dataset: str  # URL
    column: str  # for `Loader(columns=...)`: "caption-DIGEST"
    captioner: Mapping[str, Any]  # what made those that the manifest lacks: model, prompt, frames ...; empty: nothing
    view: str | None  # URL; only for the clips that it keeps others were made
    digests: Mapping[str, str]  # of the splits' base shards when this was written (see `compact.Rows`)
    counts: Mapping[
        str, int
    ]  # clips, clips_without, captions, captions by source as source/NAME, reasons as reason/NAME


def write_captions(uri: str, captions: Captions) -> None:
    record.write(uri, "captions", asdict(captions))


def read_captions(uri: str) -> Captions:
    """The record that a `caption` stage has written. Raises UserError, Failure: see `record.read`."""
    return record.read(uri, "captions", "caption", Captions)


def problems(dataset: str, shard: index.Shard) -> Iterator[str]:
    """A line for each contradiction in a shard of captions."""
    url = storage.join(dataset, shard.split, f"{shard.name}.parquet")
    remedy = "delete it and run its `caption` stage again"
    if shard.table.schema.remove_metadata() != schema.CAPTION_INDEX:
        yield f"{url}: not a table of captions; {remedy}"
        return
    for row in shard.table.to_pylist():
        captions = row["captions"]
        if (captions is None) == (row["reason"] is None) or captions == []:
            yield f"{url}: {row['key']}: has neither captions nor a reason, or both; {remedy}"
        for one in captions or ():
            start, end = one["start"], one["end"]
            if one["text"] is None or one["source"] is None or not (start or 0.0) < (math.inf if end is None else end):
                yield f"{url}: {row['key']}: a caption without text or maker, or that ends before it starts; {remedy}"


# All captions of a dataset, to look at.


def columns_of(dataset: str) -> list[str]:
    """The names of a dataset's columns of captions, whole or not."""
    stems = (
        name.removesuffix(".parquet").partition(".")[2]
        for split in schema.SPLITS
        for name in index.table_names(storage.join(dataset, split))
    )
    return sorted({stem for stem in stems if stem.startswith("caption-")})


def of_key(dataset: str, split: str, shard: str, key: str) -> dict[str, Any]:
    """The captions of one clip in each column, or the reason why it has none."""
    found = {}
    for column in columns_of(dataset):
        if f"{shard}.{column}" in index.shard_names(dataset, split, column):
            for row in index.read_shard(dataset, split, f"{shard}.{column}").table.to_pylist():
                if row["key"] == key:
                    found[column] = row["reason"] if row["captions"] is None else row["captions"]
    return found


@dataclass(frozen=True)
class Overview:
    """What a column says, in numbers."""

    clips: int
    without: int  # clips that have no captions
    reasons: Counter[str]  # of those, by the code of the reason
    makers: Counter[str]  # captions by who made them
    sources: dict[str, tuple[int, int]]  # clips and clips without captions of each source, by its URI
    words: Counter[str]  # how many captions have a word, small words of English left out


def overview(dataset: str, column: str) -> Overview:
    """Raises UserError where the dataset has no such column."""
    if column not in columns_of(dataset):
        there = ", ".join(columns_of(dataset)) or "none; run a `caption` stage"
        raise UserError(f"{dataset}: no column {column}; there are {there}")
    reasons, makers, words, clips, without = (Counter[str]() for _ in range(5))
    for split in schema.SPLITS:
        for shard in index.read_shards(dataset, split, column):
            for row in shard.table.to_pylist():
                source = row["key"].rpartition("-")[0]
                clips[source] += 1
                if row["captions"] is None:
                    without[source] += 1
                    reasons[row["reason"].partition(":")[0]] += 1
                for caption in row["captions"] or ():
                    makers[caption["source"]] += 1
                    words.update(_words(caption["text"]))
    uris = {row["source"]: row["uri"] for row in index.read_sources(dataset).to_pylist() if row["status"] == "good"}
    sources = {uris.get(source, source): (count, without[source]) for source, count in clips.items()}
    return Overview(clips.total(), without.total(), reasons, makers, sources, words)


def _words(text: str) -> set[str]:
    return set(_WORD.findall(text.casefold())) - _SMALL
