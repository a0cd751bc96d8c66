"""The pairs of clips that look alike, cluster by cluster, from the lists of all clips.

A crowd of clips that are all alike has as many pairs as their number squared. Of equal ones the first represents the others.
Where a cluster has more than a hundred pairs a clip, so does the first of those within half the angle of the least
similarity. If that does not do, the weakest pairs are left out, and the record says from which cosine on they are whole.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from longtake.datasets import alike, cluster_lists, clusters, index, storage
from longtake.pipeline.clustering import Work, centroids, distinct, most_clips, places_of
from longtake.pipeline.score_shard import Report

_BLOCK = 512  # clips that are compared at once with the others
_PAIRS_A_CLIP, _FEW_PAIRS = 100, 10_000
_MOST_CLIPS = 1 << 16  # that are all compared with each other
_READS = 4
_MANY = 1024  # clips of one cluster in one file
_GROUP_CLIPS = 1 << 17  # in a group, whose pairs are in memory


class Group(NamedTuple):
    """Neighbouring clusters whose pairs are made by one job: the first, the one after the last, and the clips in them."""

    first: int
    last: int
    clips: int


def groups_of(lists: Sequence[cluster_lists.Lists]) -> list[Group]:
    """All clusters in groups; visitors count as clips."""
    sizes = np.zeros(lists[0].count, np.int64)
    for one in lists:
        sizes += np.diff(one.bounds(0, one.count)[0])
    most = min(_GROUP_CLIPS, most_clips(int(sizes.sum()), lists[0].size))
    groups: list[Group] = []
    for cluster, clips in enumerate(sizes.tolist()):
        if groups and groups[-1].clips + clips <= most:
            groups[-1] = Group(groups[-1].first, cluster + 1, groups[-1].clips + clips)
        else:
            groups.append(Group(cluster, cluster + 1, clips))
    return groups


@dataclass
class Found:
    """The pairs of some clusters, columns as in `clusters.PAIRS`, and what is to be said of them.

    capped   clusters that had too many pairs, with the least cosine of those that they have
    cut      clusters that had too many clips to compare each with each
    """

    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = field(default_factory=list)
    capped: dict[int, float] = field(default_factory=dict)
    cut: list[int] = field(default_factory=list)

    def add(self, one: np.ndarray, other: np.ndarray, cosine: np.ndarray, crowd: bool = False) -> None:
        """Pairs by rows; of a crowd `one` are the representatives, which have lower rows."""
        both = np.minimum(one, other), np.maximum(one, other)
        self.parts.append((*both, np.minimum(cosine, 1), np.full(len(cosine), crowd)))

    def table(self) -> pa.Table:
        if not self.parts:
            return clusters.PAIRS.empty_table()
        values = [np.concatenate(each) for each in zip(*self.parts, strict=True)]
        return pa.table(values, clusters.PAIRS).sort_by([("first", "ascending"), ("second", "ascending")])


class Clips(NamedTuple):
    """Clips, of which many may share a vector: the rows (N,), the number of the vector of each (N,), vectors (M, D) float16."""

    rows: np.ndarray
    kinds: np.ndarray
    vectors: np.ndarray


def make_pairs(
    work: Work, lists: Sequence[cluster_lists.Lists], group: Group, name: str, report: Report
) -> dict[str, int]:
    """Write the pairs of a group of clusters."""
    first, last, _ = group
    with ThreadPoolExecutor(_READS) as pool:
        read = list(pool.map(lambda one: _clips_of(one, first, last), lists))
    found, done = Found(), 0
    for cluster in range(first, last):
        report(done, f"cluster {cluster}")
        homes, visitors = (_together([clips[cluster - first] for clips in some]) for some in zip(*read, strict=True))
        done += len(homes.rows) + len(visitors.rows)
        if len(homes.rows):
            pairs_of(found, cluster, homes, visitors, work.similarity)
    table = found.table()
    capped = {str(number): least for number, least in found.capped.items()}
    notes = {"capped": capped, "cut": found.cut, "crowd": int(np.asarray(table["crowd"]).sum())}
    url = storage.join(work.folder, clusters.pairs_name(work.similarity), f"{name}.parquet")
    index.commit_table(url, table, notes)
    return {"pairs": len(table), "clips": 0}


def _clips_of(one: cluster_lists.Lists, first: int, last: int) -> tuple[list[Clips], list[Clips]]:
    """Of each cluster in a file of lists: the clips at home in it, and its visitors."""
    starts, homes = one.bounds(first, last)
    rows, vectors = one.part(int(starts[0]), int(starts[-1]))
    starts = starts - starts[0]
    parts = zip(starts[:-1], starts[:-1] + homes, starts[1:], strict=True)
    both = [
        [_collapsed(rows[a:b], vectors[a:b]) for a, b in ((start, middle), (middle, end))]
        for start, middle, end in parts
    ]
    return [each for each, _ in both], [each for _, each in both]


def _collapsed(rows: np.ndarray, vectors: np.ndarray) -> Clips:
    """Clips, with their equal vectors once where they are many: those of a crowd from all files would not fit into memory."""
    if len(rows) < _MANY:
        return Clips(rows, np.arange(len(rows)), vectors)
    firsts, same = distinct(vectors)
    return Clips(rows, same, vectors[firsts])


def _together(parts: Sequence[Clips]) -> Clips:
    offsets = np.cumsum([0, *(len(each.vectors) for each in parts)])
    return Clips(
        np.concatenate([each.rows for each in parts]),
        np.concatenate([each.kinds + offset for each, offset in zip(parts, offsets, strict=False)]),
        np.concatenate([each.vectors for each in parts]),
    )


def pairs_of(found: Found, cluster: int, homes: Clips, visitors: Clips, similarity: float) -> None:
    """Add the pairs of one cluster: of those at home in it, and of its visitors with them."""
    rows, vectors = _different(found, homes)
    guests, guest_vectors = _different(Found(), visitors)
    if len(rows) <= _MOST_CLIPS:
        _add(found, cluster, (rows, alike.normed(vectors)), (guests, alike.normed(guest_vectors)), similarity)
        return

    # too many for each with each: clusters of this cluster, across which pairs are lost
    found.cut.append(cluster)
    some = np.random.default_rng(0).choice(len(vectors), min(len(vectors), _MOST_CLIPS), replace=False)
    centres = centroids(alike.normed(vectors[np.sort(some)]), -(-2 * len(vectors) // _MOST_CLIPS), 10, 0)
    home, visiting = (_homes_of(each, centres) for each in (vectors, guest_vectors))
    for number in range(len(centres)):
        mine, near = np.flatnonzero(home == number), visiting == number
        others = alike.normed(guest_vectors[near])
        for piece in np.array_split(mine, -(-len(mine) // _MOST_CLIPS) or 1):
            _add(found, cluster, (rows[piece], alike.normed(vectors[piece])), (guests[near], others), similarity)


def _homes_of(vectors: np.ndarray, centres: np.ndarray) -> np.ndarray:
    """(N,) the nearest centroid of each vector (N, D) float16, few of which are made float32 at once."""
    blocks = [vectors[start : start + _MOST_CLIPS] for start in range(0, len(vectors), _MOST_CLIPS)]
    homes = [places_of(alike.normed(block), centres, 0).home for block in blocks]
    return np.concatenate([np.empty(0, np.int64), *homes])


def _different(found: Found, clips: Clips) -> tuple[np.ndarray, np.ndarray]:
    """The clips by row, of equal ones the first, which represents the others; and their vectors."""
    _, same = distinct(clips.vectors)
    order = np.argsort(clips.rows, kind="stable")
    rows, kinds = clips.rows[order], clips.kinds[order]
    _, firsts, same = np.unique(same[kinds], return_index=True, return_inverse=True)
    behind = np.flatnonzero(firsts[same] != np.arange(len(rows)))
    found.add(rows[firsts[same[behind]]], rows[behind], np.ones(len(behind), np.float32), crowd=True)
    chosen = np.sort(firsts)
    return rows[chosen], clips.vectors[kinds[chosen]]


def _add(found: Found, cluster: int, homes: tuple[np.ndarray, np.ndarray], visitors: Any, similarity: float) -> None:
    """Add the pairs of clips with different unit vectors (N, D) float32."""
    rows, unit = homes
    guests, others = visitors
    most = max(_FEW_PAIRS, _PAIRS_A_CLIP * (len(rows) + len(guests)))
    least = similarity - clusters.ROUNDING
    pairs, floor = _above(unit, others, least, most)
    if floor > least:
        leaders = _behind(found, rows, unit, float(np.cos(np.arccos(similarity) / 2)))
        rows, unit = rows[leaders], unit[leaders]
        pairs, floor = _above(unit, others, least, most)
    if floor > least:
        found.capped[cluster] = max(floor, found.capped.get(cluster, 0.0))
    every = np.append(rows, guests)
    found.add(every[pairs[0]], every[pairs[1]], pairs[2])


def _above(unit: np.ndarray, others: np.ndarray, least: float, most: int) -> tuple[list[np.ndarray], float]:
    """The pairs of `unit`, and of it with `others`, of at least a cosine, `most` of them; and the cosine above which they are all.

    Returns:
        Numbers of the one and of the other, those of `others` after those of `unit`, and cosines.
    """
    found: list[list[np.ndarray]] = [[np.empty(0, np.int64)] * 2 + [np.empty(0, np.float32)]]
    floor, count, every = least, 0, np.concatenate([unit, others])
    for start in range(0, len(unit), _BLOCK):
        cosines = unit[start : start + _BLOCK] @ every[start:].T
        one, other = np.nonzero(cosines >= floor)
        one, other = one[other > one], other[other > one]
        found.append([one + start, other + start, cosines[one, other]])
        count += len(one)
        if count > 2 * most:
            found = [[np.concatenate(each) for each in zip(*found, strict=True)]]
            # those of the same cosine go as well: there may be as many as all
            floor = float(np.nextafter(np.partition(found[0][2], -most)[-most], np.float32(2)))
            strong = found[0][2] >= floor
            found = [[each[strong] for each in found[0]]]
            count = int(strong.sum())
    return [np.concatenate(each) for each in zip(*found, strict=True)], floor


def _behind(found: Found, rows: np.ndarray, unit: np.ndarray, least: float) -> np.ndarray:
    """Put clips behind earlier ones of at least a cosine that stand behind none; returns the numbers of these."""
    leaders = np.empty(0, np.int64)
    for start in range(0, len(unit), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(unit)))
        if len(leaders):
            cosines = unit[block] @ unit[leaders].T
            nearest = cosines.argmax(1)
            best = cosines[np.arange(len(block)), nearest]
            near = best >= least
            found.add(rows[leaders[nearest[near]]], rows[block[near]], best[near], crowd=True)
            block = block[~near]
        cosines = unit[block] @ unit[block].T
        free = np.ones(len(block), bool)
        for number in range(len(block)):
            if free[number]:
                near = free & (cosines[number] >= least)
                near[: number + 1] = False
                found.add(
                    np.full(near.sum(), rows[block[number]]), rows[block[near]], cosines[number][near], crowd=True
                )
                free[near] = False
        leaders = np.append(leaders, block[free])
    return leaders
