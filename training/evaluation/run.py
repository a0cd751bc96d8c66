"""An evaluation: every measure of every model, each kept as it is done, so that one that was stopped goes on."""

import hashlib
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.training.evaluation import asking, measures, subject, table, vbench
from longtake.training.evaluation.made import Made
from longtake.training.evaluation.measures import MEASURES, Measure
from longtake.training.evaluation.record import Pooled, Result
from longtake.training.evaluation.subject import Named, Subject
from longtake.training.evaluation.suite import Networks, Suite
from longtake.training.evaluation.table import Measured, Table
from longtake.training.registry.uri import in_store

RESULTS, VIDEOS, MODEL = "results", "videos", "model.json"
_NO_NETWORK = "needs a network that is not named"


class Task(NamedTuple):
    """A measure, the part of the suite that it is run on, and the conditions of its figures in this evaluation."""

    name: str
    measure: Measure
    suite: Suite
    conditions: Mapping[str, Any]

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.conditions, sort_keys=True).encode()).hexdigest()


def evaluate(
    models: Sequence[str],
    dataset: str,
    view: str | None,
    suite: Suite,
    networks: Networks,
    folder: Path,
    say: Callable[[str], object] = print,
    for_vbench: Path | None = None,
) -> Table:
    """Measure models side by side on the held-out clips of a dataset.

    What is done is kept in `folder` by model, measure and conditions, and not done again. The table has all models that
    were measured there under these conditions, also by an earlier call; it is written as `evaluation.json`.

    Args:
        models: URIs or folders.
        view: URL of a view of the dataset.
        say: takes a line about what is done.
        for_vbench: a folder, which gets a folder for each model that generates (see `vbench.write`).

    Raises:
        UserError: no such model, dataset, view or measure; a network of another interface; nothing can be measured.
        Failure: damaged files.
    """
    _check(models, suite)
    named = list(_named(models, say))
    material = Made(dataset, view, suite, networks, folder / VIDEOS)
    left_out: list[dict[str, str]] = []
    tasks = _tasks(named, material, left_out)
    for model in named:
        place = folder / RESULTS / model.digest[:12]
        # before its results, which name it in the tables of other models
        storage.write(str(place / MODEL), storage.canonical_json(_facts(model)))
        # before the next one is loaded, since the device may have no room for both
        loaded: Subject | None = None
        material.close()
        for task in tasks:
            if not _concerns(task.measure, task.name, model):
                continue
            path = place / f"{task.name}-{task.digest[:12]}.json"
            if _is_there(path, folder):
                say(f"{model.uri}: {task.name}: is there")
                continue
            loaded = loaded or subject.loaded(model)
            say(f"{model.uri}: {task.name}")
            try:
                found = _measured(task, loaded, material)
            except UserError as e:
                material.told()
                left_out.append({"model": model.digest, "measure": task.name, "why": str(e)})
                continue
            storage.write(str(path), storage.canonical_json(table.plain(found)))
        if for_vbench and model.kind.generator:
            loaded = loaded or subject.loaded(model)
            _write_for_vbench(loaded, material, for_vbench / _short(model), folder)
            say(f"{model.uri}: its videos for VBench are in {for_vbench / _short(model)}")
        measured = any(_concerns(task.measure, task.name, model) for task in tasks)
        if not measured and all(each["model"] != model.digest for each in left_out):
            left_out.append(
                {"model": model.digest, "measure": "all", "why": f"none of these measures is of a {model.kind.what}"}
            )
    made = _table(folder, named, tasks, left_out)
    if not made.groups:
        # the same reason for several measures is told once; those without a network come last
        reasons = sorted({each["why"] for each in left_out}, key=lambda why: (why.startswith(_NO_NETWORK), why))
        raise UserError(f"nothing can be measured: {'; '.join(reasons[:3])}")
    table.write(folder, made)
    return made


def _is_there(path: Path, folder: Path) -> bool:
    """Whether a result is kept, with all videos that it was measured on. Raises Failure where it is damaged."""
    return path.exists() and all((folder / video["file"]).exists() for video in table.parsed(path).videos)


def _check(models: Sequence[str], suite: Suite) -> None:
    if not models:
        raise UserError("models: there are none; name one at least")
    if unknown := [name for name in suite.measures or () if name not in MEASURES]:
        raise UserError(f"measures: there is no {unknown[0]!r}; there are {', '.join(MEASURES)}")
    asking.check(suite.settings)


def _write_for_vbench(model: Subject, material: Made, target: Path, folder: Path) -> None:
    if not material.suite.videos:
        raise UserError("vbench: the suite has no videos; name another suite, or give it some")
    with torch.inference_mode():
        vbench.write(target, material.generated(model, material.suite.videos[0]), folder)


def _short(model: Named) -> str:
    """A name for the folder of a model: `latte-3-0123abcd` of models:/latte/3, or by the end of its path."""
    name = model.pinned.removeprefix("models:/") if in_store(model.pinned) else Path(model.pinned).name
    return f"{re.sub(r'[^a-zA-Z0-9_.]+', '-', name)}-{model.digest[:8]}"


