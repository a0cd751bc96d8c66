"""Clusters of clips by their vectors, in memory that does not grow with the dataset.

Centroids are the k-means of a sample. Each clip is at home in the cluster of its nearest centroid, and visits the second
nearest where that is nearly as near, so that few pairs are lost at borders. The clips of some shards make a file of lists by
cluster (see `cluster_lists.Lists`). Nothing depends on who is at work.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from longtake.datasets import alike, cluster_lists, index, scores, storage
from longtake.datasets.errors import Failure
from longtake.pipeline import column as columns
from longtake.pipeline import dedup
from longtake.pipeline.score_shard import Report

_PART_BYTES = 128 << 20  # of the vectors that a job has in memory, about
_PART_CLIPS = 4096  # that are worth a job of their own
_JOBS = 32  # as many at least, where there are clips enough
_SAMPLED_SHARDS = 1024  # that are read for a sample, at most
_ONE = 0.98  # cosine of centroids that are one
_BLOCK = 4096  # vectors that are compared with centroids at once


@dataclass(frozen=True)
class Work:
    """What the workers share.

    folder      URL of the clusters
    embedding   the column of the vectors, its field and D
    column      what is made beside the shards
    border      a clip visits a second cluster whose centroid is less near by this cosine at most
    similarity  least cosine of a pair
    """

    dataset: str
    folder: str
    embedding: str
    field: str
    width: int
    column: scores.Column
    border: float
    similarity: float


class Part(NamedTuple):
    """Neighbouring shards of a split whose clips make one file of lists."""

    split: str
    name: str
    first: int  # row in the dataset of its first clip
    shards: tuple[str, ...]
    clips: int


def parts_of(places: Sequence[tuple[str, str, int, int]], width: int) -> list[Part]:
    """The parts of a dataset, by its shards (see `alike.shards`); they depend on nothing else."""
    most = most_clips(sum(clips for *_, clips in places), width)
    parts: list[Part] = []
    for split, name, first, clips in places:
        last = parts[-1] if parts else None
        if last and last.split == split and last.clips + clips <= most:
            parts[-1] = last._replace(shards=(*last.shards, name), clips=last.clips + clips)
        else:
            number = 0 if last is None or last.split != split else int(last.name) + 1
            parts.append(Part(split, f"{number:05d}", first, (name,), clips))
    return parts


def most_clips(clips: int, width: int) -> int:
    """Clips that a job has in memory, at most; fewer where there are few, so that all workers have some."""
    return max(1, min(_PART_BYTES // (2 * width), max(_PART_CLIPS, clips // _JOBS)))


# Centroids.


def sample(work: Work, keeps: Mapping[str, Mapping[str, np.ndarray]], count: int | None, seed: int) -> np.ndarray:
    """Different vectors (S, D) float32 of at most `count` of the kept clips, by chance; None: of all."""
    rng = np.random.default_rng(seed)
    places = [(split, name) for split, shards in keeps.items() for name in shards]
    if len(places) > _SAMPLED_SHARDS and count is not None:
        places = [places[n] for n in np.sort(rng.choice(len(places), _SAMPLED_SHARDS, replace=False))]
    kept = [np.flatnonzero(keeps[split][name]) for split, name in places]
    ends = np.cumsum([len(rows) for rows in kept])
    total = int(ends[-1]) if len(ends) else 0
    chosen = np.arange(total) if count is None or count >= total else np.sort(rng.choice(total, count, replace=False))

    def read(number: int) -> np.ndarray:
        mine = chosen[(chosen >= ends[number] - len(kept[number])) & (chosen < ends[number])]
        rows = kept[number][mine - (ends[number] - len(kept[number]))]
        if not len(rows):
            return np.empty((0, work.width), np.float32)
        split, name = places[number]
        _, found = alike.read_unit(work.dataset, split, name, work.embedding, work.field, work.width)
        wanted = np.zeros(len(found.has), bool)
        wanted[rows] = True
        return found.unit[wanted[found.has]]

    with ThreadPoolExecutor(4) as pool:
        vectors = np.concatenate([np.empty((0, work.width), np.float32), *pool.map(read, range(len(places)))])
    # a crowd of equal clips is one point
    return vectors[np.sort(distinct(vectors)[0])]


def distinct(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The number of the first of each kind of equal vectors, and the kind of each vector."""
    if not len(vectors):
        return np.empty(0, np.int64), np.empty(0, np.int64)
    data = np.ascontiguousarray(vectors).view(np.uint8)
    # by a hash, which is much faster to sort; two different vectors of one hash are sorted as they are
    width = -(-data.shape[1] // 8)
    factors = np.random.default_rng(0).integers(0, 1 << 63, width, dtype=np.uint64) | np.uint64(1)
    hashes = np.empty(len(data), np.uint64)
    blocks = [slice(start, start + _BLOCK) for start in range(0, len(data), _BLOCK)]
    for block in blocks:
        words = np.pad(data[block], ((0, 0), (0, 8 * width - data.shape[1]))).view(np.uint64)
        hashes[block] = (words * factors).sum(1, dtype=np.uint64)
    _, firsts, same = np.unique(hashes, return_index=True, return_inverse=True)
    if not all(np.array_equal(data[block], data[firsts[same[block]]]) for block in blocks):
        _, firsts, same = np.unique(data, axis=0, return_index=True, return_inverse=True)
    return firsts, same.reshape(-1)


def centroids(points: np.ndarray, count: int, iterations: int, seed: int) -> np.ndarray:
    """(K, D) float32 unit vectors of a cosine below 0.98, K at most `count` and the number of the points (N, D)."""
    import faiss

    count = min(count, len(points))
    if count == 1:
        middle = points.mean(0, keepdims=True)
        return np.asarray(middle / max(np.linalg.norm(middle), 1e-12), np.float32)
    found = faiss.Kmeans(
        points.shape[1],
        count,
        niter=iterations,
        seed=seed & 0x7FFFFFFF,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),
    )
    found.train(np.ascontiguousarray(points))
    centres = np.asarray(found.centroids, np.float32)
    # a crowd takes many of them, and would be torn apart
    return centres[~dedup.similar(centres, _ONE)]


