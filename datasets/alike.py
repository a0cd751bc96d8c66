"""Clips that look alike: the vectors of a column of scores, and the clips of a dataset whose vectors are nearest to one.

Likeness is the cosine, -1 to 1. A clip that has a vector for each of several frames counts by the mean of their unit
vectors, in search as in clusters: clips are alike that are alike as a whole, not those that share one black frame.

Search is exact, over all shards in constant memory, or approximate, over the clusters whose centroids are nearest. A clip is
named by its row in the dataset (see clusters.py).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import clusters, compact, index, schema, score_columns, scores, storage
from longtake.datasets.cluster_lists import CENTROIDS, Lists, read_centroids, read_lists
from longtake.datasets.errors import Failure, UserError

_SHARDS = 4  # that are read at once
_READS = 16
_TINY = 1e-12  # norm of a vector that has no direction


class Alike(NamedTuple):
    """Clips in the order of likeness, of equal ones by row.

    rows     (N,) int64
    cosines  (N,) float32
    """

    rows: np.ndarray
    cosines: np.ndarray


# The vectors of a column.


class Vectors(NamedTuple):
    """The vectors of a shard's clips.

    row   number in the dataset of the shard's first clip
    has   (N,) bool: which of its clips have a vector
    unit  (M, D) float32: those, of norm 1
    """

    row: int
    has: np.ndarray
    unit: np.ndarray


def unit(table: pa.Table, field: str) -> tuple[np.ndarray, np.ndarray]:
    """Which rows of a column's table have a vector with a direction, (N,) bool, and these, (M, D) float32 of norm 1.

    Raises UserError where they are of two sizes.
    """
    rows, stored = score_columns.vectors(table[field])
    has = np.zeros(len(table), bool)
    if not len(rows):
        return has, np.empty((0, 0), np.float32)
    vectors = stored.astype(np.float32)
    norms = _divide(vectors)
    starts = np.flatnonzero(np.diff(rows, prepend=-1))
    if len(starts) < len(rows):
        # of several frames each
        rows, vectors = rows[starts], np.add.reduceat(vectors, starts, axis=0)
        norms = _divide(vectors)
    directed = norms > _TINY
    has[rows[directed]] = True
    return has, vectors if directed.all() else vectors[directed]


def normed(vectors: np.ndarray) -> np.ndarray:
    """Vectors (N, D) as float32 of norm 1; those without a direction stay."""
    unit_vectors = vectors.astype(np.float32)
    _divide(unit_vectors)
    return unit_vectors


def _divide(vectors: np.ndarray) -> np.ndarray:
    """Divide vectors (N, D) by their norms, which are returned."""
    norms = np.sqrt(np.einsum("nd,nd->n", vectors, vectors))
    vectors /= np.maximum(norms, _TINY)[:, None]
    return norms


def read_unit(dataset: str, split: str, name: str, column: str, field: str, size: int) -> tuple[index.Shard, Vectors]:
    """A shard of a column, and its vectors, as if its first clip were row 0.

    Raises:
        UserError: it has vectors of another size than (D,).
        Failure: the shard is missing or damaged, or has no such field.
    """
    shard = index.read_shard(dataset, split, f"{name}.{column}")
    url = storage.join(dataset, split, f"{shard.name}.parquet")
    if field not in shard.table.column_names:
        raise Failure(f"{url}: has no {field}; delete it and run its `{scores.stage_of(column)}` stage again")
    has, found = unit(shard.table, field)
    if has.any() and found.shape[1] != size:
        raise UserError(
            f"{url}: {field} has vectors of {found.shape[1]} numbers, other shards of {size}; delete it and score it again"
        )
    return shard, Vectors(0, has, found.reshape(-1, size))


def field_of(column: scores.Column, field: str | None = None) -> scores.Field:
    """The field of a column that has vectors: its only one, if none is named. Raises UserError: there is none."""
    fields = {one.name: one for one in column.fields if one.kind == "vector"}
    if field is None and len(fields) == 1:
        return next(iter(fields.values()))
    if field not in fields:
        asked = f"no vectors {field}" if field else "vectors of several fields" if fields else "no vectors"
        raise UserError(f"{column.column}: has {asked}; there are {', '.join(fields) or 'none'}")
    return fields[field]


def shards(dataset: str) -> Iterator[tuple[str, str, int, int]]:
    """Split, name, first row and clips of each base shard."""
    start = 0
    for split in schema.SPLITS:
        base, _ = compact.open_split(dataset, split)
        for name, count in zip(base.shards["name"].to_pylist(), base.counts.tolist(), strict=True):
            yield split, name, start, count
            start += count


def vectors(dataset: str, column: str, field: str) -> Iterator[Vectors]:
    """The vectors of all clips, shard by shard. Raises UserError, Failure: as `read_unit`."""
    size = field_of(score_columns.described(dataset, column), field).width

    def read(place: tuple[str, str, int, int]) -> Vectors:
        split, name, start, count = place
        _, found = read_unit(dataset, split, name, column, field, size)
        if len(found.has) != count:
            raise Failure(
                f"{dataset} ({split}): {name}.{column} is of other clips; run its `{scores.stage_of(column)}` stage again"
            )
        return found._replace(row=start)

    yield from _ahead(read, list(shards(dataset)))


def _ahead(read: Callable[[Any], Vectors], places: Sequence[Any]) -> Iterator[Vectors]:
    """What `read` gives for each place, in order; a few are read ahead."""
    with ThreadPoolExecutor(_SHARDS) as pool:
        waiting = deque(pool.submit(read, place) for place in places[:_SHARDS])
        for place in places[_SHARDS:]:
            yield waiting.popleft().result()
            waiting.append(pool.submit(read, place))
        while waiting:
            yield waiting.popleft().result()


# Search.


def exact(
    dataset: str, column: str, field: str, vector: np.ndarray, count: int, keep: np.ndarray | None = None
) -> Alike:
    """The `count` clips nearest to a vector (D,) of any norm.

    Args:
        keep: (N,) bool, the clips of the dataset that may be among them.

    Raises:
        UserError: no such vectors, or the vector is of another size, or is zero.
        Failure: a shard is missing or damaged.
    """
    asked = direction(vector, field_of(score_columns.described(dataset, column), field).width)
    best = Alike(np.empty(0, np.int64), np.empty(0, np.float32))
    for part in vectors(dataset, column, field):
        rows = part.row + np.flatnonzero(part.has)
        cosines = part.unit @ asked
        if keep is not None:
            kept = keep[rows]
            rows, cosines = rows[kept], cosines[kept]
        best = _best(Alike(np.append(best.rows, rows), np.append(best.cosines, cosines)), count)
    return best


def direction(vector: np.ndarray, size: int) -> np.ndarray:
    """A vector (D,) float32 of norm 1. Raises UserError where it has another size, or no direction."""
    asked = np.asarray(vector, np.float32).reshape(-1)
    if len(asked) != size:
        raise UserError(f"a vector of {len(asked)} numbers, the column has {size}; encode it by the column's encoder")
    norm = np.linalg.norm(asked)
    if not norm > _TINY or not np.isfinite(norm):
        raise UserError("a vector without direction: it is zero or not finite; encode something else")
    return asked / norm


def _best(found: Alike, count: int) -> Alike:
    if len(found.rows) > 4 * count:
        # at the border all equal ones stay, so that rows decide
        least = np.partition(found.cosines, -count)[-count]
        found = Alike(found.rows[found.cosines >= least], found.cosines[found.cosines >= least])
    order = np.lexsort((found.rows, -found.cosines))[:count]
    return Alike(found.rows[order], found.cosines[order])


class Searched(NamedTuple):
    """Clusters to search in, without their record; see `clusters.Clusters`."""

    dataset: str
    folder: str


def clusters_of(dataset: str, column: str, field: str) -> Searched | None:
    """Clusters of all clips that a dataset has now, by these vectors; None where it has none."""
    digests = {split: compact.open_split(dataset, split)[0].digest for split in schema.SPLITS}
    for name in score_columns.columns_of(dataset):
        folder = f"{clusters.FOLDER}/{name.rpartition('-')[2]}"
        if name.startswith(f"{scores.PREFIX}cluster-") and storage.exists(storage.join(dataset, folder, CENTROIDS)):
            made = score_columns.described(dataset, name).config
            whole = made["view"] == "" and made["base"] == digests
            if (
                whole
                and made["embedding"] == [column, field]
                and all(_has_all(dataset, name, split) for split in digests)
            ):
                return Searched(dataset, folder)
    return None


def _has_all(dataset: str, column: str, split: str) -> bool:
    return len(index.shard_names(dataset, split, column)) == len(index.shard_names(dataset, split))


def approximate(
    made: clusters.Clusters | Searched, vector: np.ndarray, count: int, probes: int = 8, keep: np.ndarray | None = None
) -> Alike:
    """The `count` clips nearest to a vector (D,) in the `probes` clusters whose centroids are nearest; else as `exact`.

    More probes find more of the true ones; those of all clusters are all of them.
    """
    centres, lists = _opened(storage.join(made.dataset, made.folder))
    asked = direction(vector, centres.shape[1])
    near = np.argsort(-(centres @ asked), kind="stable")[:probes]
    with ThreadPoolExecutor(_READS) as pool:
        parts = [
            part
            for part in pool.map(lambda pair: pair[0].homes_of(int(pair[1])), ((one, c) for one in lists for c in near))
            if len(part[0])
        ]
    if not parts:
        return Alike(np.empty(0, np.int64), np.empty(0, np.float32))
    rows = np.concatenate([rows for rows, _ in parts])
    cosines = np.concatenate([normed(found) @ asked for _, found in parts])
    if keep is not None:
        rows, cosines = rows[keep[rows]], cosines[keep[rows]]
    return _best(Alike(rows, cosines), count)


def keys(dataset: str, rows: np.ndarray) -> list[tuple[str, str]]:
    """Split and key of clips by their rows in the dataset."""
    found: dict[int, tuple[str, str]] = {}
    start = 0
    for split in schema.SPLITS:
        base, _ = compact.open_split(dataset, split)
        for number, (first, count) in enumerate(zip(base.starts + start, base.counts, strict=True)):
            for row in rows[(rows >= first) & (rows < first + count)].tolist():
                found[row] = split, base.of(number)["key"][row - int(first)].as_py()
        start += int(base.counts.sum())
    return [found[row] for row in rows.tolist()]


def vector_of(dataset: str, column: str, field: str, key: str) -> tuple[int, np.ndarray]:
    """The row in the dataset of a clip, and its vector (D,). Raises UserError: no such clip, or it has none."""
    size = field_of(score_columns.described(dataset, column), field).width
    start = 0
    for split in schema.SPLITS:
        base, _ = compact.open_split(dataset, split)
        for number, name in enumerate(base.shards["name"].to_pylist()):
            place = pc.index(base.of(number)["key"], key).as_py()
            if place >= 0:
                _, found = read_unit(dataset, split, name, column, field, size)
                if not found.has[place]:
                    raise UserError(f"{key}: has no vector in {column}; name another clip")
                return start + int(base.starts[number]) + place, found.unit[found.has[:place].sum()]
        start += int(base.counts.sum())
    raise UserError(f"{dataset}: no sample {key}; `longtake dataset sources` lists the sources that keys begin with")


@lru_cache(maxsize=4)
def _opened(folder: str) -> tuple[np.ndarray, list[Lists]]:
    """Centroids and lists for several searches; a folder of clusters never changes."""
    return read_centroids(folder), read_lists(folder)
