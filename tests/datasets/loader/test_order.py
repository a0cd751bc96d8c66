"""The order as pure functions, and the whole plan of a loader with reading left out."""

from collections import Counter
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtake.datasets.errors import UserError
from longtake.datasets.loader import batches, order
from longtake.datasets.loader.batches import Batches
from longtake.datasets.loader.buckets import Bucket
from longtake.datasets.loader.window import Window

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=40)
seeds = st.integers(0, 2**32 - 1)


def whole(shard_sizes: Any, seed: int, number: int, **options: Any) -> np.ndarray:
    """All samples of an epoch in order."""
    return order.epoch(np.array(shard_sizes), seed, number, **options).samples(np.arange(np.sum(shard_sizes)))


@given(sizes, seeds, st.integers(0, 5), st.integers(1, 20), st.booleans())
def test_an_epoch_holds_each_sample_exactly_once(
    shard_sizes: list[int], seed: int, number: int, block: int, shuffle: bool
) -> None:
    sequence = whole(shard_sizes, seed, number, block=block, shuffle=shuffle).tolist()
    assert sorted(sequence) == list(range(sum(shard_sizes)))
    assert shuffle or sequence == sorted(sequence)


@given(sizes, seeds, st.integers(1, 6), st.data())
def test_any_positions_are_found_as_in_the_whole_sequence(
    shard_sizes: list[int], seed: int, block: int, data: st.DataObject
) -> None:
    total = sum(shard_sizes)
    some = np.array(data.draw(st.lists(st.integers(0, max(0, total - 1)), max_size=20 if total else 0)), np.int64)
    sequence = order.epoch(np.array(shard_sizes), seed, 3, block)
    found = sequence.samples(some)
    assert found.tolist() == whole(shard_sizes, seed, 3, block=block)[some].tolist()
    if len(some):
        ends = np.cumsum(shard_sizes)
        assert set(np.searchsorted(ends, found, "right").tolist()) <= set(sequence.blocks(some).tolist())


