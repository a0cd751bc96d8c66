"""Annotations that came after a shard was cut: DATASET/annotations/SPLIT-NNNNN.parquet, beside the shard of that name.

A corrected caption or an added label needs no decoding and moves no shard: our readers take the later annotations. The
tars themselves, and so other readers of WebDataset, keep those of the day they were cut.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longtake.datasets import index, storage
from longtake.datasets.annotations import OURS, label_of, of_sample
from longtake.datasets.errors import Failure

FOLDER = "annotations"
_SCHEMA = pa.schema([("source", pa.string()), ("uri", pa.string()), ("extra", pa.string())])


def shards(dataset: str, split: str) -> set[str]:
    """Names of the shards of a split that have later annotations."""
    stems = (name.removesuffix(".parquet") for name in index.table_names(storage.join(dataset, FOLDER)))
    return {stem.removeprefix(f"{split}-") for stem in stems if stem.startswith(f"{split}-")}


def read(dataset: str, split: str, shard: str) -> list[dict[str, Any]]:
    """A shard's sources with later annotations: `source`, `uri` and `extra`, the annotations as JSON."""
    url = _url(dataset, split, shard)
    try:
        data = storage.read(url)
    except FileNotFoundError:
        return []
    try:
        return list(pq.ParquetFile(pa.BufferReader(data)).read().to_pylist())
    except (pa.ArrowException, OSError, ValueError) as e:
        raise Failure(f"{url}: damaged; delete it and run the `shard` stage again") from e


def write(dataset: str, split: str, shard: str, rows: Sequence[Mapping[str, Any]]) -> None:
    storage.write(_url(dataset, split, shard), index.to_parquet(index.rows_table(rows, _SCHEMA)))


def of_clips(dataset: str, split: str, shard: str) -> dict[str, dict[str, Any]]:
    """The later annotations of a shard as its samples have them, by source."""
    return {row["source"]: of_sample(row["extra"]) for row in read(dataset, split, shard)}


def sample(content: Mapping[str, Any], by_source: Mapping[str, Mapping[str, Any]], source: str) -> dict[str, Any]:
    """A sample's JSON with the later annotations of its source instead of those it was cut with."""
    if source not in by_source:
        return dict(content)
    ours = {name: value for name, value in content.items() if name in OURS and name != "manifest"}
    return ours | {**by_source[source]}


def labelled(table: pa.Table, by_source: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """Index rows of one shard with the later labels."""
    rows = zip(table["source"].to_pylist(), table["label"].to_pylist(), strict=True)
    labels = [label_of(by_source[source]) if source in by_source else label for source, label in rows]
    return table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.string()))


def _url(dataset: str, split: str, shard: str) -> str:
    return storage.join(dataset, FOLDER, f"{split}-{shard}.parquet")
