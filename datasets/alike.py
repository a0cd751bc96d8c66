"""Clips that look alike: the vectors of a column of scores, and the clips of a dataset whose vectors are nearest to one.

Likeness is the cosine, -1 to 1. A clip that has a vector for each of several frames counts by the mean of their unit
vectors, in search as in clusters: clips are alike that are alike as a whole, not those that share one black frame.

Search is exact, over all shards in constant memory, or approximate, over the clusters whose centroids are nearest. A clip is
named by its row in the dataset (see clusters.py).
"""

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import clusters, compact, index, schema, storage
from longtake.datasets.errors import Failure, UserError

LISTS = "vectors"  # folder of the lists of clusters

_BLOCK = 8192  # vectors that are multiplied at once
_SHARDS = 4  # that are read at once
_READS = 16
_MOST_HEADER = 1 << 20
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
    """Which rows of a column's table have a vector, (N,) bool, and these vectors, (M, D) float32 of norm 1."""
    column = table[field].combine_chunks()
    column = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
    has = np.asarray(column.is_valid()).copy()
    there = column.drop_null()
    if not pa.types.is_fixed_size_list(column.type):
        # of several frames each
        lengths = np.asarray(pc.list_value_length(there))
        has[np.flatnonzero(has)[lengths == 0]] = False
        frames, _ = _normed(_numbers(there.flatten()))
        full = lengths[lengths > 0]
        starts = np.cumsum(full) - full
        vectors = np.add.reduceat(frames, starts, axis=0) if len(full) else frames
    else:
        vectors = _numbers(there)
    vectors, norms = _normed(vectors)
    directed = norms > _TINY
    has[np.flatnonzero(has)[~directed]] = False
    return has, vectors[directed]


def _numbers(lists: pa.FixedSizeListArray) -> np.ndarray:
    values = lists.flatten().to_numpy(zero_copy_only=False)
    return values.reshape(-1, lists.type.list_size).astype(np.float32)


