"""A few of many sources, looked into: what they hold, and what it takes to cut them, measured on this machine."""

import random
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import Failure

FRAMES = 300  # of each that are decoded
FETCH_BYTES = 1 << 30  # a larger source of a remote store is not fetched for a look


class Range(NamedTuple):
    """An estimate and what it lies between, as far as the measured values tell."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Range":
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class Source:
    """One source that was looked into; clips, bytes and seconds are scaled from the frames decoded to the whole."""

    uri: str
    bytes: int
    seconds: float
    width: int
    height: int
    clips: float
    made_bytes: float
    cpu_seconds: float
    rejected: str  # why, if it gives no clip


def listed(patterns: Sequence[str], sample: int) -> tuple[int, int, list[tuple[str, int]]]:
    """(how many sources, their bytes, some of them by chance); always the same ones of the same listing."""
    from longtake.pipeline.discover import find

    chance = random.Random(0)
    count, total, chosen = 0, 0, list[tuple[str, int]]()
    for batch in find(patterns):
        for uri, size in zip(batch["uri"].to_pylist(), batch["bytes"].to_pylist(), strict=True):
            count, total = count + 1, total + (size or 0)
            if len(chosen) < sample:
                chosen.append((uri, size or 0))
            elif (place := chance.randrange(count)) < sample:
                chosen[place] = (uri, size or 0)
    return count, total, chosen


def look(uri: str, size: int, config: Any) -> Source | None:
    """Cut the first frames of a source as the stage would, in a process of its own; None where that cannot be."""
    from longtake.pipeline import container, decode, fetch, isolate

    with tempfile.TemporaryDirectory() as folder:
        if not storage.is_local(uri) and size > FETCH_BYTES:
            return None
        most = sys.maxsize if storage.is_local(uri) else FETCH_BYTES
        try:
            path = str(fetch.fetch(uri, Path(folder) / "source", most))
        except (fetch.Unread, OSError, Failure):
            return None
        spool = Path(folder) / "clips"
        spool.mkdir()
        most_frames = min(FRAMES, config.limits.max_frames)
        cut = config.cut.model_copy(update={"limits": config.limits.model_copy(update={"max_frames": most_frames})})
        try:
            facts = decode.probe(path)
        except container.Unreadable as e:
            return Source(uri, size, 0.0, 0, 0, 0.0, 0.0, 0.0, str(e))
        # a process alone: what it takes to start is measured by one that does no more than that
        idle, _ = _cpu_of(isolate.Worker(), str(Path(folder) / "none"), str(spool), cut)
        spent, result = _cpu_of(isolate.Worker(), path, str(spool), cut)
        account = result["account"]
        decoded, expected = account.get("frames_decoded") or 0, facts.frames or account.get("frames_expected") or 0
        seconds = facts.seconds or (expected / facts.fps if facts.fps else 0.0)
        whole = max(1.0, expected / decoded) if decoded else 1.0
        made = sum(p.stat().st_size for p in spool.iterdir())
        return Source(
            uri, size or Path(path).stat().st_size, seconds, facts.width, facts.height,
            len(result["clips"]) * whole, made * whole, max(0.0, spent - idle) * whole, account.get("reason") or "",
        )  # fmt: skip


def _cpu_of(worker: Any, path: str, folder: str, cut: Any) -> tuple[float, dict[str, Any]]:
    """CPU seconds of a worker's process from its start to its end, and its result."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        result = worker.run(path, "s", folder, cut, {})
    except OSError as e:
        result = {"account": {"reason": e.strerror or str(e)}, "clips": []}
    finally:
        worker.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def ratio(pairs: Sequence[tuple[float, float]], every: bool = False) -> Range:
    """Sum of the first over the sum of the second; between the 5th and 95th percentile of 1000 samples of the pairs.

    Where `every` one of a population is among the pairs there is nothing left to chance.
    """
    value = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    if every:
        return Range(value, value, value)
    chance = random.Random(0)
    draws = [chance.choices(pairs, k=len(pairs)) for _ in range(1000)]
    found = sorted(sum(a for a, _ in d) / sum(b for _, b in d) for d in draws if sum(b for _, b in d))
    return Range(value, found[len(found) // 20], found[-1 - len(found) // 20])
