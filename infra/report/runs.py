"""The training curves and the table of the recipe's stages, from their MLflow runs."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.infra.report import pictures
from longtake.infra.report.embed import Pictures
from longtake.training.shares import PREFIX, overall

_TELLING = (
    *("promoted", "gain\\..*", "gain_low\\..*", ".*psnr.*", ".*loss.*"),
    *("clips_kept", "clips_dropped", "sources_good", "sources_rejected", "clips"),
)
_SPENT = {
    "compute": "computing",
    "data": "waiting for data",
    "exchange": "waiting for other processes",
    "checkpoint": "checkpoints",
    "sample": "sample videos",
    "heldout": "held-out clips",
    "log": "logging",
    "other": "the rest",
}


@dataclass(frozen=True)
class StageRun:
    """One stage of a recipe: its status, its product (`uri`) and the content of its MLflow run."""

    name: str
    kind: str
    status: str  # FINISHED, FAILED, KILLED or RUNNING
    reused: bool
    seconds: float
    run_id: str
    uri: str
    metrics: Mapping[str, float]  # last values
    history: Mapping[str, Sequence[tuple[int, float]]]  # (step, value), only of metrics that have steps
    params: Mapping[str, str]
    artifacts: Path | None  # a local folder with the run's downloaded artifacts


def training(stages: Sequence[StageRun], keep: Pictures) -> list[dict[str, Any]]:
    """A section for every stage with a history: where its time went, its curves, losses first, and its numbers."""
    return [
        {
            "stage": stage,
            "spent": _spent(stage),
            "curves": [_curve(stage, metric, keep) for metric in sorted(metrics, key=_losses_first)],
        }
        for stage in stages
        if any(map(stage.history.get, metrics := _training_metrics(stage)))
    ]


def _training_metrics(stage: StageRun) -> list[str]:
    """The metrics by optimizer step that are drawn. An evaluation logs its metrics by position as by_step/NAME."""
    return [metric for metric in stage.history if not metric.startswith(("by_step/", PREFIX))]


def _spent(stage: StageRun) -> list[dict[str, Any]]:
    """What the time of a training's steps went into: name, share and whether it is computation; empty where unknown."""
    spent = overall(stage.history)
    return [
        {"name": _SPENT.get(name, name), "share": share, "good": name == "compute"} for name, share in spent.items()
    ]


def _losses_first(metric: str) -> tuple[bool, bool, str]:
    return metric.startswith("system/"), "loss" not in metric, metric


def _curve(stage: StageRun, metric: str, keep: Pictures) -> dict[str, Any]:
    points = sorted(stage.history[metric])
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    picture = keep.add(f"{stage.name}-{metric}.svg", pictures.curve(finite)) if finite else None
    return {
        "metric": metric,
        "picture": picture,
        "last": finite[-1][1] if finite else math.nan,
        "broken": len(points) - len(finite),
        "points": len(points),
    }


def telling(metrics: Mapping[str, float], most: int = 4) -> list[tuple[str, float]]:
    """The most important metrics of a stage."""

    def rank(name: str) -> int:
        return next((i for i, word in enumerate(_TELLING) if re.fullmatch(word, name)), len(_TELLING))

    return sorted(metrics.items(), key=lambda item: (rank(item[0]), item[0]))[:most]


def outcome(stages: Sequence[StageRun]) -> tuple[str, str]:
    """(status, a line for people) of the whole recipe."""
    if not stages:
        return "EMPTY", "no stage has run"
    unfinished = [s for s in stages if s.status != "FINISHED"]
    statuses = {s.status for s in unfinished}
    worst = next((status for status in ("FAILED", "KILLED", "RUNNING") if status in statuses), "FINISHED")
    reused = sum(s.reused for s in stages)
    parts = [f"{len(stages)} stage{'s' * (len(stages) != 1)}"]
    parts += [f"{reused} reused"] if reused else []
    parts += [f"not finished: {', '.join(s.name for s in unfinished)}"] if unfinished else []
    return worst, ", ".join(parts)
