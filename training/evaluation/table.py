"""The table of an evaluation: models, and their figures in groups that compare. Plain data, written as `evaluation.json`:

    {"format": 1,
     "models": [{"uri", "pinned", "digest", "what", "settings": {…}, "notes": […]}],
     "groups": [{"measure", "what", "conditions": {…}, "digest",
                 "figures": {name: {"better", "values": {model: {"value", "low", "high", "units", "clips"}}}},
                 "curves": {name: {model: [[position, value, low, high], …]}}}],
     "left_out": [{"model", "measure", "why"}],
     "videos": [{"model", "key", "aspect", "prompt", "seed", "class", "file", "scores": {figure: value}}]}

Models are named by their digests. All figures of a group have its conditions; those of other conditions are in another
group, even of the same measure. `low` and `high` are bounds of 95 %, null of a single unit. A file is named from the folder.
"""

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from longtake.datasets import storage
from longtake.datasets.errors import Failure
from longtake.training.evaluation import bootstrap, record
from longtake.training.evaluation.record import Pooled, Result, Unit

FILE, FORMAT = "evaluation.json", 1


class Table(NamedTuple):
    """The table as the module's docstring describes it."""

    models: Sequence[Mapping[str, Any]]
    groups: Sequence[Mapping[str, Any]]
    left_out: Sequence[Mapping[str, str]]
    videos: Sequence[Mapping[str, Any]]


class Measured(NamedTuple):
    """A result that is kept: its measure, model and conditions, and the videos that it was measured on."""

    measure: str
    what: str
    better: Mapping[str, str]
    model: str  # digest
    conditions: Mapping[str, Any]
    digest: str  # of the conditions
    resamples: int
    seed: int
    videos: Sequence[Mapping[str, Any]]
    result: Result


def made(
    models: Sequence[Mapping[str, Any]], results: Iterable[Measured], left_out: Sequence[Mapping[str, str]]
) -> Table:
    """The table of results."""
    groups = dict[tuple[str, str], list[Measured]]()
    for measured in sorted(results, key=lambda each: (each.measure, each.digest)):
        groups.setdefault((measured.measure, measured.digest), []).append(measured)
    everything = [measured for group in groups.values() for measured in group]
    notes = {model["digest"]: list(model.get("notes", ())) for model in models}
    for measured in everything:
        notes[measured.model] += [note for note in measured.result.notes if note not in notes[measured.model]]
    return Table(
        [{**model, "notes": notes[model["digest"]]} for model in models],
        [_group(group, [str(model["digest"]) for model in models]) for group in groups.values()],
        left_out,
        _videos(everything),
    )


def write(folder: Path, table: Table) -> None:
    """Write `evaluation.json`."""
    storage.write(str(folder / FILE), storage.canonical_json({"format": FORMAT, **table._asdict()}))


