"""A view: which clips of a dataset to use and why not the others. Writing one decodes nothing."""

import operator
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa

from longtake.datasets import index, schema, storage
from longtake.datasets.errors import UserError

_COMPARE = {"min": ("<", operator.lt), "max": (">", operator.gt)}


def threshold(table: pa.Table, rules: Mapping[str, Mapping[str, float]]) -> list[str | None]:
    """The reason why each row of an index is dropped, None where it is kept.

    Args:
        rules: `{column: {"min": a, "max": b}}`, either bound optional; the first broken rule is the reason.
    """
    reasons: list[str | None] = [None] * len(table)
    for column, bounds in rules.items():
        values = np.asarray(table[column], dtype=np.float64)
        for bound, limit in bounds.items():
            sign, broken = _COMPARE[bound]
            for row in np.flatnonzero(broken(values, limit)):
                reasons[row] = reasons[row] or f"{column} {sign} {limit:g}"
    return reasons


def rows(split: str, keys: Sequence[str], reasons: Sequence[str | None]) -> pa.Table:
    return index.rows_table(
        (
            {"key": k, "split": split, "keep": r is None, "reason": r, "weight": 1.0}
            for k, r in zip(keys, reasons, strict=True)
        ),
        schema.VIEW,
    )


def read_view(url: str) -> pa.Table:
    """Raises UserError where there is no such view."""
    if not storage.exists(url):
        raise UserError(f"{url}: no such view; run its `curate` stage")
    return index.from_parquet(url)


def kept_keys(view: pa.Table, split: str) -> pa.Array:
    mask = np.asarray(view["keep"]) & (np.asarray(view["split"]) == split)
    return view["key"].filter(pa.array(mask))
