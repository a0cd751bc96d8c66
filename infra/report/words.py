"""The captions of a dataset on the page: under its clips, their most common words, and the sources that have fewest."""

from collections.abc import Mapping
from typing import Any

from longtake.datasets import captions, storage

_WORDS, _SOURCES = 60, 20
_TEXTS, _LETTERS = 3, 280  # of a clip


def columns(dataset: str) -> list[dict[str, Any]]:
    """What each column of captions says, in numbers."""
    return [_column(dataset, name) for name in captions.columns_of(dataset)]


def _column(dataset: str, name: str) -> dict[str, Any]:
    overview = captions.overview(dataset, name)
    words = sorted(overview.words.items(), key=lambda pair: (-pair[1], pair[0]))
    sources: list[dict[str, Any]] = [
        {"uri": storage.printable(uri), "clips": clips, "without": without, "share": without / clips}
        for uri, (clips, without) in overview.sources.items()
        if without
    ]
    return {
        "name": name,
        "clips": overview.clips,
        "without": overview.without,
        "reasons": overview.reasons.most_common(),
        "makers": overview.makers.most_common(),
        "words": words[:_WORDS],
        "words_all": len(words),
        "sources": sorted(sources, key=lambda row: (-row["without"], row["uri"]))[:_SOURCES],
        "sources_all": len(sources),
    }


def texts(dataset: str, row: Mapping[str, Any]) -> list[str]:
    """The captions of a clip for people to read: the first of each column, cut where they are long."""
    by_column = captions.of_key(dataset, row["split"], row["shard"], row["key"])
    said = [one["text"] for value in by_column.values() if not isinstance(value, str) for one in value]
    distinct = list(dict.fromkeys(" ".join(text.split()) or "(an empty caption)" for text in said))
    return [text if len(text) <= _LETTERS else f"{text[:_LETTERS]}…" for text in distinct[:_TEXTS]]