def read(folder: Path) -> Table:
    """The table that was written. Raises Failure where there is none, or it is damaged."""
    try:
        content = json.loads((folder / FILE).read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        _whole(content["models"], ("uri", "pinned", "digest"))
        _whole(content["groups"], ("measure", "conditions", "digest", "figures"))
        return Table(**content)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise Failure(f"{folder / FILE}: no table of an evaluation ({e}); run the evaluation again") from e


def _whole(rows: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    """Raises KeyError where a row has not all of these."""
    for row in rows:
        for name in names:
            row[name]


def _group(group: Sequence[Measured], order: Sequence[str]) -> dict[str, Any]:
    """A group; its models in their order in the table."""
    first = group[0]
    group = sorted(group, key=lambda measured: order.index(measured.model))
    figures: dict[str, dict[str, Any]] = {}
    curves: dict[str, dict[str, Any]] = defaultdict(dict)
    for measured in group:
        for name, value in _values(measured).items():
            figures.setdefault(name, {"better": measured.better[name], "values": {}})["values"][measured.model] = value
        for name, curve in measured.result.curves.items():
            curves[name][measured.model] = [[at, *_point(of, measured)] for at, of in sorted(curve.items())]
    named = {name: figures[name] for name in first.better if name in figures}
    return {
        "measure": first.measure,
        "what": first.what,
        "conditions": first.conditions,
        "digest": first.digest,
        "figures": named,
        "curves": dict(curves),
    }


def _values(measured: Measured) -> dict[str, dict[str, Any]]:
    result, values = measured.result, {}
    units = len({unit for unit, _ in result.rows}) or int(measured.conditions.get("sources", 0))
    for name in measured.better:
        by_unit = _by_unit(result, name)
        if by_unit:
            means = [float(np.mean(by_unit[unit])) for unit in sorted(by_unit)]
            value, low, high = _mean(means, measured)
            counts = {"units": len(means), "clips": sum(map(len, by_unit.values()))}
            values[name] = {"value": value, "low": low, "high": high, **counts}
        elif name in result.pooled:
            pooled: Pooled = result.pooled[name]
            count = pooled.units or units
            low, high = bootstrap.of_replicates(pooled.value, pooled.replicates, count)
            clips = len(result.rows) or int(measured.conditions.get("clips", 0))
            values[name] = {"value": pooled.value, "low": low, "high": high, "units": count, "clips": clips}
    return values


def _by_unit(result: Result, name: str) -> dict[Unit, list[float]]:
    by_unit = defaultdict(list)
    for (unit, _), figures in sorted(result.rows.items()):
        if name in figures:
            by_unit[unit].append(figures[name])
    return by_unit


def _point(of: Mapping[Unit, float] | Pooled, measured: Measured) -> tuple[float, float | None, float | None]:
    """A curve's value at a position, and its bounds."""
    if isinstance(of, Pooled):
        return of.value, *bootstrap.of_replicates(of.value, of.replicates, of.units)
    return _mean([of[unit] for unit in sorted(of)], measured)


def _mean(values: Sequence[float], measured: Measured) -> tuple[float, float | None, float | None]:
    found = np.asarray(values, np.float64)
    return float(found.mean()), *bootstrap.of_means(found, measured.resamples, measured.seed)


def _videos(results: Iterable[Measured]) -> list[dict[str, Any]]:
    """Each video once, with the figures that it got itself: of several for one clip, the first was measured.

    The others are further draws of a gap, or what an autoencoder alone keeps.
    """
    videos: dict[tuple[str, str], dict[str, Any]] = {}
    for measured in results:
        by_key: dict[str, Mapping[str, float]] = {key: figures for (_, key), figures in measured.result.rows.items()}
        for video in measured.videos:
            empty: dict[str, Any] = {"prompt": None, "seed": None, "class": None, "scores": {}}
            entry = videos.setdefault((measured.model, video["file"]), {"model": measured.model, **empty, **video})
            entry["scores"] |= by_key.pop(video["key"], {})
    return list(videos.values())


def printed(table: Table) -> str:
    """The table for a terminal: a block for each group, a line for each figure and model; then notes, and what was left out."""
    named = names(table.models)
    width = max(map(len, named.values()), default=0)
    lines: list[str] = []
    for group in table.groups:
        if not group["figures"]:
            continue
        lines += ["", f"{group['measure']}: {_on(group['conditions'])}   [{group['digest'][:8]}]"]
        for figure, facts in group["figures"].items():
            lines.append(f"  {figure} ({facts['better']} is better)")
            for digest, value in facts["values"].items():
                bounds = "" if value["low"] is None else f"   [{value['low']:.4g}, {value['high']:.4g}]"
                lines.append(f"    {named[digest]:<{width}}  {value['value']:>10.4g}{bounds}")
    notes = [f"note: {named[model['digest']]}: {note}" for model in table.models for note in model["notes"]]
    return "\n".join([*lines, "", *notes, *_left_out(table.left_out, named)]).strip("\n")


def names(models: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Short names by digest: the version, or the end of the path; with a part of the digest where two are alike."""
    short = {model["digest"]: _short(model["uri"]) for model in models}
    counts = Counter(short.values())
    return {digest: name if counts[name] == 1 else f"{name} ({digest[:6]})" for digest, name in short.items()}


def _short(uri: str) -> str:
    return uri.removeprefix("models:/") if uri.startswith("models:/") else uri.rstrip("/").rpartition("/")[2]


def _on(conditions: Mapping[str, Any]) -> str:
    """The conditions that matter most, in a few words."""
    height, width = conditions["size"]
    clips = f"{conditions['clips']} clips of {conditions['sources']} sources"
    parts = [clips, f"{conditions['frames']} frames of {height}x{width} at {conditions['fps']:g} a second"]
    for videos in conditions.get("videos") or ():
        length = f"{videos['frames']} frames" if videos.get("frames") else f"{videos['seconds']:g} s"
        parts.append(f"videos of {length}")
    for name, facts in conditions["networks"].items():
        fields = (facts.get(field) for field in ("network_digest", "classifier_digest", "digest"))
        parts.append(f"{name} {next(filter(None, fields), '')[:8]}")
    return ", ".join(parts)


def _left_out(rows: Sequence[Mapping[str, str]], names: Mapping[str, str]) -> list[str]:
    """A line for each reason, with the measures and models that it is of."""
    by_reason: dict[str, list[Mapping[str, str]]] = defaultdict(list)
    for row in rows:
        by_reason[row["why"]].append(row)
    lines = []
    for why, each in by_reason.items():
        measures = ", ".join(dict.fromkeys(row["measure"] for row in each))
        models = ", ".join(dict.fromkeys(names.get(row["model"], row["model"][:8]) for row in each))
        lines.append(f"left out: {measures} of {models}: {why}")
    return lines


def plain(measured: Measured) -> dict[str, Any]:
    """A kept result for JSON."""
    return {"format": FORMAT, **measured._asdict(), "result": record.plain(measured.result)}


def parsed(path: Path) -> Measured:
    """A kept result. Raises Failure where its file is damaged."""
    try:
        content = json.loads(path.read_bytes())
        if content.pop("format") != FORMAT:
            raise ValueError("another format")
        measured = Measured(**content | {"result": record.parsed(content["result"])})
        if path.name != f"{measured.measure}-{measured.digest[:12]}.json" or measured.model[:12] != path.parent.name:
            raise ValueError("it is of another model, measure or conditions")
        for video in measured.videos:
            file = PurePosixPath(video["file"])
            if not isinstance(video["key"], str) or file.is_absolute() or ".." in file.parts:
                raise ValueError(f"{file} is not in the evaluation's folder")
        return measured
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise Failure(f"{path}: damaged ({type(e).__name__}: {e}); delete it and run the same command again") from e


def model_of(path: Path, digest: str) -> dict[str, Any]:
    """What is kept of a model for the table. Raises Failure where its file is missing or damaged."""
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        if missing := {"uri", "pinned", "digest", "what", "settings", "notes"} - content.keys():
            raise ValueError(f"no {min(missing)}")
        if content["digest"] != digest:
            raise ValueError("it is of another model")
        return content
    except (OSError, ValueError, AttributeError) as e:
        raise Failure(f"{path}: damaged ({e}); delete its folder, or evaluate its model again") from e