@given(seeds, st.integers(1, 7))
def test_samples_stay_within_their_block_of_shards(seed: int, block: int) -> None:
    sequence = whole(np.full(40, 10), seed, 0, block=block)
    for start in range(0, 400, 10 * block):
        here = {n // 10 for n in sequence[start : start + 10 * block].tolist()}
        assert len(here) == min(block, 40 - start // 10)
    assert sequence.tolist() != list(range(400))


class Plans:
    """Batches of the keys "ROW.COPY" for any rank and worker, in place of what is read."""

    def __init__(self, shard_sizes: list[int], counts: list[int], batch: int, last: order.Last, seed: int, **more: Any):
        ends = np.cumsum(shard_sizes)
        base = SimpleNamespace(starts=ends - np.array(shard_sizes))
        self.split: Any = SimpleNamespace(
            base=base, columns={}, latents=(), texts=(), live=(), reader=SimpleNamespace(cache=None)
        )
        parts = np.split(np.random.default_rng(seed).permutation(int(ends[-1])), np.cumsum(counts))
        self.rows = [np.sort(p).astype(np.int32) for p in parts[: len(counts)]]
        weights = more.get("weights")
        self.buckets = [
            Bucket(Window(n + 1, 1, (8, 8), False), batch, rows, None if weights is None else weights[rows], len(rows))
            for n, rows in enumerate(self.rows)
        ]
        self.counts = [order.batch_count(len(rows), batch, last) for rows in self.rows]
        self.seed, self.batch = seed, batch

    def rank(self, rank: int, world: int, workers: int, start: int, end: int) -> list[list[str]]:
        """The batches of one rank as its workers give them, dealt in turn."""

        def load(split: Any, sample: Any, window: Window, _: Any) -> dict[str, Any]:
            row = int(split.base.starts[sample.shard]) + sample.row
            return {"key": f"{window.frames}:{row}.{sample.chance[2]}"}

        plan = Batches(self.split, self.buckets, self.counts, self.seed, True, rank, world, False, False)
        step = max(1, workers)
        with mock.patch.object(batches, "load", load):
            dealt = [plan.make(iter(range(start + w, end, step))) for w in range(step)]
            return [next(dealt[n % step])["key"] for n in range(end - start)]


@settings(max_examples=60)
@given(
    shard_sizes=st.lists(st.integers(0, 12), min_size=1, max_size=12).filter(lambda s: sum(s) >= 1),
    world=st.integers(1, 64),
    per_rank=st.integers(1, 3),
    workers=st.integers(0, 8),
    last=st.sampled_from(["drop", "pad"]),
    seed=seeds,
    data=st.data(),
)
def test_every_world_and_worker_count_sees_the_same_global_batches(
    shard_sizes: list[int],
    world: int,
    per_rank: int,
    workers: int,
    last: order.Last,
    seed: int,
    data: st.DataObject,
) -> None:
    total = sum(shard_sizes)
    first = data.draw(st.integers(0, total))
    plans = Plans(shard_sizes, [first, total - first], world * per_rank, last, seed)
    if not (length := sum(plans.counts)):
        return
    start = data.draw(st.integers(0, length))
    alone = plans.rank(0, 1, 0, 0, 2 * length)
    ranks = [plans.rank(rank, world, workers, start, 2 * length) for rank in range(world)]
    assert {len(part) for rank in ranks for part in rank} <= {per_rank}
    joined = [[key for part in parts for key in part] for parts in zip(*ranks, strict=True)]
    assert joined == alone[start:]
    for number, rows in enumerate(plans.rows):
        seen = Counter(k for b in alone[:length] for k in b if k.startswith(f"{number + 1}:"))
        assert all(len({k.partition(":")[0] for k in b}) == 1 for b in alone)
        if last == "drop":
            assert set(seen.values()) <= {1} and len(seen) == len(rows) // plans.batch * plans.batch
        else:
            assert set(seen) == {f"{number + 1}:{row}.0" for row in rows.tolist()}
            assert sum(seen.values()) - len(rows) < plans.batch


@given(st.lists(st.floats(0.01, 5), min_size=2, max_size=30), seeds)
def test_a_weighted_epoch_has_as_many_samples_and_tells_copies_apart(weights: list[float], seed: int) -> None:
    plans = Plans([len(weights)], [len(weights)], 1, "drop", seed, weights=np.array(weights))
    keys = [key for (key,) in plans.rank(0, 1, 0, 0, len(weights))]
    assert len(set(keys)) == len(weights)
    counts = Counter(int(key.partition(":")[2].partition(".")[0]) for key in keys)
    wanted = np.array(weights) / np.mean(weights)
    assert all(wanted[n] - 1.001 < counts[n] < wanted[n] + 1.001 for n in range(len(weights)))


@given(st.lists(st.floats(0, 9), min_size=1, max_size=50).filter(lambda w: sum(w) > 0.1), st.integers(0, 200), seeds)
def test_repeats_are_the_weights_rounded_down_or_up(weights: list[float], total: int, seed: int) -> None:
    times = order.repeats(np.array(weights), total, seed, 0)
    exact = np.array(weights) * total / np.sum(weights)
    assert times.sum() == total and (times >= 0).all()
    assert (times >= np.floor(exact - 1e-9)).all() and (times <= np.ceil(exact + 1e-9)).all()


def test_repeats_come_in_the_long_run_as_often_as_the_weights_say() -> None:
    weights = np.random.default_rng(1).uniform(0.1, 3, 50)
    mean = np.mean([order.repeats(weights, 50, 7, epoch) for epoch in range(3000)], 0)
    assert np.abs(mean - weights / weights.mean()).max() < 0.05


def test_repeats_are_never_negative_at_the_edge_of_rounding() -> None:
    almost_one = mock.Mock(random=lambda: 1 - 2**-53)
    with mock.patch.object(order, "_rng", lambda *_: almost_one):
        times = order.repeats(np.array([1.0] * 1000 + [1e-30]), 1000, 0, 0)
    assert times.min() >= 0 and times.sum() == 1000


@given(st.lists(st.integers(0, 20), min_size=1, max_size=6), seeds, st.integers(0, 9))
def test_a_schedule_has_each_bucket_as_often_as_it_has_batches(counts: list[int], seed: int, number: int) -> None:
    turns = order.schedule(counts, seed, number)
    assert np.bincount(turns, minlength=len(counts)).tolist() == counts
    assert order.schedule(counts, seed, number, shuffle=False).tolist() == sorted(turns.tolist())
    assert turns.tolist() == order.schedule(counts, seed, number).tolist()


@settings(max_examples=10)
@given(st.lists(st.floats(0.01, 10), min_size=1, max_size=5), seeds)
def test_a_mixture_has_its_shares_in_every_round_and_no_holes(weights: list[float], seed: int) -> None:
    counts = order.shares(weights)
    assert counts.sum() == order.ROUND
    assert np.abs(counts - np.array(weights) / np.sum(weights) * order.ROUND).max() < 1
    seen = [order.mixed(weights, seed, number) for number in range(2 * order.ROUND)]
    for start in (0, order.ROUND):
        parts = [part for part, _ in seen[start : start + order.ROUND]]
        assert np.bincount(parts, minlength=len(weights)).tolist() == counts.tolist()
    for part in range(len(weights)):
        nth = [n for p, n in seen if p == part]
        assert nth == list(range(len(nth)))


def test_epochs_differ_and_repeat() -> None:
    one = whole(np.full(8, 9), 1, 0).tolist()
    assert one == whole(np.full(8, 9), 1, 0).tolist()
    assert one != whole(np.full(8, 9), 1, 1).tolist() and one != whole(np.full(8, 9), 2, 0).tolist()
    draws = [
        order.sample_rng(*arguments).integers(1 << 60)
        for arguments in [(1, 0, "a"), (1, 0, "a"), (1, 0, "b"), (1, 1, "a"), (2, 0, "a"), (1, 0, "a", 1)]
    ]
    assert draws[0] == draws[1] and len(set(draws)) == 5


@pytest.mark.parametrize(
    ("samples", "batch", "world", "says"),
    [
        (5, 3, 2, "do not divide"),
        (5, 0, 1, "do not divide"),
        (0, 2, 1, "no usable sample"),
        (3, 4, 1, "no batch of 4"),
        (3, 4, 4, "no batch of 4"),
    ],
)
def test_a_batch_that_cannot_be_is_refused(samples: int, batch: int, world: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        order.check_batch(samples, batch, world, "drop", "here")


def test_padding_makes_a_batch_of_fewer_samples_than_ranks() -> None:
    order.check_batch(3, 4, 4, "pad", "here")
    assert order.positions(0, 8, 3).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
