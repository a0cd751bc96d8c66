"""Batches by their numbers: what each is made of on a rank, and its samples read, decoded and stacked.

A plan travels to worker processes as it is; it holds row numbers, and no rows of an index that lies in a file.
"""

import functools
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from longtake.datasets.errors import Failure
from longtake.datasets.loader import order
from longtake.datasets.loader.window import Sample, Source, Window, load
from longtake.datasets.masking import shown

_THREADS, _AHEAD = 8, 32  # samples of a remote dataset on their way at once, and waiting to be taken
_FETCHES = 2  # tars on their way to the cache before they are needed


class Plan(Protocol):
    """Makes batches of given numbers, in order."""

    def make(self, numbers: Iterator[int]) -> Iterator[dict[str, Any]]: ...


@dataclass(frozen=True)
class Bucket:
    """The samples of one shape: what to take of them, how many make a global batch, their row numbers and weights."""

    window: Window
    batch: int
    rows: np.ndarray
    weights: np.ndarray | None
    samples: int  # in an epoch; as many as rows where there are no weights


class Batches:
    """The plan of a `Loader`."""

    def __init__(
        self,
        source: Source,
        buckets: list[Bucket],
        counts: list[int],
        seed: int,
        shuffle: bool,
        rank: int,
        world: int,
        remote: bool,
        skip: bool,
    ) -> None:
        self.source, self.buckets, self.counts = source, buckets, counts
        self.seed, self.shuffle, self.rank, self.world = seed, shuffle, rank, world
        self.remote, self.skip = remote, skip
        self._epochs: dict[tuple[int, int], tuple[order.Epoch, np.ndarray, np.ndarray | None]] = {}

    def make(self, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
        if not self.remote:
            for number in numbers:
                epoch, window, samples = self._samples(number)
                yield self._batch(epoch, [self._load(sample, window) for sample in samples])
            return
        # wait for the store in threads, several batches ahead
        waiting: deque[tuple[int, list[Future[Any]]]] = deque()
        with ThreadPoolExecutor(_THREADS) as pool, ThreadPoolExecutor(_FETCHES) as ahead:
            try:
                for number in numbers:
                    epoch, window, samples = self._samples(number)
                    waiting.append((epoch, [pool.submit(self._load, sample, window) for sample in samples]))
                    self._fetch_ahead(number, ahead)
                    while sum(len(futures) for _, futures in waiting) > _AHEAD:
                        epoch, futures = waiting.popleft()
                        yield self._batch(epoch, [future.result() for future in futures])
                while waiting:
                    epoch, futures = waiting.popleft()
                    yield self._batch(epoch, [future.result() for future in futures])
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                ahead.shutdown(wait=False, cancel_futures=True)

    def _load(self, sample: Sample, window: Window) -> dict[str, Any] | Failure:
        try:
            return load(self.source, sample, window)
        except Failure as e:
            if not self.skip:
                raise
            return e

    def _batch(self, epoch: int, samples: list[dict[str, Any] | Failure]) -> dict[str, Any]:
        good = [sample for sample in samples if not isinstance(sample, Failure)]
        if not good:
            assert isinstance(samples[0], Failure)
            raise samples[0]
        for sample in samples:
            if isinstance(sample, Failure):
                print(shown(f"warning: skipped: {sample}"), file=sys.stderr)
        # the ranks' batches stay as large as each other
        filled = [*good, *(good[n % len(good)] for n in range(len(samples) - len(good)))]
        out = collate(filled, self.source.latents) | {"epoch": epoch}
        return out | ({"skipped": len(samples) - len(good)} if self.skip else {})

    def _samples(self, number: int) -> tuple[int, Window, list[Sample]]:
        """What global batch `number` is made of on this rank."""
        epoch, bucket, nth = self._turn(number)
        b = self.buckets[bucket]
        sequence, rows, copies = self._epoch(bucket, epoch)
        positions = order.rank_slice(order.positions(nth, b.batch, len(rows)), self.rank, self.world)
        picked = sequence.samples(positions)
        starts = self.source.base.starts
        shards = np.searchsorted(starts, rows[picked], "right") - 1
        samples, drawn = [], self.shuffle or b.window.clip_starts is not None
        for shard, row, n in zip(shards.tolist(), rows[picked].tolist(), picked.tolist(), strict=True):
            chance = (self.seed, epoch, 0 if copies is None else int(copies[n])) if drawn else None
            samples.append(Sample(shard, row - int(starts[shard]), chance, number))
        return epoch, b.window, samples

    def _turn(self, number: int) -> tuple[int, int, int]:
        """The epoch of a batch, its bucket, and which of the bucket's batches it is."""
        epoch, within = divmod(number, sum(self.counts))
        if len(self.counts) == 1:
            return epoch, 0, within
        turns, nth = _schedule(tuple(self.counts), self.seed, epoch, self.shuffle)
        return epoch, int(turns[within]), int(nth[within])

    def _epoch(self, bucket: int, epoch: int) -> tuple[order.Epoch, np.ndarray, np.ndarray | None]:
        """The order of a bucket in an epoch, the rows that it orders, and which copy of its row each is."""
        if (bucket, epoch) not in self._epochs:
            b = self.buckets[bucket]
            rows, copies = b.rows, None
            if b.weights is not None:
                times = order.repeats(b.weights, b.samples, self.seed, epoch)
                rows = np.repeat(b.rows, times)
                copies = np.arange(len(rows)) - np.repeat(np.cumsum(times) - times, times)
            ends = np.searchsorted(rows, np.append(self.source.base.starts[1:], np.iinfo(np.int32).max))
            sizes = np.diff(np.append(0, ends))
            while len(self._epochs) > 2 * len(self.buckets):
                self._epochs.pop(next(iter(self._epochs)))
            self._epochs[bucket, epoch] = order.epoch(sizes, self.seed, epoch, shuffle=self.shuffle), rows, copies
        return self._epochs[bucket, epoch]

    def _fetch_ahead(self, number: int, pool: ThreadPoolExecutor) -> None:
        """Have the cache fetch the shards of the block after this batch's."""
        if not self.source.reader.cache:
            return
        epoch, bucket, nth = self._turn(number)
        sequence, rows, _ = self._epoch(bucket, epoch)
        here = int(np.searchsorted(sequence.ends, nth * self.buckets[bucket].batch % len(rows), "right"))
        if here + 1 < len(sequence.ends) and (epoch, bucket, here) not in self._fetched:
            self._fetched.add((epoch, bucket, here))
            for shard in sequence.blocks(sequence.ends[here : here + 1]).tolist():
                for part in (self.source.base, *self.source.columns.values()):
                    pool.submit(self.source.reader.fetch, part, shard)

    @functools.cached_property
    def _fetched(self) -> set[tuple[int, int, int]]:
        return set()


class Mixed:
    """The plan of a `Mixture`."""

    def __init__(self, plans: list[Plan], names: list[str], weights: list[float], seed: int) -> None:
        self.plans, self.names, self.weights, self.seed = plans, names, weights, seed

    def make(self, numbers: Iterator[int]) -> Iterator[dict[str, Any]]:
        queues: list[deque[int]] = [deque() for _ in self.plans]
        turns = deque[int]()

        def look() -> bool:
            """Queue the next batch with its part; False where there is none."""
            if (number := next(numbers, None)) is None:
                return False
            part, nth = order.mixed(self.weights, self.seed, number)
            turns.append(part)
            queues[part].append(nth)
            return True

        def feed(part: int) -> Iterator[int]:
            # a plan may ask for its next number before this one's turn: look further ahead for it
            while queues[part] or look():
                if queues[part]:
                    yield queues[part].popleft()

        streams = [plan.make(feed(part)) for part, plan in enumerate(self.plans)]
        while turns or look():
            part = turns.popleft()
            yield next(streams[part]) | {"part": self.names[part]}


def collate(samples: Sequence[Mapping[str, Any]], latents: Collection[str] = ()) -> dict[str, Any]:
    """Stack samples: arrays and numbers become tensors, everything else lists. `latents` are names of columns of latents."""
    out: dict[str, Any] = {}
    for name, first in samples[0].items():
        values = [s[name] for s in samples]
        if isinstance(first, np.ndarray):
            out[name] = torch.from_numpy(np.stack(values))
        else:
            out[name] = torch.tensor(values) if isinstance(first, int) else values
        if name.removeprefix("history_") in latents:
            if out[name].dtype == torch.uint16:
                # numpy has no bfloat16, only its bits
                out[name] = out[name].view(torch.bfloat16)
            # in time order on disk, so that a window is one range of bytes
            out[name] = out[name].permute(0, 2, 3, 1, 4, 5)
    return out


@functools.lru_cache(maxsize=4)
def _schedule(counts: tuple[int, ...], seed: int, epoch: int, shuffle: bool) -> tuple[np.ndarray, np.ndarray]:
    """For each batch of an epoch its bucket, and which of the bucket's batches it is."""
    turns = order.schedule(counts, seed, epoch, shuffle)
    nth = np.empty(len(turns), np.int64)
    for bucket, count in enumerate(counts):
        nth[turns == bucket] = np.arange(count)
    return turns, nth
