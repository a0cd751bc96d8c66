"""Clips of a source that follow each other without a hole, and so are one longer video."""

from collections.abc import Iterator, Mapping
from functools import reduce
from operator import and_
from typing import Any

import numpy as np

from longtake.datasets.compact import Rows

_TOUCHING = 1.5  # frames between two clips that follow each other without a hole
_EQUAL = ("source", "height", "width", "fps")
_NUMBERS = ("height", "width", "fps", "clip", "start_seconds", "frame_count")


def pasts(rows: Rows, shard: int, number: int, seconds: float) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """A clip and those that it follows, latest first, as (row number in the shard, row), until they reach `seconds` back."""
    row, reach = rows.row(shard, number), 0.0
    yield number, row
    while number and reach < seconds:
        before = rows.row(shard, number - 1)
        if not follows(before, row):
            return
        number, row = number - 1, before
        reach += row["frame_count"] / row["fps"]
        yield number, row


def reach_back(rows: Rows, seconds: float, usable: np.ndarray | None = None) -> np.ndarray:
    """(N,) bool for all rows: whether the clips that a clip follows reach `seconds` back from its start.

    Args:
        usable: (N,) bool; a clip that is not, for example one without latents, ends the past of others. None: all are.
    """
    out = np.empty(int(rows.counts.sum()), bool)
    for shard, (start, count) in enumerate(zip(rows.starts.tolist(), rows.counts.tolist(), strict=True)):
        table = rows.of(shard)
        facts = {name: table[name].to_numpy() for name in _NUMBERS}
        facts["source"] = table["source"].combine_chunks().dictionary_encode().indices.to_numpy()
        linked = np.zeros(count, bool)
        linked[1:] = follows({n: v[:-1] for n, v in facts.items()}, {n: v[1:] for n, v in facts.items()})
        if usable is not None:
            linked[1:] &= usable[start : start + count - 1]
        before = np.cumsum(facts["frame_count"], dtype=np.int64) - facts["frame_count"]
        first = np.maximum.accumulate(np.where(linked, 0, np.arange(count)))
        # in frames, which are integers: rounding must not decide
        out[start : start + count] = before - before[first] >= seconds * facts["fps"] - 1e-6
    return out


def follows(before: Mapping[str, Any], after: Mapping[str, Any]) -> Any:
    """Whether clips follow others without a hole, for two rows or for arrays of their values."""
    gap = after["start_seconds"] - before["start_seconds"] - before["frame_count"] / before["fps"]
    touching = (after["clip"] == before["clip"] + 1) & (abs(gap) <= _TOUCHING / after["fps"])
    return reduce(and_, (after[name] == before[name] for name in _EQUAL), touching)
