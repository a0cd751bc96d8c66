"""The leaderboard of an evaluation on the page: figures with intervals, curves with bands, videos that play in step.

It is made of the table in a folder (see `longtake.training.evaluation.table`), and the videos that lie beside it.
"""

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.datasets.errors import Failure
from longtake.infra.report import figures, pictures
from longtake.infra.report.embed import Pictures
from longtake.infra.report.text import number
from longtake.training.evaluation import chosen, table
from longtake.training.evaluation import figures as figures_of

SCRIPT = (Path(__file__).parent / "step.js").read_text()
SCRIPT_DIGEST = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()  # what the page allows to run

_TITLES = {
    "reconstructs": "Reconstructions",
    "generates": "Generated videos",
    "fills": "Filled gaps",
    "retrieves": "Retrieved from memory",
}
_VIDEO_BYTES = 8_000_000  # of one leaderboard in a page


def leaderboard(name: str, folder: Path, keep: Pictures) -> dict[str, Any]:
    """The section of the page about an evaluation, as plain data.

    Args:
        name: of its stage, or of its folder.
        folder: has evaluation.json and the videos that it names.

    Raises:
        Failure: the table is damaged.
    """
    found = table.read(folder)
    try:
        labels = table.names(found.models)
        common, groups = figures_of.conditions(found)
        parts = [_part(group, own, labels) for group, own in zip(found.groups, groups, strict=True)]
        curves = _curves(name, found.groups, labels, keep)
        reels = _Reels(folder, labels)
        together = _together(chosen.together(found), reels)
        extremes = _extremes(chosen.extremes(found), labels, reels)
        models = [_model(model, labels[model["digest"]], n) for n, model in enumerate(found.models)]
        left_out = _left_out(found.left_out, labels)
    except (ValueError, LookupError, TypeError, AttributeError, OSError) as e:
        why = f"{type(e).__name__}: {e}"
        raise Failure(f"{folder / table.FILE}: is damaged ({why}); run the evaluation again") from e
    return {
        "name": name,
        "folder": str(folder),
        "models": models,
        "common": common,
        "parts": [part for part in parts if part["rows"]],
        "curves": curves,
        "left_out": left_out,
        "together": together,
        "extremes": extremes,
        "videos_left_out": reels.left_out,
    }


def line(board: Mapping[str, Any]) -> str:
    """What was evaluated, in a few words."""
    models, rows = len(board["models"]), sum(len(part["figures"]) for part in board["parts"])
    return f"{models} model{'s' * (models != 1)}, {rows} figure{'s' * (rows != 1)}"


def _model(model: Mapping[str, Any], label: str, n: int) -> dict[str, Any]:
    settings = ", ".join(f"{key} {figures_of.said(value)}" for key, value in model["settings"].items())
    place = model["pinned"] if model["pinned"] != model["uri"] else ""
    facts = {"label": label, "colour": pictures.colour_of(n), "settings": settings, "pinned": place}
    return facts | {key: model[key] for key in ("uri", "digest", "what", "notes")}


def _part(group: Mapping[str, Any], conditions: list[tuple[str, str]], labels: Mapping[str, str]) -> dict[str, Any]:
    """A measure's table: a column for each figure, a row for each model that it has measured."""
    found = {name: figure for name, figure in group["figures"].items() if figure["values"]}
    digests = [digest for digest in labels if any(digest in figure["values"] for figure in found.values())]
    columns = [_cells([figure["values"].get(d) for d in digests], figure["better"]) for figure in found.values()]
    order = list(labels)
    rows = [
        {"label": labels[digest], "colour": pictures.colour_of(order.index(digest)), "cells": cells}
        for digest, *cells in zip(digests, *columns, strict=True)
    ]
    heads = [{"name": name, "better": figure["better"]} for name, figure in found.items()]
    named = {key: group[key] for key in ("measure", "what", "digest")}
    return named | {"conditions": conditions, "figures": heads, "rows": rows}


def _cells(values: Sequence[Mapping[str, Any] | None], better: str) -> list[dict[str, Any] | None]:
    """The cells of a column, each with its place in its range from 0 to 1, and whether it is the best beyond doubt.

    A figure of one model alone has no range.
    """
    best = best_of(values, better)
    ends = [end for value in values if value for end in (value["value"], value["low"], value["high"]) if _finite(end)]
    low, high = (min(ends), max(ends)) if ends else (0.0, 0.0)
    several = sum(value is not None for value in values) > 1

    def at(value: float) -> float:
        return round((value - low) / (high - low), 4) if high > low else 0.5

    cells: list[dict[str, Any] | None] = []
    for n, value in enumerate(values):
        if value is None:
            cells.append(None)
            continue
        known = _finite(value["low"]) and _finite(value["high"])
        bar = {"begin": at(value["low"]), "end": at(value["high"])} if known and several else None
        where = at(value["value"]) if _finite(value["value"]) else None
        cells.append({**value, "best": n == best, "known": known, "bar": bar, "at": where})
    return cells


