"""Which videos of an evaluation people are shown: what all models made of the same, and each model's worst and best. Pure.

A table is as in `evaluation.json` (see `longtake.training.evaluation.table`); a video is a row of its `videos`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Video = Mapping[str, Any]
TOGETHER, EXTREMES = 8, 2  # groups of videos side by side; videos at each end of a figure


class Extremes(NamedTuple):
    """The videos of a model that are worst and best by a figure, the most extreme first."""

    figure: str
    model: str
    worst: Sequence[Video]
    best: Sequence[Video]


def together(table: Mapping[str, Any], most: int = TOGETHER) -> list[list[Video]]:
    """Videos of several models that show the same (one `key`), in the order of the models: of as many prompts as fit.

    Groups that all models are in come first. With one model its videos are groups of one.
    """
    groups: dict[str, dict[str, Video]] = {}
    for video in table["videos"]:
        if video["file"]:
            groups.setdefault(video["key"], {}).setdefault(video["model"], video)
    models = [model["digest"] for model in table["models"]]
    rows = [[group[model] for model in models if model in group] for group in groups.values()]
    rounds: dict[Any, int] = {}
    order = []
    for place, row in enumerate(rows):
        prompt = row[0]["prompt"] if row else None
        order.append((-len(row), rounds.get(prompt, 0), place))
        rounds[prompt] = rounds.get(prompt, 0) + 1
    chosen = sorted(place for count, _, place in sorted(order)[:most] if count)
    return [rows[place] for place in chosen]


def extremes(table: Mapping[str, Any], most: int = EXTREMES) -> list[Extremes]:
    """For each figure that single videos have, and each model: its worst and its best ones, none of them twice."""
    better = {name: figure["better"] for group in table["groups"] for name, figure in group["figures"].items()}
    out = []
    for name, way in better.items():
        for model in table["models"]:
            mine = [v for v in table["videos"] if v["model"] == model["digest"] and v["file"] and name in v["scores"]]
            ranked = sorted(mine, key=lambda v: (v["scores"][name], v["key"]), reverse=way == "lower")
            if count := min(most, len(ranked) // 2):
                out.append(Extremes(name, model["digest"], ranked[:count], ranked[::-1][:count]))
    return out


def files(table: Mapping[str, Any]) -> list[str]:
    """The files of all videos that are shown, once each."""
    shown = [video for group in together(table) for video in group]
    shown += [video for each in extremes(table) for video in (*each.worst, *each.best)]
    return list(dict.fromkeys(video["file"] for video in shown))
