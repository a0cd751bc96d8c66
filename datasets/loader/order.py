"""The order of an epoch as pure functions: no I/O, no state.

Blockwise shuffle: shards are permuted, then samples are shuffled within blocks of several shards, so that reading
keeps to a few tars at a time and any position is found without making the whole order. What it gives up: samples of
shards that are far apart in an epoch's permutation are never near each other in its order.

Global batches are pieces of the order; ranks take slices of a batch by position and workers take whole batches in
turn, so neither the world size nor the worker count changes what a batch holds.
"""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from longtake.datasets.errors import UserError

ORDER_VERSION = 2
ROUND = 1000  # batches after which the shares of a mixture are exact

Last = Literal["drop", "pad"]


@dataclass(frozen=True)
class Epoch:
    """The order of one epoch of S shards, of which several make a block; a block is shuffled when it is needed."""

    sizes: np.ndarray  # (S,) samples in each shard
    starts: np.ndarray  # (S,) number of each shard's first sample
    shards: np.ndarray  # those with samples, in the order in which they are read
    ends: np.ndarray  # the position after each block
    block: int  # shards in a block
    seed: tuple[int, int] | None  # (seed, epoch); None: in the order on disk
    _latest: dict[int, np.ndarray] = field(default_factory=dict, compare=False)  # blocks that were shuffled last

    def samples(self, positions: np.ndarray) -> np.ndarray:
        """(P,) the numbers of the samples at these (P,) positions of the epoch."""
        if self.seed is None:
            return np.asarray(positions)
        blocks = self.ends.searchsorted(positions, "right")
        if len(blocks) and (blocks == blocks[0]).all():
            number = int(blocks[0])
            return self._shuffled(number)[positions - (self.ends[number - 1] if number else 0)]
        samples = np.empty(len(positions), np.int64)
        for number in np.unique(blocks).tolist():
            in_block = blocks == number
            start = self.ends[number - 1] if number else 0
            samples[in_block] = self._shuffled(number)[positions[in_block] - start]
        return samples

    def blocks(self, positions: np.ndarray) -> np.ndarray:
        """The shards that samples at these positions are drawn from, in the order in which they are needed."""
        numbers = np.unique(np.searchsorted(self.ends, positions, "right"))
        return np.concatenate([self.shards[n * self.block : (n + 1) * self.block] for n in numbers.tolist()])

    def _shuffled(self, number: int) -> np.ndarray:
        """The samples of a block, in the order in which they come."""
        if (known := self._latest.get(number)) is not None:
            return known
        shards = self.shards[number * self.block : (number + 1) * self.block]
        samples = np.concatenate([np.arange(self.starts[s], self.starts[s] + self.sizes[s]) for s in shards])
        shuffled = _rng(*self.seed, 1 + number).permutation(samples)  # type: ignore[misc]
        # a batch is of one block, or of the end of one and the start of the next
        while len(self._latest) > 1:
            self._latest.pop(next(iter(self._latest)))
        self._latest[number] = shuffled
        return shuffled


def epoch(sizes: np.ndarray, seed: int, number: int, block: int = 16, shuffle: bool = True) -> Epoch:
    """The order of epoch `number`: each sample exactly once.

    Args:
        sizes: (S,) samples in each shard; sample i of shard s has number `sizes[:s].sum() + i`.
        block: how many shards are shuffled together.
    """
    sizes = np.asarray(sizes, np.int64)
    shards = _rng(seed, number, 0).permutation(len(sizes)) if shuffle else np.arange(len(sizes))
    shards = shards[sizes[shards] > 0]
    ends = (
        np.cumsum(sizes[shards])[np.r_[block - 1 : len(shards) : block, len(shards) - 1]] if len(shards) else sizes[:0]
    )
    return Epoch(sizes, np.cumsum(sizes) - sizes, shards, np.unique(ends), block, (seed, number) if shuffle else None)


def repeats(weights: np.ndarray, total: int, seed: int, number: int) -> np.ndarray:
    """(N,) how often each of N samples comes in epoch `number`: its share of `total`, rounded down or up so that all add up.

    Systematic resampling: over the epochs each sample comes as often as its weight says.
    """
    edges = np.concatenate([[0.0], np.cumsum(weights, dtype=np.float64)])
    edges = np.floor(edges * (total / edges[-1]) + _rng(seed, number, 0).random())
    # exactly `total`, and none negative, whatever the rounding of the sum
    edges = np.minimum(edges, total)
    edges[-1] = total
    return np.diff(edges).astype(np.int64)


