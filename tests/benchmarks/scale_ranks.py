"""Loaders of many ranks over one large dataset: what opening one takes, and that together they see each sample once."""

import gc
import time
from pathlib import Path
from typing import Any

import numpy as np
from bench_open import KINDS

from longtake.datasets.loader import Loader

A_MACHINE = 8  # ranks that are held at once, as one machine has them


def measure(dataset: str, world: int, batch: int = 8, kind: str = "buckets") -> dict[str, list[float]]:
    """What the loaders of all ranks take, a machine's at a time, one after the other.

    Returns for each rank seconds of opening (`open`) and of the samples of its first batch (`first`), and for each
    machine the memory of a rank in GB (`memory`), pages of files not counted. `batch` is a rank's.

    Raises:
        AssertionError: at the first, a middle or the last batch of an epoch, the shares of the ranks are not those of a
            single process, or a sample is in two of them.
    """
    settings: dict[str, Any] = {"columns": ("video",), "batch": batch * world, **KINDS[kind]}
    alone = Loader(dataset, **settings)
    numbers = [0, alone.batches_per_epoch // 2, alone.batches_per_epoch - 1]
    whole = [rows_of(alone, number) for number in numbers]
    for rows in whole:
        assert len(rows) == batch * world and len(np.unique(rows)) == len(rows)
    del alone
    gc.collect()

    taken: dict[str, list[float]] = {"open": [], "first": [], "memory": []}
    before = _memory()
    for machine in range(0, world, A_MACHINE):
        loaders = []
        for rank in range(machine, min(machine + A_MACHINE, world)):
            begun = time.perf_counter()
            loaders.append(Loader(dataset, rank=rank, world=world, **settings))
            opened = time.perf_counter()
            first = rows_of(loaders[-1], 0)
            taken["open"].append(opened - begun)
            taken["first"].append(time.perf_counter() - opened)
            shares = [first, *(rows_of(loaders[-1], number) for number in numbers[1:])]
            for share, rows in zip(shares, whole, strict=True):
                assert (share == rows[rank * batch : (rank + 1) * batch]).all(), f"rank {rank} has another share"
        taken["memory"].append((_memory() - before) / len(loaders))
        del loaders
        gc.collect()
    return taken


def rows_of(loader: Loader, number: int) -> np.ndarray:
    """The rows of the samples of a rank's share of a batch, counted over all shards."""
    plan: Any = loader.plan
    samples = plan.samples_of(number)[2]
    return np.array([plan.split.base.starts[one.shard] + one.row for one in samples])


def _memory() -> float:
    """GB of this process that no file holds."""
    return int(Path("/proc/self/status").read_text().partition("RssAnon:")[2].split()[0]) / 1e6
