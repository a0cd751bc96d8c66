"""The differences between two datasets, from their indexes alone."""

from collections.abc import Iterator, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import compact, index, schema


def differences(a: str, b: str) -> dict[str, list[str]]:
    """`{kind of difference: a line for each}`, empty where both hold the same sources and the same clips.

    Clips are the same when split, key and the sha256 of their bytes are. Sources are the same when their content is, under
    any URI. Views and cache columns do not count.

    Raises:
        UserError: one of the two is no dataset.
        Failure: an index is damaged.
    """
    descriptions = [dict(_flat(index.describe(url))) for url in (a, b)]
    sources = [_sources(url) for url in (a, b)]
    clips = [_clips(url) for url in (a, b)]
    lines_of = {
        "settings": _changed(*descriptions),
        "sources only in A": _only(*sources),
        "sources only in B": _only(*reversed(sources)),
        "sources with another outcome": _pairs(*sources),
        "clips only in A": _only(*clips),
        "clips only in B": _only(*reversed(clips)),
        "clips of other bytes": _pairs(*clips),
        "counts": _changed(*(dict(_flat(index.summary(url))) for url in (a, b))),
    }
    return {kind: lines for kind, lines in lines_of.items() if lines}


def _sources(dataset: str) -> pa.Table:
    """`key`: split and identity; `value`: status, reason and clips."""
    table = index.read_sources(dataset)
    table = table.filter(pc.is_null(table["duplicate_of"]))
    outcome = [table["status"], pc.fill_null(table["reason"], ""), pc.cast(table["clips"], pa.string())]
    return pa.table(
        {
            "key": pc.binary_join_element_wise(table["split"], table["source"], " "),
            "value": pc.binary_join_element_wise(*(pc.fill_null(column, "") for column in outcome), " "),
        }
    )


def _clips(dataset: str) -> pa.Table:
    """`key`: split and key; `value`: sha256 of the clip's bytes."""
    tables = [(split, compact.table(dataset, split)) for split in schema.SPLITS]
    return pa.concat_tables(
        pa.table({"key": pc.binary_join_element_wise(split, t["key"], " "), "value": t["sha256"]})
        for split, t in tables
    )


def _only(one: pa.Table, other: pa.Table) -> list[str]:
    return one["key"].filter(pc.invert(pc.is_in(one["key"], other["key"]))).to_pylist()


def _pairs(one: pa.Table, other: pa.Table) -> list[str]:
    """Keys that both have, with different values."""
    others = other["value"].take(pc.index_in(one["key"], other["key"]))
    changed = pc.fill_null(pc.not_equal(one["value"], others), False)
    rows = zip(*(column.filter(changed).to_pylist() for column in (one["key"], one["value"], others)), strict=True)
    return [f"{key}: {value} | {other_value}" for key, value, other_value in rows]


def _changed(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    keys = [key for key in sorted(a.keys() | b.keys()) if a.get(key) != b.get(key)]
    return [f"{key}: {a.get(key, 'none')} | {b.get(key, 'none')}" for key in keys]


def _flat(value: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """`{"clip": {"fps": 8}}` as `("clip.fps", 8)`."""
    for key, inner in value.items():
        if isinstance(inner, Mapping):
            yield from _flat(inner, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", inner
