"""Clusters of a dataset's clips by an embedding: their record, and the pairs of clips that look alike.

A clip is named by its row: its number in the dataset, the splits in the order of `schema.SPLITS`, the clips of a split in
the order of its shards. `DATASET/clusters/DIGEST/` has

    centroids.safetensors       (K, D) float32, unit vectors
    vectors/SPLIT-N.safetensors the clips of some shards, by cluster: an inverted file for search (see cluster_lists.py)
    pairs-COSINE/N.parquet      the pairs of some clusters that are at least this alike
"""

import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from longtake.datasets import index, record, schema, storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.scores import PREFIX, Field

FOLDER = "clusters"  # of a dataset
NAME = "cluster"  # what rules call the column of scores, as in cluster.distance
# what the column of scores has
FIELDS = (
    Field("cluster", "number", "number of its cluster, from 0"),
    Field("distance", "number", "1 less the cosine to the centroid of its cluster, 0 to 2"),
)
ROUNDING = 1e-6  # of the cosine of equal vectors

_MOST_PAIRS = 1 << 28  # that are used at once: in memory a pair takes 16 bytes, and for a moment 40
_READS = 2

# One row a pair of clips. A clip whose `crowd` is true stands behind the other one, its representative, for whose pairs alone
# the clips of a crowd were compared with others.
PAIRS = pa.schema(
    [
        ("first", pa.int64()),  # the lower row; of a crowd the representative's
        ("second", pa.int64()),
        ("cosine", pa.float32()),
        ("crowd", pa.bool_()),
    ]
)


@dataclass(frozen=True)
class Clusters:
    """What a `cluster` stage has made.

    dataset     URL
    folder      "clusters/DIGEST" in the dataset
    column      the column of scores with `cluster` and `distance` of each clip, as plain data (see `scores.Column`)
    embedding   `column` and `field` of the vectors, `width` D
    view        URL; only the clips that it keeps are in clusters
    similarity  least cosine of the pairs
    clips       clips of each split, in clusters or not
    digests     of the splits' base shards when this was written (see `compact.Rows`)
    counts      clips in clusters, clusters, pairs, clips of crowds, clusters that were cut or whose pairs were too many
    capped      clusters that had too many pairs, by number, with the least cosine of the pairs that they have
    """

    dataset: str
    folder: str
    column: Mapping[str, Any]
    embedding: Mapping[str, Any]
    view: str | None
    similarity: float
    clips: Mapping[str, int]
    digests: Mapping[str, str]
    counts: Mapping[str, int]
    capped: Mapping[str, float]


def write_clusters(uri: str, clusters: Clusters) -> None:
    record.write(uri, "clusters", asdict(clusters))


def read_clusters(uri: str) -> Clusters:
    """The record that a `cluster` stage has written. Raises UserError, Failure: see `record.read`."""
    return record.read(uri, "clusters", "cluster", Clusters)


def numbers(clusters: Clusters, splits: pa.ChunkedArray, rows: np.ndarray) -> np.ndarray:
    """The rows (N,) in the dataset of clips whose splits and rows in these are given."""
    starts, start = {}, 0
    for split in schema.SPLITS:
        starts[split] = start
        start += clusters.clips.get(split, 0)
    codes = splits.combine_chunks().dictionary_encode()
    offsets = np.array([starts[split] for split in codes.dictionary.to_pylist()], np.int64)
    return np.asarray(offsets[codes.indices.to_numpy()] + rows, np.int64)


def pairs_name(similarity: float) -> str:
    """Of the folder with the pairs of at least this cosine, in that of the clusters."""
    return f"pairs-{similarity!r}"


def names(clusters: Clusters) -> list[str]:
    """Of its two parts, each of which another stage may share: the column with all that it stands for, and the pairs."""
    column = str(clusters.column["column"])
    return [column, f"{column} {pairs_name(clusters.similarity)}"]


def name_of(path: str) -> str:
    """The part (see `names`) that a file in the folder of clusters is of; "" of other files."""
    digest, _, inside = path.partition("/")
    folder, _, file = inside.rpartition("/")
    if not re.fullmatch("[0-9a-f]+", digest) or not file or file.startswith("."):
        return ""
    column = f"{PREFIX}cluster-{digest}"
    return f"{column} {folder}" if folder.startswith("pairs-") else column


def pair_tables(clusters: Clusters, similarity: float | None = None) -> Iterator[pa.Table]:
    """The pairs (see PAIRS) of at least this cosine, and those of crowds whatever their cosine, group by group of clusters.

    A pair of clips that are near the border of two clusters may be in two groups.

    Raises:
        UserError: pairs of so little likeness were not kept.
        Failure: pairs are missing or damaged, or there are too many for memory.
    """
    least = clusters.similarity if similarity is None else similarity
    if least < clusters.similarity:
        raise UserError(
            f"similarity {least:g}: the clusters have pairs from {clusters.similarity:g} on;"
            f" set `similarity: {least:g}` in their `cluster` stage"
        )
    folder, name = storage.join(clusters.dataset, clusters.folder), pairs_name(clusters.similarity)
    names = index.shard_names(folder, name)
    if len(names) != clusters.counts["groups"]:
        raise Failure(f"{storage.join(folder, name)}: some pairs are missing; run the `cluster` stage again")
    count = 0
    with ThreadPoolExecutor(_READS) as pool:
        for start in range(0, len(names), _READS):
            some = names[start : start + _READS]
            for table in pool.map(lambda each: _strong(index.read_shard(folder, name, each).table, least), some):
                count += len(table)
                if count > _MOST_PAIRS:
                    raise Failure(
                        f"{storage.join(folder, name)}: more than {_MOST_PAIRS:,} pairs of a cosine of {least:g}, too many"
                        " for memory; ask for a greater similarity"
                    )
                yield table


def pairs(clusters: Clusters, similarity: float | None = None) -> pa.Table:
    """The same in one table, each pair once. Raises as `pair_tables`."""
    table = pa.concat_tables([PAIRS.empty_table(), *pair_tables(clusters, similarity)]).combine_chunks()
    keys = np.stack([table["first"].to_numpy(), table["second"].to_numpy()], 1)
    order = np.lexsort((~np.asarray(table["crowd"]), keys[:, 1], keys[:, 0]))
    keys = keys[order]
    new = np.ones(len(keys), bool)
    new[1:] = (keys[1:] != keys[:-1]).any(1)
    return table.take(order[new])


def _strong(table: pa.Table, least: float) -> pa.Table:
    strong = (table["cosine"].to_numpy() >= least - ROUNDING) | np.asarray(table["crowd"])
    return table.replace_schema_metadata(None).filter(pa.array(strong))