def best_of(values: Sequence[Mapping[str, Any] | None], better: str) -> int | None:
    """The number of the value whose interval lies beyond those of all others; None where there is none."""
    there = [(n, value) for n, value in enumerate(values) if value]
    if len(there) < 2 or not all(_finite(value[end]) for _, value in there for end in ("value", "low", "high")):
        return None
    sign = 1 if better == "higher" else -1
    spans = {n: sorted((sign * value["low"], sign * value["high"])) for n, value in there}
    first = max(spans, key=lambda n: spans[n][0])
    return first if all(spans[first][0] > span[1] for n, span in spans.items() if n != first) else None


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _curves(
    name: str, groups: Sequence[Mapping[str, Any]], labels: Mapping[str, str], keep: Pictures
) -> list[dict[str, Any]]:
    """A plot for each curve of each group, with a band for each model."""
    plots = []
    order = list(labels)
    for group in groups:
        for curve, values in group["curves"].items():
            bands = [
                pictures.Band(labels[digest], order.index(digest), points)
                for digest in order
                if (points := [point for point in values.get(digest, ()) if _finite(point[1])])
            ]
            if bands:
                file = f"{name}-{curve}-{group['digest'][:6]}.svg"
                plots.append(
                    {"title": curve, "measure": group["measure"], "picture": keep.add(file, pictures.bands(bands))}
                )
    return plots


def _left_out(rows: Sequence[Mapping[str, Any]], labels: Mapping[str, str]) -> list[dict[str, str]]:
    """What was not measured, one row for each measure and reason, with the models that it is so for."""
    whose: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        whose.setdefault((row["measure"], row["why"]), []).append(labels.get(row["model"], str(row["model"])))
    every = len(labels)
    return [
        {"measure": measure, "why": why, "models": "" if len(models) == every else ", ".join(models)}
        for (measure, why), models in whose.items()
    ]


class _Reels:
    """The videos of a board, until they are too large for a page."""

    def __init__(self, folder: Path, labels: Mapping[str, str]) -> None:
        self._folder, self._labels, self._order = folder.resolve(), labels, list(labels)
        self._room, self.left_out = _VIDEO_BYTES, 0

    def of(self, video: chosen.Video) -> dict[str, Any] | None:
        """The reel of a video; None where there is no room for it."""
        path = (self._folder / video["file"]).resolve()
        # the record may come from a store that others write
        there = path.is_relative_to(self._folder) and path.is_file()
        size = path.stat().st_size if there else 0
        if size > self._room:
            self.left_out += 1
            return None
        self._room -= size
        label = self._labels[video["model"]]
        colour = pictures.colour_of(self._order.index(video["model"]))
        part = {"bound": "the autoencoder alone"}.get(video.get("part", ""), "")
        facts = {"label": label, "colour": colour, "key": video["key"], "part": part, "file": video["file"]}
        return facts | {"video": figures.player(path) if there else None, "scores": list(video["scores"].items())}


def _together(groups: Sequence[chosen.Together], reels: _Reels) -> list[dict[str, Any]]:
    """For each aspect the videos that show the same, a row each."""
    out: dict[str, list[dict[str, Any]]] = {}
    for group in groups:
        first = group.videos[0]
        title = [first["prompt"] or first["class"] or first["key"]]
        title += [f"seed {first['seed']}"] if first["seed"] is not None else []
        if made := [reel for video in group.videos if (reel := reels.of(video))]:
            out.setdefault(group.aspect, []).append({"title": title, "reels": made})
    return [{"title": _TITLES.get(aspect, aspect), "rows": rows} for aspect, rows in out.items()]


def _extremes(found: Sequence[chosen.Extremes], labels: Mapping[str, str], reels: _Reels) -> list[dict[str, Any]]:
    """For each figure the worst and the best videos of each model, as far as there is room for them."""

    def row(videos: Sequence[chosen.Video], figure: str) -> list[dict[str, Any]]:
        made = [(video, reels.of(video)) for video in videos]
        return [reel | {"score": number(video["scores"][figure])} for video, reel in made if reel]

    order, out = list(labels), dict[tuple[str, str], list[dict[str, Any]]]()
    for each in found:
        ends = {"worst": row(each.worst, each.figure), "best": row(each.best, each.figure)}
        if any(ends.values()):
            colour = pictures.colour_of(order.index(each.model))
            model = {"label": labels[each.model], "colour": colour, "ends": ends}
            out.setdefault((each.figure, each.aspect), []).append(model)
    return [
        {"name": figure, "of": _TITLES.get(aspect, aspect).lower(), "models": models}
        for (figure, aspect), models in out.items()
    ]
