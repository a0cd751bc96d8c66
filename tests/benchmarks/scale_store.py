"""Ranks that train from an object store whose answers are late and sometimes fail: the share of a step that they wait."""

import hashlib
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from itertools import islice
from pathlib import Path
from typing import Any
from unittest import mock

import slow_store
from bench_loader import LATENT, synthetic
from s3fs import S3FileSystem

from longtake.datasets.loader import Loader

SETTINGS: dict[str, Any] = {"columns": (LATENT,), "frames": 17}


def measure(
    folder: Path, steps: int, ranks: int, batch: int, workers: int, seconds: float, latency: float, faults: float
) -> dict[str, Any]:
    """Steps of `seconds` on all ranks, whose loaders read latents from one store and work in this process.

    A step begins when all ranks have their batch, as an all-reduce would make it wait. `batch` is a rank's, `workers` are
    the processes that each rank's loader has.

    Returns `first`, the seconds until the first step; `waits`, those of the steps after it; and `counts`, of the store's
    requests.

    Raises:
        AssertionError: a rank had other batches than from the folder itself.
    """
    settings = {**SETTINGS, "batch": batch * ranks, "world": ranks}
    local = [digest(islice(Loader(str(folder / "lake"), rank=r, **settings), steps)) for r in range(ranks)]
    waits, digests = list[float](), [hashlib.sha256() for _ in range(ranks)]
    with ExitStack() as stack:
        environment, counts = stack.enter_context(slow_store.serving(folder, latency, faults))
        stack.enter_context(clients_of(environment))
        loaders = [Loader("s3://lake", rank=r, workers=workers, **settings) for r in range(ranks)]
        streams = [stack.enter_context(closing(iter(loader))) for loader in loaders]
        for _ in range(steps):
            begun = time.perf_counter()
            batches = [next(stream) for stream in streams]
            came = time.perf_counter()
            waits.append(came - begun)
            for one, sha in zip(batches, digests, strict=True):
                add(sha, one)
            time.sleep(max(0.0, seconds - (time.perf_counter() - came)))
    assert [sha.hexdigest() for sha in digests] == local, "the store gave other samples than the folder"
    return {"first": waits[0], "waits": waits[1:], "counts": counts}


def rate(folder: Path, batches: int, batch: int, latency: float, faults: float) -> float:
    """Windows a second that a single worker brings from the store, without the first quarter."""
    marks, settings = list[float](), {**SETTINGS, "batch": batch, "workers": 1}
    with slow_store.serving(folder, latency, faults) as (environment, _), clients_of(environment):
        stream: Any = iter(Loader("s3://lake", **settings))
        for _ in islice(stream, batches):
            marks.append(time.perf_counter())
        stream.close()
    first = batches // 4
    return batch * (batches - first) / (marks[-1] - marks[first - 1])


def make(folder: Path, shards: int, clips: int) -> None:
    """The dataset, as bucket `lake` of the store."""
    synthetic(str(folder / "lake"), shards, clips, 1000, latent=True)


def clients_of(environment: dict[str, str]) -> Any:
    """For the block, clients of this process and of those that it starts reach the store of this environment."""
    stack = ExitStack()
    stack.enter_context(mock.patch.dict("os.environ", environment))
    # s3fs keeps one client for all of a process, whatever store the environment names by now
    S3FileSystem.clear_instance_cache()
    stack.callback(S3FileSystem.clear_instance_cache)
    return stack


def digest(batches: Iterator[dict[str, Any]]) -> str:
    sha = hashlib.sha256()
    for batch in batches:
        add(sha, batch)
    return sha.hexdigest()


def add(sha: Any, batch: dict[str, Any]) -> None:
    sha.update(" ".join(batch["key"]).encode())
    sha.update(batch["latent"].contiguous().numpy())
