"""The order of an epoch as pure functions: no I/O, no state.

Blockwise shuffle: shards are permuted, then samples are shuffled within blocks of several shards, so that reading
keeps to a few tars at a time. What it gives up: two samples far apart on disk in the same epoch's permutation
never meet in one block. Global batches are rows of the order; ranks take slices of a batch by position and
workers take whole batches in turn, so neither the world size nor the worker count changes what a batch holds.
"""

from typing import Literal

import numpy as np

from longtake.datasets.errors import UserError

ORDER_VERSION = 1

Last = Literal["drop", "pad"]


def epoch_order(shard_sizes: np.ndarray, seed: int, epoch: int, block: int = 16, shuffle: bool = True) -> np.ndarray:
    """The global sequence of an epoch.

    Args:
        shard_sizes: (S,) samples in each shard; sample i of shard s has number `shard_sizes[:s].sum() + i`.
        block: how many shards are shuffled together.

    Returns:
        (N,) int64, each sample's number exactly once.
    """
    sizes = np.asarray(shard_sizes, dtype=np.int64)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    if not shuffle:
        return np.arange(starts[-1])
    rng = np.random.Generator(np.random.Philox(key=[seed, epoch]))
    shards = rng.permutation(len(sizes))
    parts = []
    for first in range(0, len(shards), block):
        numbers = np.concatenate([np.arange(starts[s], starts[s + 1]) for s in shards[first : first + block]])
        parts.append(rng.permutation(numbers))
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def batch_count(samples: int, global_batch: int, last: Last) -> int:
    """Batches in an epoch: `drop` leaves the last incomplete one out, `pad` fills it from the epoch's start."""
    return samples // global_batch if last == "drop" else -(-samples // global_batch)


def batch_rows(order: np.ndarray, batch: int, global_batch: int) -> np.ndarray:
    """(global_batch,) sample numbers of one global batch; beyond the end it starts again at the front."""
    return np.take(order, np.arange(batch * global_batch, (batch + 1) * global_batch), mode="wrap")


def rank_rows(rows: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The slice of a global batch that one rank sees: equal sizes, in position order."""
    return rows.reshape(world, -1)[rank]


def check_batch(samples: int, global_batch: int, world: int, last: Last, what: str) -> None:
    """Refuse a batch that gives uneven ranks or an endless epoch of nothing.

    Raises:
        UserError: naming the numbers and the remedy.
    """
    if global_batch < 1 or global_batch % world:
        raise UserError(
            f"batch: {global_batch} samples do not divide among {world} processes; choose a multiple of {world}"
        )
    if samples == 0:
        raise UserError(f"{what}: no usable sample; loosen the view, or lower `frames` below the clips' length")
    if batch_count(samples, global_batch, last) == 0:
        raise UserError(f"{what}: {samples} samples give no batch of {global_batch}; lower `batch` or use `last: pad`")


def sample_rng(seed: int, epoch: int, key: str) -> np.random.Generator:
    """Random numbers of one sample in one epoch, the same wherever and whenever it is read."""
    digits, _, clip = key.partition("-")
    mixed = (int(digits, 16) ^ int(clip or 0) << 64) & (2**128 - 1)
    return np.random.Generator(
        np.random.Philox(key=np.random.SeedSequence([seed, epoch, mixed]).generate_state(2, np.uint64))
    )
