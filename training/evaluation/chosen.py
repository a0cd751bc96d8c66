"""Which videos of an evaluation people are shown: what all models made of the same, and each model's worst and best. Pure.

A video is a row of the table's `videos`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from longtake.training.evaluation.table import Table

Video = Mapping[str, Any]
TOGETHER, EXTREMES = 6, 2  # groups of each aspect; videos at each end of a figure


class Together(NamedTuple):
    """What models made of the same clip, or of the same prompt and seed, in the order of the models."""

    aspect: str
    videos: Sequence[Video]


class Extremes(NamedTuple):
    """The videos of a model that are worst and best by a figure, the most extreme first."""

    aspect: str
    figure: str
    model: str
    worst: Sequence[Video]
    best: Sequence[Video]


def together(table: Table, most: int = TOGETHER) -> list[Together]:
    """Up to `most` groups of each aspect, those that most models are in first, of many lengths, prompts and sources."""
    order = [model["digest"] for model in table.models]
    groups: dict[tuple[str, str, Any], list[Video]] = {}
    for video in table.videos:
        groups.setdefault((video["aspect"], video["key"], video["seed"]), []).append(video)
    seen: dict[Any, int] = {}
    ranked: dict[str, list[tuple[int, int, int]]] = {}
    rows = [
        Together(aspect, sorted(each, key=lambda video: order.index(video["model"])))
        for (aspect, _, _), each in groups.items()
    ]
    for place, row in enumerate(rows):
        first = row.videos[0]
        # keys begin with a video's length, or with a clip's source
        kind = (row.aspect, first["prompt"], first["key"].partition("-")[0])
        models = len({video["model"] for video in row.videos})
        ranked.setdefault(row.aspect, []).append((-models, seen.get(kind, 0), place))
        seen[kind] = seen.get(kind, 0) + 1
    return [rows[place] for each in ranked.values() for place in sorted(place for *_, place in sorted(each)[:most])]


def extremes(table: Table, most: int = EXTREMES) -> list[Extremes]:
    """For each figure that single videos have, and each model: its worst and its best ones, none of them twice."""
    better = {name: figure["better"] for group in table.groups for name, figure in group["figures"].items()}
    aspects = dict.fromkeys(video["aspect"] for video in table.videos)
    out = []
    for aspect, name, model in ((a, n, m["digest"]) for a in aspects for n in better for m in table.models):
        mine = [v for v in table.videos if (v["aspect"], v["model"]) == (aspect, model) and name in v["scores"]]
        ranked = sorted(mine, key=lambda v: (v["scores"][name], v["key"]), reverse=better[name] == "lower")
        if count := min(most, len(ranked) // 2):
            out.append(Extremes(aspect, name, model, ranked[:count], ranked[::-1][:count]))
    return out


def files(table: Table) -> list[str]:
    """The files of all videos that are shown, once each."""
    shown = [video for group in together(table) for video in group.videos]
    shown += [video for each in extremes(table) for video in (*each.worst, *each.best)]
    return list(dict.fromkeys(video["file"] for video in shown))
