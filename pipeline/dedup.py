"""Find rows that repeat earlier ones: by content, by perceptual hash, by embedding.

Rows come in order of preference and are judged in that order: a row is dropped if it repeats an earlier one that stays.
So each dropped row is like one that stays, and no two that stay are alike.
"""

import math
from collections.abc import Iterable
from functools import reduce
from itertools import combinations
from operator import or_

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import clusters

_FIRST_BATCH, _GROWTH = 1024, 4
_MOST_PAIRS = 1 << 24
_PAIRS_A_SORT = 20  # candidate pairs that are compared in the time of sorting one hash
_BLOCK = 1024


def exact(sha256s: pa.ChunkedArray) -> np.ndarray:
    """(N,) bool: an earlier row has the same text. A null equals nothing."""
    codes = pc.fill_null(sha256s.combine_chunks().dictionary_encode().indices, -1).to_numpy(zero_copy_only=False)
    repeats = codes >= 0
    repeats[np.unique(codes, return_index=True)[1]] = False
    return repeats


def near(hashes: np.ndarray, radius: int) -> np.ndarray:
    """(N,) bool: an earlier row that stays differs in at most `radius` bits. No such pair is missed.

    A million random hashes take 2 s at radius 4, 20 s at 8, a minute at 10, half an hour at 16.

    Args:
        hashes: (N,) uint64.
        radius: 0..16.
    """
    distinct, first = np.unique(hashes, return_index=True)
    order = np.argsort(first)
    drop = np.ones(len(hashes), bool)
    drop[first[order][_kept_hashes(distinct[order], radius)]] = False
    return drop


def semantic(pairs: Iterable[pa.Table], rows: np.ndarray, similarity: float) -> np.ndarray:
    """(N,) bool: an earlier row that stays is of at least this cosine, by the pairs of a `cluster` stage.

    Those of a crowd who are within half the angle of their representative are surely alike: the first of them stays for all.

    Args:
        pairs: see `clusters.pair_tables`; a pair may come twice.
        rows: (N,) int64, the clips' rows in the dataset (see `clusters.numbers`) in order of preference, each once. Pairs
            with other clips do not count.
        similarity: a cosine, above 0 up to 1.
    """
    least = similarity - clusters.ROUNDING
    half = np.cos(np.arccos(np.clip(similarity, -1, 1)) / 2) - clusters.ROUNDING
    behind, others, size = [], [], 1 + int(rows.max(initial=0))
    for table in pairs:
        both = np.stack([table["first"].to_numpy(), table["second"].to_numpy()])
        cosine, crowd = table["cosine"].to_numpy(), np.asarray(table["crowd"])
        close = crowd & (cosine >= half)
        behind.append(both[:, close])
        others.append(both[:, (cosine >= least) & ~close])
        size = max(size, 1 + int(both.max(initial=0)))

    # each stands for itself, or the representative for it, which need not be one of the rows
    stands = np.arange(size)
    for first, second in behind:
        stands[second] = first
    stands = stands[stands]  # of equal clips one may itself stand behind one that it is near to
    mine = stands[rows]
    place = np.full(size, len(rows))
    np.minimum.at(place, mine, np.arange(len(rows)))
    drop = place[mine] != np.arange(len(rows))

    # between those that stand for others or for themselves
    place = place.astype(np.int32 if len(rows) < 1 << 31 else np.int64)
    near: list[tuple[np.ndarray, np.ndarray]] = [(np.empty(0, place.dtype),) * 2]
    while others:
        one, other = place[stands[others.pop()]]
        both = (one < len(rows)) & (other < len(rows)) & (one != other)
        near.append((np.minimum(one[both], other[both]), np.maximum(one[both], other[both])))
    earlier, later = (np.concatenate(each) for each in zip(*near, strict=True))
    del near
    return drop | _repeats(earlier, later, len(rows))


def similar(unit: np.ndarray, similarity: float) -> np.ndarray:
    """(N,) bool: an earlier unit vector (N, D) that stays has at least this cosine. All are compared with those that stay."""
    stay = np.empty(0, np.int64)
    for start in range(0, len(unit), _BLOCK):
        block = np.arange(start, min(start + _BLOCK, len(unit)))
        block = block[~(unit[block] @ unit[stay].T >= similarity).any(axis=1)]
        earlier, later = np.nonzero(np.triu(unit[block] @ unit[block].T >= similarity, 1))
        stay = np.append(stay, block[~_repeats(earlier, later, len(block))])
    drop = np.ones(len(unit), bool)
    drop[stay] = False
    return drop


