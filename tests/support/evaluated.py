"""An evaluation's folder as `longtake evaluate` leaves it, of figures that are given: no model is run."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.infra import footage
from longtake.training.evaluation import table as tables
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.run import RESULTS
from longtake.training.evaluation.table import Measured, Table

CONDITIONS: dict[str, Any] = {
    "dataset": "s3://lab/shards/0123",
    "split": "val",
    "seed": 0,
    "size": [64, 64],
    "fps": 12.0,
}
CONDITIONS |= {"clips": 24, "sources": 12, "frames": 8, "networks": {}}


def model(uri: str, letter: str, pinned: str | None = None, **more: Any) -> dict[str, Any]:
    """A model whose digest is 64 times the letter."""
    plain = {"what": "a model", "settings": {}, "notes": []}
    return {"uri": uri, "pinned": pinned or uri, "digest": 64 * letter} | plain | more


def value(value: float, low: float | None = None, high: float | None = None) -> dict[str, Any]:
    return {"value": value, "low": low, "high": high, "units": 12, "clips": 34}


def group(
    measure: str, figures: Mapping[str, tuple[str, Mapping[str, Any]]], digest: str = "1", **more: Any
) -> dict[str, Any]:
    """A group of figures {name: (better, {letter: value})}; `more`: further conditions, and curves by letter."""
    curves = more.pop("curves", {})
    return {
        "measure": measure,
        "what": f"<what> {measure} is",
        "conditions": CONDITIONS | {"measure": measure} | more,
        "digest": 64 * digest,
        "figures": {
            name: {"better": better, "values": {64 * letter: each for letter, each in values.items()}}
            for name, (better, values) in figures.items()
        },
        "curves": {name: {64 * letter: each for letter, each in lines.items()} for name, lines in curves.items()},
    }


def video(letter: str, key: str, prompt: str | None = None, file: str | None = None, **scores: float) -> dict[str, Any]:
    named = file or f"videos/{letter}-{key}.mp4"
    row = {"model": 64 * letter, "key": key, "aspect": "generates", "prompt": prompt, "seed": 0, "class": None}
    return row | {"file": named, "scores": scores}


def table(models: Sequence[Any], groups: Sequence[Any] = (), videos: Sequence[Any] = (), **more: Any) -> dict[str, Any]:
    return {"format": 1, "models": models, "groups": groups, "left_out": [], "videos": videos} | more


def write(folder: Path, content: Mapping[str, Any]) -> Path:
    """evaluation.json, and a video of 3 seconds for each that it names, 4 for the last."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps(content))
    for place, row in enumerate(content["videos"]):
        path = folder / row["file"]
        if path.resolve().is_relative_to(folder.resolve()):
            path.parent.mkdir(parents=True, exist_ok=True)
            seconds = 4 if place == len(content["videos"]) - 1 else 3
            frames, _ = footage.render(place, seconds=seconds, fps=12, size=(32, 32))
            footage.write_video(path, frames, 12)
    return folder


def rows(figure: str, values: Sequence[float]) -> dict[tuple[str, str], dict[str, float]]:
    """Two clips of each source, whose mean is the value."""
    return {(f"s{n}", f"s{n}-{m}"): {figure: value + m - 0.5} for n, value in enumerate(values) for m in (0, 1)}


def result(measure: str, better: str, letter: str, found: Any, curves: Any = None, **conditions: Any) -> Measured:
    """A result with one figure, of the measure's name: values by source, or (value, replicates) of all together."""
    pooled = {measure: Pooled(*found, 12)} if isinstance(found, tuple) else {}
    made = Result({} if pooled else rows(measure, found), pooled, curves or {})
    facts = CONDITIONS | {"measure": measure} | conditions
    digest = hashlib.sha256(storage.canonical_json(facts)).hexdigest()
    return Measured(measure, "a measure", {measure: better}, 64 * letter, facts, digest, 200, 0, [], made)


def kept(folder: Path, models: Sequence[Mapping[str, Any]], results: Sequence[Measured], **more: Any) -> Table:
    """An evaluation's folder with its results and its table."""
    for each in results:
        path = folder / RESULTS / each.model[:12] / f"{each.measure}-{each.digest[:12]}.json"
        storage.write(str(path), storage.canonical_json(tables.plain(each)))
    made = tables.made(models, results, more.get("left_out", []))
    tables.write(folder, made)
    return made
