"""Annotations that came after a shard was cut: DATASET/annotations/SPLIT-NNNNN.parquet, beside the shard of that name.

A caption that was mended or a label that was added needs no decoding and moves no shard: readers take the later word.
The tars themselves, and so other readers of WebDataset, keep the word of the day they were cut.
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
    """`source`, `uri` and `extra`, the annotations, of the sources of a shard that have later ones."""
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
    """What the samples of each of these sources have of their annotations, by source."""
    return {row["source"]: of_sample(row["extra"]) for row in read(dataset, split, shard)}


def sample(said: Mapping[str, Any], known: Mapping[str, Mapping[str, Any]], source: str) -> dict[str, Any]:
    """A sample's JSON with the later annotations of its source in place of those it was cut with."""
    if source not in known:
        return dict(said)
    return {name: value for name, value in said.items() if name in OURS and name != "manifest"} | {**known[source]}


def labelled(table: pa.Table, known: Mapping[str, Mapping[str, Any]]) -> pa.Table:
    """Index rows of one shard with the later labels."""
    rows = zip(table["source"].to_pylist(), table["label"].to_pylist(), strict=True)
    labels = [label_of(known[source]) if source in known else label for source, label in rows]
    return table.set_column(table.column_names.index("label"), "label", pa.array(labels, pa.string()))


def _url(dataset: str, split: str, shard: str) -> str:
    return storage.join(dataset, FOLDER, f"{split}-{shard}.parquet")
