"""The account of a dataset's inputs: what became of every source, clip and frame. Each line is a sum that must be right."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from longtake.datasets import index
from longtake.pipeline.plan import groups


@dataclass(frozen=True)
class Part:
    """One term of a sum; `good` if it is used."""

    name: str
    count: int
    good: bool
    meaning: str = ""


@dataclass(frozen=True)
class Line:
    """A whole and the parts that should make it up."""

    name: str
    total: int
    parts: list[Part]
    lost: str = ""  # a common word for the parts that are not good

    @property
    def difference(self) -> int:
        return self.total - sum(part.count for part in self.parts)


def account(dataset: str, clips: pa.Table, view: pa.Table | None) -> dict[str, Any]:
    """The lines, every rejected source, good sources with a remark, and the number of pieces that were too short.

    The two sides of a line come from different files (plan, sources, indexes, view), so that a lost file shows.
    """
    tries = index.read_tries(dataset)
    sources = index.last_tries(tries)
    planned = sum(group["sources"] for group in groups(dataset))
    rejected = sources.filter(pc.equal(sources["status"], "rejected")).sort_by(
        [("reason", "ascending"), ("uri", "ascending")]
    )
    good = sources.filter(pc.equal(sources["status"], "good"))
    odd = good.filter(pc.is_valid(good["detail"])).sort_by("uri")
    retried = [Part("planned again", n, True)] if (n := len(tries) - len(sources)) else []
    in_shards = [Part(f"in {split} shards", n, True) for split, n in _counts(clips["split"]).items()]
    lines = [
        Line("sources found", planned, [Part("good", len(good), True), *retried, *_rejections(rejected)], "rejected"),
        Line("clips cut", _sum(sources["clips"]), in_shards),
    ]
    if view is not None:
        dropped = view.filter(pc.invert(view["keep"]))
        reasons = [Part(reason, n, False) for reason, n in _counts(dropped["reason"]).items()]
        kept = Part("kept", len(view) - len(dropped), True)
        lines.append(Line("clips judged by the view", len(clips), [kept, *reasons], "dropped"))
    frames = [
        Part("in clips", _sum(clips["frame_count"]), True),
        Part("in pieces too short", _sum(sources["frames_dropped_short"]), False),
        Part("black", _sum(sources["frames_dropped_black"]), False),
        Part("in fades and dissolves", _sum(sources["frames_dropped_transition"]), False),
    ]
    lines.append(Line("frames sampled", _sum(sources["frames_sampled"]), frames, "dropped"))
    return {
        "lines": lines,
        "rejected": rejected.select(["uri", "reason", "detail"]).to_pylist(),
        "odd": odd.select(["uri", "detail"]).to_pylist(),
        "pieces_short": _sum(sources["clips_dropped_short"]),
        "sources_short": pc.sum(pc.greater(sources["clips_dropped_short"], 0)).as_py() or 0,
    }


def _rejections(rejected: pa.Table) -> list[Part]:
    from longtake.pipeline.source import REASONS

    meaning: Mapping[str, str] = REASONS
    return [Part(reason, n, False, meaning.get(reason, "")) for reason, n in _counts(rejected["reason"]).items()]


def _counts(column: Any) -> dict[str, int]:
    return dict(sorted(Counter(value or "no reason given" for value in column.to_pylist()).items()))


def _sum(column: Any) -> int:
    return int(pc.sum(column).as_py() or 0)