class Places(NamedTuple):
    """Where N clips belong.

    home    (N,) number of the nearest centroid
    cosine  (N,) to it
    visits  (M, 2) a clip, and the second nearest centroid, where it is nearly as near
    """

    home: np.ndarray
    cosine: np.ndarray
    visits: np.ndarray


def places_of(vectors: np.ndarray, centres: np.ndarray, border: float) -> Places:
    """The places of unit vectors (N, D) float32 among centroids (K, D)."""
    homes, tops, visits = [], [], []
    for start in range(0, len(vectors), _BLOCK):
        cosines = vectors[start : start + _BLOCK] @ centres.T
        each = np.arange(len(cosines))
        home = cosines.argmax(1)
        top = cosines[each, home]
        homes.append(home)
        tops.append(top)
        if border > 0 and len(centres) > 1:
            cosines[each, home] = -np.inf
            second = cosines.argmax(1)
            near = np.flatnonzero(cosines[each, second] >= top - border)
            visits.append(np.stack([start + near, second[near]], 1))
    return Places(
        np.concatenate([np.empty(0, np.int64), *homes]),
        np.concatenate([np.empty(0, np.float32), *tops]),
        np.concatenate([np.empty((0, 2), np.int64), *visits]),
    )


# Lists: the clips of a part by cluster.


def make_lists(work: Work, centres: np.ndarray, part: Part, keep: np.ndarray, report: Report) -> dict[str, int]:
    """Give the clips of a part their clusters: a table beside each shard, then the part's file of lists.

    Args:
        keep: (N,) bool, which clips of the part's shards are in clusters.

    Raises:
        UserError: vectors of another size.
        Failure: a shard is missing, damaged or of other clips.
    """
    vectors, rows, homes, visits = [], [], [], []
    done = members = 0
    for name in part.shards:
        base = index.read_shard(work.dataset, part.split, name)
        report(done, name)
        shard, found = alike.read_unit(work.dataset, part.split, name, work.embedding, work.field, work.width)
        kept = keep[done : done + len(base.table)]
        if not columns.fits(base, shard) or len(kept) != len(base.table):
            raise Failure(
                f"{work.dataset} ({part.split}): {shard.name} is of other clips than {name} has now;"
                " run its `score` stage again"
            )
        has = found.has & kept
        unit = found.unit[kept[found.has]]
        places = places_of(unit, centres, work.border)
        _write_column(work, base, shard, kept, has, places)
        # as they are stored: the same values everywhere
        vectors.append(unit.astype(np.float16))
        rows.append(part.first + done + np.flatnonzero(has))
        homes.append(places.home)
        visits.append(places.visits + np.array([members, 0]))
        members += len(unit)
        done += len(base.table)
    _write_lists(work, part, len(centres), *(np.concatenate(each) for each in (vectors, rows, homes, visits)))
    return {"clips": members, "visits": sum(map(len, visits))}


def _write_column(
    work: Work, base: index.Shard, shard: index.Shard, kept: np.ndarray, has: np.ndarray, places: Places
) -> None:
    """Commit the table with `cluster` and `distance` of a shard's clips."""
    cluster, distance = np.zeros((2, len(has)), np.float32)
    cluster[has] = places.home
    # the last bits are not worth their bytes
    distance[has] = np.round(1 - places.cosine, 5)
    without = np.where(kept, "no_value", "not_in_view").astype(object)
    without[has] = None
    values = {
        "key": base.table["key"],
        "base_sha256": base.table["sha256"],
        "reason": pa.array(without, pa.string()),
        "cluster": pa.array(cluster, mask=~has),
        "distance": pa.array(distance, mask=~has),
    }
    url = storage.join(work.dataset, base.split, f"{base.name}.{work.column.column}.parquet")
    index.commit_table(url, pa.table(values, scores.table_schema(work.column.fields)), work.column.notes())


def _write_lists(
    work: Work, part: Part, count: int, vectors: np.ndarray, rows: np.ndarray, homes: np.ndarray, visits: np.ndarray
) -> None:
    from safetensors.numpy import save_file

    clips = np.append(np.arange(len(rows)), visits[:, 0])
    of = np.append(homes, visits[:, 1])
    visiting = np.arange(len(clips)) >= len(rows)
    order = np.lexsort((clips, visiting, of))
    tensors = {
        "vectors": vectors[clips[order]],
        "rows": rows[clips[order]].astype(np.int64),
        "starts": np.searchsorted(of[order], np.arange(count + 1)).astype(np.int64),
        "homes": np.bincount(homes, minlength=count).astype(np.int64),
    }
    url = storage.join(work.folder, cluster_lists.LISTS, f"{part.split}-{part.name}.safetensors")
    with storage.staged(url) as path:
        save_file(tensors, path, cluster_lists.sums_of(tensors))
        storage.open_up(path)
