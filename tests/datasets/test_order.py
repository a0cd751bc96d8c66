import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import order
from longtake.datasets.errors import UserError

sizes = st.lists(st.integers(0, 30), min_size=1, max_size=40)
seeds = st.integers(0, 2**32 - 1)


@given(sizes, seeds, st.integers(0, 5), st.integers(1, 20))
def test_an_epoch_holds_each_sample_exactly_once(shard_sizes: list[int], seed: int, epoch: int, block: int) -> None:
    sequence = order.epoch_order(np.array(shard_sizes), seed, epoch, block)
    assert sorted(sequence.tolist()) == list(range(sum(shard_sizes)))


@given(sizes, seeds, st.integers(1, 64), st.integers(1, 4), st.sampled_from(["drop", "pad"]))
def test_ranks_split_the_same_global_batches_whatever_their_number(
    shard_sizes: list[int], seed: int, world: int, per_rank: int, last: order.Last
) -> None:
    total, batch = sum(shard_sizes), world * per_rank
    sequence = order.epoch_order(np.array(shard_sizes), seed, 0)
    count = order.batch_count(total, batch, last)
    alone = [order.batch_rows(sequence, b, batch) for b in range(count)] if total else []
    for rows in alone:
        parts = [order.rank_rows(rows, rank, world) for rank in range(world)]
        assert {len(p) for p in parts} == {per_rank}
        assert np.concatenate(parts).tolist() == rows.tolist()
    seen = [n for rows in alone for n in rows.tolist()]
    if last == "drop":
        assert len(seen) == len(set(seen)) == count * batch
    elif total:
        assert set(seen) == set(range(total))
        assert len(seen) - total < batch


@given(seeds)
def test_samples_stay_within_their_block_of_shards(seed: int) -> None:
    sequence = order.epoch_order(np.full(40, 10), seed, 0, block=4)
    for start in range(0, 400, 40):
        assert len({n // 10 for n in sequence[start : start + 40].tolist()}) == 4


def test_epochs_differ_and_repeat() -> None:
    one = order.epoch_order(np.full(8, 9), 1, 0)
    assert one.tolist() == order.epoch_order(np.full(8, 9), 1, 0).tolist()
    assert one.tolist() != order.epoch_order(np.full(8, 9), 1, 1).tolist()
    assert order.sample_rng(1, 0, "ab12-00001").integers(1 << 60) == order.sample_rng(1, 0, "ab12-00001").integers(
        1 << 60
    )
    assert order.sample_rng(1, 0, "ab12-00001").integers(1 << 60) != order.sample_rng(1, 0, "ab12-00002").integers(
        1 << 60
    )


@pytest.mark.parametrize(
    ("samples", "batch", "world", "says"),
    [(5, 3, 2, "do not divide"), (0, 2, 1, "no usable sample"), (3, 4, 1, "no batch of 4")],
)
def test_a_batch_that_cannot_be_is_refused(samples: int, batch: int, world: int, says: str) -> None:
    with pytest.raises(UserError, match=says):
        order.check_batch(samples, batch, world, "drop", "here")