def batch_count(samples: int, global_batch: int, last: Last) -> int:
    """Batches in an epoch: `drop` leaves the last incomplete one out, `pad` fills it from the epoch's start."""
    return samples // global_batch if last == "drop" else -(-samples // global_batch)


def schedule(counts: Sequence[int], seed: int, number: int, shuffle: bool = True) -> np.ndarray:
    """(M,) the bucket of each batch of epoch `number`, where bucket b has counts[b] batches."""
    buckets = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    return _rng(seed, number, 0).permutation(buckets) if shuffle else buckets


def mixed(weights: Sequence[float], seed: int, number: int) -> tuple[int, int]:
    """The loader of several that global batch `number` comes from, and the number of that loader's batch.

    In every `ROUND` batches each loader has its share, to the nearest batch.
    """
    counts = shares(weights)
    round_, turn = divmod(number, ROUND)
    parts = _rng(seed, round_, 0).permutation(np.repeat(np.arange(len(counts)), counts))
    part = int(parts[turn])
    return part, round_ * int(counts[part]) + int((parts[:turn] == part).sum())


def shares(weights: Sequence[float], total: int = ROUND) -> np.ndarray:
    """Whole numbers in proportion to `weights` that add up to `total`, by the largest remainders."""
    exact = np.asarray(weights, np.float64) * total / np.sum(weights)
    counts = np.floor(exact).astype(np.int64)
    counts[np.argsort(counts - exact, kind="stable")[: total - counts.sum()]] += 1
    return counts


def positions(batch: int, global_batch: int, samples: int) -> np.ndarray:
    """(global_batch,) positions in the epoch of one global batch; after the epoch's end come those of its start."""
    return np.arange(batch * global_batch, (batch + 1) * global_batch) % samples


def rank_slice(rows: np.ndarray, rank: int, world: int) -> np.ndarray:
    """The slice of a global batch that one rank sees: equal sizes, in position order."""
    return rows.reshape(world, -1)[rank]


def check_batch(samples: int, global_batch: int, world: int, last: Last, where: str) -> None:
    """Refuse a batch that does not divide among the ranks, or an epoch without batches.

    Raises:
        UserError: naming the numbers and the remedy.
    """
    if global_batch < 1 or global_batch % world:
        raise UserError(
            f"batch: {global_batch} samples do not divide among {world} processes; choose a multiple of {world}"
        )
    if samples == 0:
        raise UserError(
            f"{where}: no usable sample; loosen the view, or lower `frames` (for tokens, of `cache_tokens`) below the clips'"
            " length"
        )
    if batch_count(samples, global_batch, last) == 0:
        raise UserError(f"{where}: {samples} samples give no batch of {global_batch}; lower `batch` or use `last: pad`")


def sample_rng(seed: int, epoch: int, key: str, copy: int = 0) -> np.random.Generator:
    """The random numbers of one sample in one epoch, the same wherever and whenever it is read.

    `copy` numbers the times that a sample comes in the epoch. The generator is the thread's own: its next call gives it to
    another sample.
    """
    digest = hashlib.blake2b(f"{seed} {epoch} {copy} {key}".encode(), digest_size=16).digest()
    # as a new Philox(key=...), which would take as long as reading a latent: it asks the system for entropy
    own = _own
    own.state["state"]["key"] = int.from_bytes(digest[8:]), int.from_bytes(digest[:8])
    own.bits.state = own.state
    return own.generator


class _Own(threading.local):
    """The generator of each thread, and its state before the first draw, in which a sample sets its key."""

    def __init__(self) -> None:
        zeros = (0, 0, 0, 0)
        fresh = {"bit_generator": "Philox", "buffer": zeros, "buffer_pos": 4, "has_uint32": 0, "uinteger": 0}
        self.bits = np.random.Philox(0)
        self.generator = np.random.Generator(self.bits)
        self.state: Any = fresh | {"state": {"counter": zeros, "key": (0, 0)}}


_own = _Own()


def _rng(*numbers: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(numbers)))
