"""A view: which clips of a dataset to use, and why the others are left out. Writing one decodes nothing."""

import hashlib
import json
import operator
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longtake.datasets import index, schema, storage
from longtake.datasets.compact import Rows
from longtake.datasets.errors import Failure, UserError

_DIGESTS, _COLUMNS = b"longtake.shards", b"longtake.columns"
_COMPARE = {"min": ("<", operator.lt), "max": (">", operator.gt)}


def broken(table: pa.Table, rules: Mapping[str, Mapping[str, float]]) -> Iterator[tuple[str, np.ndarray]]:
    """For each bound its reason and (N,) bool, the rows that break it. A row without the score breaks none.

    Args:
        rules: `{column: {"min": a, "max": b, "min_percentile": c, "max_percentile": d}}`, each bound optional;
            percentiles are 0..100, of the table's rows.
    """
    for column, bounds in rules.items():
        values = np.asarray(table[column], dtype=np.float64)
        scores = values[~np.isnan(values)]
        for bound, limit in bounds.items():
            kind, _, percentile = bound.partition("_")
            sign, breaks = _COMPARE[kind]
            if not percentile:
                yield f"{column} {sign} {limit:g}", breaks(values, limit)
            elif len(scores):
                value = np.percentile(scores, limit)
                yield f"{column} {sign} {value:.4g} (percentile {limit:g})", breaks(values, value)


def rows(
    split: str | pa.ChunkedArray,
    keys: Sequence[str] | pa.ChunkedArray,
    reasons: Sequence[str | None] | np.ndarray,
    weights: np.ndarray | None = None,
) -> pa.Table:
    """A view of N clips, which keeps those without a reason.

    Args:
        split: one for all clips, or one for each.
        weights: (N,) how often a kept clip should be seen, against a mean of 1; None gives all the same.
    """
    why = pa.array(reasons, pa.string())
    columns = {
        "key": keys,
        "split": pa.repeat(split, len(keys)) if isinstance(split, str) else split,
        "keep": pc.is_null(why),
        "reason": why,
        "weight": np.ones(len(keys)) if weights is None else weights,
    }
    return pa.table(columns, schema.VIEW)


def address(dataset: str, named: str) -> str:
    """The URL of a view that is named by it, or by the name of a view beside the dataset's shards.

    Raises:
        UserError: no view of the dataset has this name.
    """
    if "/" in named or named.endswith(".parquet"):
        return named
    folder = storage.join(dataset, "views")
    names = [name.removesuffix(".parquet") for name in index.table_names(folder)]
    if named not in names:
        raise UserError(f"{dataset}: no view {named}; there are {', '.join(names) or 'none, run a `curate` stage'}")
    return storage.join(folder, f"{named}.parquet")


def read_view(url: str) -> pa.Table:
    """Raises UserError where there is no such view."""
    if not storage.exists(url):
        raise UserError(f"{url}: no such view; run its `curate` stage")
    return index.from_parquet(url)


def write(url: str, table: pa.Table, digests: Mapping[str, str], columns: Mapping[str, str] | None = None) -> None:
    """Save a view.

    Args:
        table: made by `rows`.
        digests: the digest of a split's shards (see `compact.Rows`), for each split whose rows are in the order of its
            shards; readers need not match these by key.
        columns: of scores that it stands on, by the names of their scorers.
    """
    metadata = {_DIGESTS: json.dumps(digests).encode()}
    if columns:
        metadata[_COLUMNS] = json.dumps(columns, sort_keys=True).encode()
    storage.write(url, index.to_parquet(table.replace_schema_metadata(metadata)))


def stood_on(url: str) -> dict[str, str]:
    """The columns of scores that decided a view, by the names of their scorers.

    Raises:
        UserError: there is no such view.
        Failure: it is damaged.
    """
    try:
        return dict(json.loads((read_view(url).schema.metadata or {}).get(_COLUMNS, b"{}")))
    except (ValueError, TypeError) as e:
        raise Failure(f"{url}: does not say what it stands on ({e}); run its `curate` stage again") from e


def of_split(url: str, split: str, digest: str) -> tuple[pa.Table, str]:
    """The columns `keep` and `weight` of a split's rows in the order of its shards, and the view's own digest.

    Where the view was made of other shards, there is a column `key` to match its rows by.
    """
    try:
        data = storage.read(url)
        file = pq.ParquetFile(pa.BufferReader(data))
    except FileNotFoundError as e:
        raise UserError(f"{url}: no such view; run its `curate` stage") from e
    except (pa.ArrowException, OSError) as e:
        raise Failure(f"{url}: not a readable Parquet file ({e}); run its `curate` stage again") from e
    aligned = json.loads((file.schema_arrow.metadata or {}).get(_DIGESTS, b"{}")).get(split) == digest
    table = file.read(["split", "keep", "weight", *([] if aligned else ["key"])])
    return table.filter(pc.equal(table["split"], split)).drop_columns("split"), hashlib.sha256(data).hexdigest()


def kept(base: Rows, url: str | None) -> tuple[np.ndarray, np.ndarray | None, str]:
    """(N,) bool, the rows of a split that a view keeps, their weights if they differ, and the view's digest; None keeps all."""
    total = int(base.counts.sum())
    if url is None:
        return np.ones(total, bool), None, ""
    table, digest = of_split(url, base.split, base.digest)
    if "key" in table.column_names:
        # there are new clips, or the view was written by hand: match by key
        parts = [base.of(n).select(["key"]) for n in range(len(base.shards))]
        keys = pa.concat_tables([schema.VIEW.empty_table().select(["key"]), *parts])["key"]
        table = table.take(pc.index_in(keys, table["key"].combine_chunks()))
    keep = table["keep"].fill_null(False).to_numpy().astype(bool)
    weights = table["weight"].fill_null(0).to_numpy().astype(np.float64)
    alike = bool((weights[keep] == 1).all())
    return keep & (weights > 0), None if alike else weights, digest
