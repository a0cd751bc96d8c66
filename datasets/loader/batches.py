"""From the number of a batch to the batch: its samples on a rank, read, decoded and stacked.

`Batches` travels to worker processes as it is. It holds row numbers, and no rows of an index that is in a file.
"""

import functools
import sys
from collections import deque
from collections.abc import Collection, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from longtake.datasets.errors import Failure
from longtake.datasets.loader import latents_alone, order
from longtake.datasets.loader.buckets import Bucket
from longtake.datasets.loader.pixels import pixels
from longtake.datasets.loader.room import Empty, Room, tensor_bytes
from longtake.datasets.loader.split import Split
from longtake.datasets.loader.window import Sample, Window, load
from longtake.datasets.masking import shown

# samples of a remote dataset: read at once, and under way at least and, of small ones, at most
_THREADS, _AHEAD, _MOST_AHEAD = 32, 32, 256
_BYTES_AHEAD = 64 << 20  # of more samples than the least
_FETCHES = 2  # tars that are fetched to the cache at once, before they are needed


@dataclass
class Batches:
    """The plan of a `Loader`."""

    split: Split
    buckets: list[Bucket]
    counts: list[int]  # batches of each bucket in an epoch
    seed: int
    shuffle: bool
    rank: int
    world: int
    remote: bool  # wait for the store in threads, several batches ahead
    skip: bool  # leave out samples that cannot be read
    _epochs: dict[tuple[int, int], tuple[order.Epoch, np.ndarray, np.ndarray | None]] = field(default_factory=dict)
    _fetched: set[tuple[int, int, int]] = field(default_factory=set)

    def make(self, numbers: Iterator[int], empty: Empty = np.empty) -> Generator[dict[str, Any]]:
        if not self.remote:
            alone = latents_alone.is_alone(self.split) and not self.skip
            for number in numbers:
                epoch, window, samples = self.samples_of(number)
                if alone and (batch := latents_alone.batch(self.split, window, samples, empty)):
                    yield batch | {"epoch": epoch}
                    continue
                room = Room(len(samples), empty)
                yield self._batch(epoch, [self._load(*one, window, room) for one in enumerate(samples)], room)
            return
        waiting: deque[tuple[int, list[Future[Any]], Room]] = deque()
        most = _AHEAD
        with ThreadPoolExecutor(_THREADS) as pool, ThreadPoolExecutor(_FETCHES) as ahead:
            try:
                for number in numbers:
                    epoch, window, samples = self.samples_of(number)
                    room = Room(len(samples), empty)
                    loading = [pool.submit(self._load, *one, window, room) for one in enumerate(samples)]
                    waiting.append((epoch, loading, room))
                    self._fetch_ahead(number, ahead)
                    while sum(len(futures) for _, futures, _ in waiting) > most:
                        epoch, futures, room = waiting.popleft()
                        batch = self._batch(epoch, [future.result() for future in futures], room)
                        most = _samples_ahead(batch)
                        yield batch
                while waiting:
                    epoch, futures, room = waiting.popleft()
                    yield self._batch(epoch, [future.result() for future in futures], room)
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                ahead.shutdown(wait=False, cancel_futures=True)

    def _load(self, place: int, sample: Sample, window: Window, room: Room) -> dict[str, Any] | Failure:
        try:
            loaded = load(self.split, sample, window, room.of_sample(place))
            return loaded | {"pixels": pixels(self.split, sample, window, loaded)} if self.split.live else loaded
        except Failure as e:
            if not self.skip:
                raise
            return e

    def _batch(self, epoch: int, samples: list[dict[str, Any] | Failure], room: Room) -> dict[str, Any]:
        good = [n for n, sample in enumerate(samples) if not isinstance(sample, Failure)]
        if not good:
            assert isinstance(samples[0], Failure)
            raise samples[0]
        for sample in samples:
            if isinstance(sample, Failure):
                print(shown(f"warning: skipped: {sample}"), file=sys.stderr)
        # readable samples fill the places: all ranks keep the same batch size
        filled = [*good, *(good[n % len(good)] for n in range(len(samples) - len(good)))]
        out = collate(samples, filled, room, self.split.latents, self.split.texts) | {"epoch": epoch}
        return out | ({"skipped": len(samples) - len(good)} if self.skip else {})

    def samples_of(self, number: int) -> tuple[int, Window, list[Sample]]:
        """The epoch, window and samples of this rank's share of global batch `number`."""
        epoch, bucket, nth = self._turn(number)
        b = self.buckets[bucket]
        sequence, rows, copies = self._epoch(bucket, epoch)
        positions = order.rank_slice(order.positions(nth, b.batch, len(rows)), self.rank, self.world)
        picked = sequence.samples(positions)
        starts, rows = self.split.base.starts, rows[picked]
        shards = starts.searchsorted(rows, "right") - 1
        places = zip(shards.tolist(), (rows - starts[shards]).tolist(), strict=True)
        if not (self.shuffle or b.window.clip_starts is not None):
            return epoch, b.window, [Sample(shard, row, None, number) for shard, row in places]
        copied = [0] * len(rows) if copies is None else copies[picked].tolist()
        chances = [(self.seed, epoch, copy) for copy in copied]
        return epoch, b.window, [Sample(*place, chance, number) for place, chance in zip(places, chances, strict=True)]

    def _turn(self, number: int) -> tuple[int, int, int]:
        """The epoch of a batch, its bucket, and its number among the bucket's batches of the epoch."""
        epoch, within = divmod(number, sum(self.counts))
        if len(self.counts) == 1:
            return epoch, 0, within
        turns, nth = _schedule(tuple(self.counts), self.seed, epoch, self.shuffle)
        return epoch, int(turns[within]), int(nth[within])

    def _epoch(self, bucket: int, epoch: int) -> tuple[order.Epoch, np.ndarray, np.ndarray | None]:
        """The order of a bucket in an epoch, the rows that it orders, and for each the number of its copy."""
        if (bucket, epoch) not in self._epochs:
            b = self.buckets[bucket]
            rows, copies = b.rows, None
            if b.weights is not None:
                times = order.repeats(b.weights, b.samples, self.seed, epoch)
                rows = np.repeat(b.rows, times)
                copies = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
            ends = np.searchsorted(rows, np.append(self.split.base.starts[1:], np.iinfo(np.int32).max))
            sizes = np.diff(np.append(0, ends))
            while len(self._epochs) > 2 * len(self.buckets):
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[bucket, epoch] = order.epoch(sizes, self.seed, epoch, shuffle=self.shuffle), rows, copies
        return self._epochs[bucket, epoch]

    def _fetch_ahead(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Start fetching the shards of the block after this batch's to the cache."""
        if not self.split.reader.cache:
            return
        epoch, bucket, nth = self._turn(number)
        sequence, rows, _ = self._epoch(bucket, epoch)
        block = int(np.searchsorted(sequence.ends, nth * self.buckets[bucket].batch % len(rows), "right"))
        if block + 1 < len(sequence.ends) and (epoch, bucket, block) not in self._fetched:
            self._fetched.add((epoch, bucket, block))
            for shard in sequence.blocks(sequence.ends[block : block + 1]).tolist():
                for column in self.split.tars():
                    pool.submit(self.split.reader.fetch, column, shard)


def _samples_ahead(batch: dict[str, Any]) -> int:
    """How many samples may be under way after such a batch: enough of them outlast a request that fails and is made again."""
    sample_bytes = 1 + tensor_bytes(batch) // len(batch["key"])
    return max(_AHEAD, min(_MOST_AHEAD, _BYTES_AHEAD // sample_bytes))


def collate(
    samples: Sequence[Any], places: list[int], room: Room, latents: Collection[str] = (), texts: Collection[str] = ()
) -> dict[str, Any]:
    """Join the samples at `places`: arrays and numbers become tensors, everything else lists.

    `latents` and `texts` are the names of columns of latents and of token states; these get a mask beside them.
    """
    out: dict[str, Any] = {}
    chosen = [samples[place] for place in places]
    for name, first in chosen[0].items():
        values = [s[name] for s in chosen]
        if name in texts:
            out[name], out[f"{name}_mask"] = padded(values)
        elif isinstance(first, np.ndarray):
            out[name] = torch.from_numpy(room.joined(name, values, places))
        else:
            out[name] = torch.tensor(values) if isinstance(first, int) else values
        if name.removeprefix("history_") in latents:
            if out[name].dtype == torch.uint16:
                # numpy has no bfloat16, only its bits
                out[name] = out[name].view(torch.bfloat16)
            # (B, T, 2, C, h, w): time comes first on disk, so that a window is one range of bytes
            out[name] = out[name].permute(0, 2, 3, 1, 4, 5)
    return out


def padded(states: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """States (L, width), as the bits of bfloat16, with zeros behind them up to the longest, and which of them are true.

    Returns (B, N, width) bfloat16 and (B, N) bool; N is 1 where all are empty.
    """
    longest = max(1, *map(len, states))
    out = np.zeros((len(states), longest, states[0].shape[1]), np.uint16)
    for place, one in zip(out, states, strict=True):
        place[: len(one)] = one
    lengths = np.array([len(one) for one in states])
    return torch.from_numpy(out).view(torch.bfloat16), torch.from_numpy(np.arange(longest) < lengths[:, None])


@functools.lru_cache(maxsize=4)
def _schedule(counts: tuple[int, ...], seed: int, epoch: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each batch of an epoch its bucket, and its number among the bucket's batches."""
    turns = order.schedule(counts, seed, epoch, shuffle)
    nth = np.empty(len(turns), np.int64)
    for bucket, count in enumerate(counts):
        nth[turns == bucket] = np.arange(count)
    return turns, nth