def _kept_hashes(hashes: np.ndarray, radius: int) -> np.ndarray:
    """The indices of the distinct hashes that stay.

    Batches grow: the kept hashes of earlier ones drop most of a crowd before its own pairs are compared.
    """
    stay = np.empty(0, np.int64)
    start, size = 0, _FIRST_BATCH
    while start < len(hashes):
        batch = np.arange(start, min(start + size, len(hashes)))
        masks = bit_masks(radius, len(stay) + len(batch))
        candidates = batch[~_near_any(hashes[batch], hashes[stay], radius, masks)]
        pairs = _pairs(hashes[candidates], radius, masks)
        if pairs is None:
            size //= _GROWTH
            continue
        stay = np.append(stay, candidates[~_repeats(*pairs, len(candidates))])
        start += len(batch)
        size *= _GROWTH
    return stay


def bit_masks(radius: int, count: int) -> list[np.uint64]:
    """Bit masks such that any two hashes within `radius` bits are equal under at least one of them.

    Of `radius + k` bands at least k have no differing bit. A greater k means fewer chance matches but more masks; the k
    with the least work for `count` hashes is chosen (0 compares all with all).
    """

    def work(k: int) -> float:
        chance = 2.0 ** (-64 * k / max(1, radius + k))
        return math.comb(radius + k, k) * count * (_PAIRS_A_SORT + count / 2 * chance)

    k = min(range(5), key=work)
    bands = max(1, radius + k)
    # neighbouring bits of a perceptual hash correlate, so that a band of distant bits tells more hashes apart
    masks = [sum(1 << bit for bit in range(band, 64, bands)) for band in range(bands)]
    return [np.uint64(reduce(or_, chosen, 0)) for chosen in combinations(masks, k)]


def _near_any(hashes: np.ndarray, others: np.ndarray, radius: int, masks: list[np.uint64]) -> np.ndarray:
    """(N,) bool: one of the others is within the radius."""
    near = np.zeros(len(hashes), bool)
    for mask in masks:
        ordered = others[np.argsort(others & mask)]
        keys = ordered & mask
        rows = np.flatnonzero(~near)
        rows = rows[np.argsort(hashes[rows] & mask)]  # ascending values keep searchsorted in the cache
        position, end = (np.searchsorted(keys, hashes[rows] & mask, side) for side in ("left", "right"))
        while len(rows):
            live = position < end
            rows, position, end = rows[live], position[live], end[live]
            close = np.bitwise_count(ordered[position] ^ hashes[rows]) <= radius
            near[rows[close]] = True
            rows, position, end = rows[~close], position[~close] + 1, end[~close]
    return near


def _pairs(hashes: np.ndarray, radius: int, masks: list[np.uint64]) -> tuple[np.ndarray, np.ndarray] | None:
    """All pairs within the radius, perhaps repeated, as indices (earlier, later); None where they are too many."""
    ones, others, count = [np.empty(0, np.int64)], [np.empty(0, np.int64)], 0
    for mask in masks:
        order = np.argsort(hashes & mask)
        ordered = hashes[order]
        keys = ordered & mask
        rows, offset = np.arange(len(keys)), 1
        while len(rows := rows[rows + offset < len(keys)]) and len(rows := rows[keys[rows] == keys[rows + offset]]):
            close = rows[np.bitwise_count(ordered[rows] ^ ordered[rows + offset]) <= radius]
            ones.append(order[close])
            others.append(order[close + offset])
            count += len(close)
            if count > _MOST_PAIRS:
                return None
            offset += 1
    one, other = np.concatenate(ones), np.concatenate(others)
    return np.minimum(one, other), np.maximum(one, other)


def _repeats(earlier: np.ndarray, later: np.ndarray, count: int) -> np.ndarray:
    """(count,) bool: the rows that are dropped when the later row of each pair is dropped if the earlier one stays."""
    drop = np.zeros(count, bool)
    while len(earlier):
        undecided = np.zeros(count, bool)
        undecided[later] = True
        drop[later[~undecided[earlier]]] = True
        live = undecided[earlier] & ~drop[earlier] & ~drop[later]
        earlier, later = earlier[live], later[live]
    return drop