def _named(models: Sequence[str], say: Callable[[str], object]) -> Iterator[Named]:
    """What the URIs name, each model once."""
    known: dict[str, str] = {}
    for uri in models:
        named = subject.described(uri)
        if named.digest in known:
            say(f"{uri}: is the same model as {known[named.digest]}, and measured once")
        else:
            known[named.digest] = uri
            yield named


def _tasks(models: Sequence[Named], material: Made, left_out: list[dict[str, str]]) -> list[Task]:
    """The measures that some model has, in their order; those that cannot be are left out for each such model."""
    tasks: list[Task] = []
    for name in material.suite.measures or MEASURES:
        measure = measures.load(name)
        concerned = [model.digest for model in models if _concerns(measure, name, model)]
        if not concerned:
            continue
        if why := _hindrance(measure, material):
            left_out += [{"model": digest, "measure": name, "why": why} for digest in concerned]
        else:
            suites = _suites(measure, material.suite)
            found = [Task(name, measure, suite, _conditions(name, measure, material, suite)) for suite in suites]
            tasks += {task.digest: task for task in found}.values()
    return tasks


def _suites(measure: Measure, suite: Suite) -> list[Suite]:
    """A suite for each length of the videos that a measure of generators is run on, by themselves: they do not compare."""
    if measure.of != "generates" or len(suite.videos) < 2:
        return [suite]
    return [suite.model_copy(update={"videos": (videos,)}) for videos in suite.videos]


def _hindrance(measure: Measure, material: Made) -> str:
    """Why a measure cannot be here, if so."""
    if missing := material.brought.missing(measure.networks):
        return f"{_NO_NETWORK}: {', '.join(missing)}"
    try:
        material.parts(measure.of)
    except UserError as e:
        return str(e)
    return ""


def _conditions(name: str, measure: Measure, material: Made, suite: Suite) -> dict[str, Any]:
    return {
        **material.conditions(measure.of),
        "measure": name,
        "version": measure.version,
        **measure.conditions(suite),
        "networks": material.brought.record(measure.networks),
        "resamples": material.suite.resamples,
        **({"settings": material.suite.settings} if material.suite.settings else {}),
    }


def _concerns(measure: Measure, name: str, model: Named) -> bool:
    return measure.of in subject.aspects(model.kind) and (not measure.own or name in model.kind.measures)


def _measured(task: Task, model: Subject, material: Made) -> Measured:
    material.told()
    torch.manual_seed(material.suite.seed)
    whole, material.suite = material.suite, task.suite
    try:
        with torch.inference_mode():
            result = task.measure.run(model, material)
    finally:
        material.suite = whole
    videos, notes = material.told()
    result = _finite(result, [*(f"{task.name}: {note}" for note in result.notes), *notes])
    return Measured(
        task.name, task.measure.what, task.measure.figures, model.digest, task.conditions, task.digest,
        material.suite.resamples, material.suite.seed, videos, result,
    )  # fmt: skip


def _finite(result: Result, notes: Sequence[str]) -> Result:
    """A result without the figures that are no numbers in some clip, and a note for each."""
    odd = {name for row in result.rows.values() for name, value in row.items() if not math.isfinite(value)}
    odd |= {name for name, pooled in result.pooled.items() if not math.isfinite(pooled.value)}
    rows = {place: {n: v for n, v in row.items() if n not in odd} for place, row in result.rows.items()}
    pooled = {name: each for name, each in result.pooled.items() if name not in odd}
    curves = {
        name: {at: kept for at, of in curve.items() if (kept := _finite_point(of))}
        for name, curve in result.curves.items()
    }
    return Result(
        rows, pooled, curves, [*notes, *(f"{name} is no finite number, and left out" for name in sorted(odd))]
    )


def _finite_point(of: Mapping[str, float] | Pooled) -> Mapping[str, float] | Pooled | None:
    if isinstance(of, Pooled):
        return of if math.isfinite(of.value) else None
    return {unit: value for unit, value in of.items() if math.isfinite(value)}


def _facts(model: Named) -> dict[str, Any]:
    """What the table says of a model."""
    return {
        "uri": model.uri,
        "pinned": model.pinned,
        "digest": model.digest,
        "what": model.kind.what,
        "settings": model.facts.get("sampling") or {},
        "notes": [],
    }


def _table(folder: Path, named: Sequence[Named], tasks: Sequence[Task], left_out: Sequence[Mapping[str, str]]) -> Table:
    """The table of this evaluation's models, and of those that an earlier one has measured under the same conditions."""
    models = {model.digest: _facts(model) for model in named}
    results = []
    wanted = {f"{task.name}-{task.digest[:12]}.json" for task in tasks}
    for path in sorted((folder / RESULTS).glob("*/*.json")):
        if path.name not in wanted:
            continue
        measured = table.parsed(path)
        if measured.model not in models:
            models[measured.model] = table.model_of(path.parent / MODEL, measured.model)
        results.append(measured)
    return table.made(list(models.values()), results, left_out)
