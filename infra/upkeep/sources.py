"""A sample of many sources: what they hold, and what cutting them takes, measured on some of their frames here."""

import random
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import storage
from longtake.datasets.errors import Failure

FRAMES = 300  # decoded of each source
FETCH_BYTES = 1 << 30  # a larger source of a remote store is not fetched


class Range(NamedTuple):
    """An estimate and its bounds, as far as the measured values tell."""

    value: float
    low: float
    high: float

    def times(self, factor: float) -> "Range":
        return Range(self.value * factor, self.low * factor, self.high * factor)


@dataclass(frozen=True)
class SampledSource:
    """A source of the sample. Clips, bytes and seconds are scaled from the decoded frames to all of them."""

    uri: str
    bytes: int
    seconds: float
    width: int
    height: int
    clips: float
    made_bytes: float
    cpu_seconds: float
    rejected: str  # why, if it gives no clip


def draw(
    patterns: Sequence[str], size: int, known: pa.ChunkedArray | None = None
) -> tuple[int, int, int, list[tuple[str, int]]]:
    """(number of sources, their bytes, how many of them have `known` URIs, a random sample of `size` as (URI, bytes)).

    The same listing gives the same sample.
    """
    from longtake.pipeline.discover import find

    rng = random.Random(0)
    count, total, sample, listed = 0, 0, list[tuple[str, int]](), list[pa.Array]()
    for batch in find(patterns):
        listed += [] if known is None else [batch["uri"]]
        for uri, bytes_ in zip(batch["uri"].to_pylist(), batch["bytes"].to_pylist(), strict=True):
            count, total = count + 1, total + (bytes_ or 0)
            if len(sample) < size:
                sample.append((uri, bytes_ or 0))
            elif (place := rng.randrange(count)) < size:
                sample[place] = (uri, bytes_ or 0)
    # all at once, since each question hashes what is known anew
    found = pc.sum(pc.is_in(pa.chunked_array(listed), known)).as_py() if listed else 0
    return count, total, found, sample


def measure(uri: str, size: int, config: Any) -> SampledSource | None:
    """Cut the first frames of a source as the stage would, in a process of its own; None if it cannot be fetched."""
    from longtake.pipeline import container, decode, fetch, isolate

    with tempfile.TemporaryDirectory() as folder:
        if not storage.is_local(uri) and size > FETCH_BYTES:
            return None
        limit = sys.maxsize if storage.is_local(uri) else FETCH_BYTES
        try:
            path = str(fetch.fetch(uri, Path(folder) / "source", limit))
        except (fetch.Unread, OSError, Failure):
            return None
        spool = Path(folder) / "clips"
        spool.mkdir()
        limits = config.limits.model_copy(update={"max_frames": min(FRAMES, config.limits.max_frames)})
        cut = config.cut.model_copy(update={"limits": limits})
        try:
            facts = decode.probe(path)
        except container.Unreadable as e:
            return SampledSource(uri, size, 0.0, 0, 0, 0.0, 0.0, 0.0, str(e))

        # a worker that finds no video measures the start of a process alone
        startup, _ = _run(isolate.Worker(), str(Path(folder) / "none"), str(spool), cut)
        cpu_seconds, result = _run(isolate.Worker(), path, str(spool), cut)
        account = result["account"]
        decoded, expected = account.get("frames_decoded") or 0, facts.frames or account.get("frames_expected") or 0
        seconds = facts.seconds or (expected / facts.fps if facts.fps else 0.0)
        scale = max(1.0, expected / decoded) if decoded else 1.0
        clip_bytes = sum(p.stat().st_size for p in spool.iterdir())
        return SampledSource(
            uri, size or Path(path).stat().st_size, seconds, facts.width, facts.height, len(result["clips"]) * scale,
            clip_bytes * scale, max(0.0, cpu_seconds - startup) * scale, account.get("reason") or "",
        )  # fmt: skip


def _run(worker: Any, path: str, folder: str, cut: Any) -> tuple[float, dict[str, Any]]:
    """CPU seconds of a worker's process, from its start to its end, and its result."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        result = worker.run(path, "s", folder, cut, {})
        if cut.audio and result["clips"]:
            worker.keep_sound(path, result["clips"], folder, cut, clocks=result["clocks"])
    except OSError as e:
        result = {"account": {"reason": e.strerror or str(e)}, "clips": []}
    finally:
        worker.close()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


def ratio(pairs: Sequence[tuple[float, float]], every: bool = False) -> Range:
    """Sum of the first values over the sum of the second. Bounds: 5th and 95th percentile of 1000 bootstrap samples.

    With `every`, the pairs are the whole population and the bounds are the value itself.
    """
    value = sum(a for a, _ in pairs) / sum(b for _, b in pairs)
    if every:
        return Range(value, value, value)
    rng = random.Random(0)
    draws = [rng.choices(pairs, k=len(pairs)) for _ in range(1000)]
    ratios = sorted(sum(a for a, _ in d) / sum(b for _, b in d) for d in draws if sum(b for _, b in d))
    return Range(value, ratios[len(ratios) // 20], ratios[-1 - len(ratios) // 20])
