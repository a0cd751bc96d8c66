"""The leaderboard in MLflow: below one run for the evaluation a run for each model, which MLflow's own page compares."""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from longtake.training.evaluation import chosen, figures, table
from longtake.training.evaluation.table import Table
from longtake.training.registry import aliases, log

FOLDER = "evaluation"  # of the artifacts of the evaluation's run
_MODEL = "longtake.evaluated"  # the tag with a model's digest
_EXPERIMENT = "evaluations"


@contextmanager
def run(name: str, place: str | None) -> Iterator[str]:
    """The id of a new run for an evaluation that is no stage of a recipe. The run ends with the block.

    Args:
        place: URL where the store keeps artifacts, if it has no place of its own.

    Raises:
        UserError, Failure: as `registry.store.asking`.
    """
    with aliases.run_in(log.experiment(_EXPERIMENT, place), name) as run_id:
        yield run_id


def write(made: Table, folder: Path, parent: str) -> None:
    """Log the models of a table as runs below the run `parent`, and to that one the table and the videos of the report.

    A model's run has its figures as the metrics NAME, NAME_low and NAME_high, curves as by_step/NAME by the number of
    their points, and the conditions as parameters. One that has finished already is left as it is.

    Args:
        folder: of the evaluation.

    Raises:
        UserError, Failure: as `registry.store.asking`.
    """
    there = aliases.runs_under(parent, _MODEL)
    finished = {digest for digest, _, ended in there if ended}
    for _, run_id, _ in (row for row in there if not row[2]):
        aliases.delete_run(run_id)  # half of one
    for model in made.models:
        if model["digest"] not in finished:
            with aliases.run_under(parent, model["uri"], {_MODEL: model["digest"]}) as run_id:
                log.log_table(run_id, _params(made, model), _series(made, model["digest"]))
    names = [table.FILE, *chosen.files(made)]
    log.log_artifacts(parent, {f"{FOLDER}/{name}": folder / name for name in names})


def page(path: Path, parent: str) -> None:
    """Log the report to the evaluation's run. Raises UserError, Failure as `write`."""
    log.log_artifacts(parent, {path.name: path})


def _series(made: Table, model: str) -> dict[str, dict[int, float]]:
    """The metrics of a model: a figure by step 0, a curve by the numbers of its points."""
    series: dict[str, dict[int, float]] = {}
    for name, figure in figures.named(made).items():
        if value := figure.values.get(model):
            ends = {name: value["value"], f"{name}_low": value["low"], f"{name}_high": value["high"]}
            series |= {key: {0: end} for key, end in ends.items() if _finite(end)}
    for name, curve in figures.curves(made).items():
        if points := {n: point[1] for n, point in enumerate(curve.get(model, ())) if _finite(point[1])}:
            series[f"by_step/{name}"] = points
    return series


def _params(made: Table, model: Mapping[str, Any]) -> dict[str, str]:
    """What a model is, and its conditions: those of all figures, and MEASURE.CONDITION where they are of one measure."""
    common, own = figures.conditions(made)
    params = {"model": model["pinned"], "digest": model["digest"], "what": model["what"], **dict(common)}
    params |= {f"settings.{key}": figures.said(value) for key, value in model["settings"].items()}
    for group, facts in zip(made.groups, own, strict=True):
        if any(model["digest"] in figure["values"] for figure in group["figures"].values()):
            params |= {f"{group['measure']}.{key}": value for key, value in facts}
    return params


def _finite(value: Any) -> bool:
    return value is not None and math.isfinite(value)