def _normed(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of norm 1, and the norms that they had."""
    norms = np.linalg.norm(vectors, axis=1)
    vectors /= np.maximum(norms, _TINY)[:, None]
    return vectors, norms


def width(kind: pa.DataType) -> int | None:
    """D of a field of vectors, or of lists of vectors; None of other fields."""
    if pa.types.is_list(kind):
        kind = kind.value_type
    return kind.list_size if pa.types.is_fixed_size_list(kind) else None


def read_unit(dataset: str, split: str, name: str, column: str, field: str, size: int) -> tuple[pa.Table, np.ndarray, np.ndarray]:
    """The table of a column's shard, and its vectors as `unit` gives them.

    Raises:
        UserError: there is no such field, or it has vectors of another size than (D,).
        Failure: the shard is missing or damaged.
    """
    full = f"{name}.{column}"
    table = index.read_shard(dataset, split, full).table
    check(storage.join(dataset, split, f"{full}.parquet"), table.schema, field, size)
    return table, *unit(table, field)


def check(url: str, kind: pa.Schema, field: str, size: int) -> None:
    """Raise UserError where a column's table has no vectors of `size` numbers in `field`."""
    there = {one.name: number for one in kind if (number := width(one.type)) is not None}
    if field not in there:
        raise UserError(f"{url}: has no vectors {field}; there are {', '.join(there) or 'none'}")
    if there[field] != size:
        raise UserError(f"{url}: {field} has {there[field]} numbers, others have {size}; name vectors of one encoder")


def field_of(dataset: str, column: str, field: str | None = None) -> tuple[str, int]:
    """The field of vectors of a column, its only one if none is named, and its D. Raises UserError: there is none."""
    for split in schema.SPLITS:
        for name in index.shard_names(dataset, split, column)[:1]:
            kinds = index.read_shard(dataset, split, name).table.schema
            sizes = {one.name: number for one in kinds if (number := width(one.type)) is not None}
            chosen = field or next(iter(sizes), "")
            if chosen in sizes and (field or len(sizes) == 1):
                return chosen, sizes[chosen]
            there = ", ".join(sizes) or "none"
            raise UserError(f"{dataset}: {column}: vectors {field or 'of which field'}? There are {there}")
    raise UserError(f"{dataset}: no column {column}; run its `score` stage")


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
    _, size = field_of(dataset, column, field)

    def read(place: tuple[str, str, int, int]) -> Vectors:
        split, name, start, count = place
        _, has, unit_vectors = read_unit(dataset, split, name, column, field, size)
        if len(has) != count:
            raise Failure(f"{dataset} ({split}): {name}.{column} is of other clips; run its `score` stage again")
        return Vectors(start, has, unit_vectors)

    yield from _ahead(read, list(shards(dataset)))


def _ahead(read: Callable[..., Vectors], places: list[tuple[str, str, int, int]]) -> Iterator[Vectors]:
    """What `read` gives for each place, in order; some are read ahead, never all."""
    with ThreadPoolExecutor(_SHARDS) as pool:
        waiting = [pool.submit(read, place) for place in places[:_SHARDS]]
        for place in [*places[_SHARDS:], None][: len(places)] if len(places) > _SHARDS else []:
            yield waiting.pop(0).result()
            if place is not None:
                waiting.append(pool.submit(read, place))
        for one in waiting:
            yield one.result()


# Search.


def exact(dataset: str, column: str, field: str, vector: np.ndarray, count: int, keep: np.ndarray | None = None) -> Alike:
    """The `count` clips nearest to a vector (D,) of any norm.

    Args:
        keep: (N,) bool, the clips of the dataset that may be among them.

    Raises:
        UserError: no such vectors, or the vector is of another size, or is zero.
        Failure: a shard is missing or damaged.
    """
    _, size = field_of(dataset, column, field)
    asked = direction(vector, size)
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


def approximate(
    made: clusters.Clusters, vector: np.ndarray, count: int, probes: int = 8, keep: np.ndarray | None = None
) -> Alike:
    """The `count` clips nearest to a vector (D,) in the `probes` clusters whose centroids are nearest; else as `exact`.

    More probes find more of the true ones; those of all clusters are all of them.
    """
    asked = direction(vector, made.embedding["width"])
    folder = storage.join(made.dataset, made.folder)
    near = np.argsort(-(read_centroids(folder) @ asked), kind="stable")[:probes]
    lists = read_lists(folder)
    with ThreadPoolExecutor(_READS) as pool:
        parts = [
            part
            for part in pool.map(lambda pair: pair[0].homes_of(int(pair[1])), ((one, c) for one in lists for c in near))
            if len(part[0])
        ]
    if not parts:
        return Alike(np.empty(0, np.int64), np.empty(0, np.float32))
    rows = np.concatenate([rows for rows, _ in parts])
    cosines = np.concatenate([found.astype(np.float32) @ asked for _, found in parts])
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
    _, size = field_of(dataset, column, field)
    start = 0
    for split in schema.SPLITS:
        base, _ = compact.open_split(dataset, split)
        for number, name in enumerate(base.shards["name"].to_pylist()):
            place = pc.index(base.of(number)["key"], key).as_py()
            if place >= 0:
                _, has, found = read_unit(dataset, split, name, column, field, size)
                if not has[place]:
                    raise UserError(f"{key}: has no vector in {column}; name another clip")
                return start + int(base.starts[number]) + place, found[has[:place].sum()]
        start += int(base.counts.sum())
    raise UserError(f"{dataset}: no sample {key}; `longtake dataset sources` lists the sources that keys begin with")


# The lists of clusters.


@dataclass(frozen=True)
class Lists:
    """The clips of some shards, by cluster: of each those at home in it, then those of others near to it, its visitors.

    url     of a safetensors file with vectors (N, D) float16, rows (N,) int64, starts (K+1,) and homes (K,) int64
    size    D
    places  byte in the file where a tensor begins
    starts  (K+1,) where a cluster begins
    homes   (K,) how many are at home in it
    """

    url: str
    size: int
    places: dict[str, int]
    starts: np.ndarray
    homes: np.ndarray

    def part(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """The rows (N,) and vectors (N, D) float16 from one place to another."""
        rows = _read(self.url, self.places["rows"] + 8 * first, (last - first,), np.int64)
        start = self.places["vectors"] + 2 * self.size * first
        return rows, _read(self.url, start, (last - first, self.size), np.float16)

    def homes_of(self, cluster: int) -> tuple[np.ndarray, np.ndarray]:
        start = int(self.starts[cluster])
        return self.part(start, start + int(self.homes[cluster]))


def _read(url: str, start: int, shape: tuple[int, ...], kind: type) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    if not count:
        return np.empty(shape, kind)
    if storage.is_local(url):
        with open(storage.filesystem(url)[1], "rb") as file:  # noqa: PTH123
            file.seek(start)
            return np.fromfile(file, kind, count).reshape(shape)
    data = storage.read_range(url, start, count * np.dtype(kind).itemsize)
    return np.frombuffer(data, kind).reshape(shape)


def read_lists(folder: str) -> list[Lists]:
    """Those of all clips in clusters. Raises Failure where a file is damaged."""
    where = storage.join(folder, LISTS)
    names = [name for name in storage.names(where) if name.endswith(".safetensors") and not name.startswith(".")]
    with ThreadPoolExecutor(_READS) as pool:
        return list(pool.map(lambda name: _open_lists(storage.join(where, name)), names))


def _open_lists(url: str) -> Lists:
    try:
        length = int.from_bytes(storage.read_range(url, 0, 8), "little")
        if length > _MOST_HEADER:
            raise ValueError("its header is too large")
        header = json.loads(storage.read_range(url, 8, length))
        places = {name: 8 + length + header[name]["data_offsets"][0] for name in ("vectors", "rows", "starts", "homes")}
        count, size = header["vectors"]["shape"]
        lists = (header["starts"]["shape"][0],)
        starts = _read(url, places["starts"], lists, np.int64)
        homes = _read(url, places["homes"], (lists[0] - 1,), np.int64)
        if starts[-1] != count or (np.diff(starts) < homes).any() or (homes < 0).any():
            raise ValueError("its clusters do not add up")
    except (OSError, ValueError, KeyError, TypeError, IndexError) as e:
        raise Failure(f"{url}: not readable lists of clusters ({e}); delete it and run the `cluster` stage again") from e
    return Lists(url, size, places, starts, homes)


def read_centroids(folder: str) -> np.ndarray:
    """(K, D) float32. Raises Failure where they are missing or damaged."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    url = storage.join(folder, "centroids.safetensors")
    try:
        return np.asarray(load(storage.read(url))["centroids"], np.float32)
    except (FileNotFoundError, SafetensorError, KeyError) as e:
        raise Failure(f"{url}: missing or damaged; delete its folder and run the `cluster` stage again") from e
