"""The verdict of a gate by the figures of an evaluation (see `longtake.training.evaluation`): nothing is measured again.

Candidate and champion must have been evaluated in one folder, under the same conditions. A figure has its own name, or
MEASURE.FIGURE, which it needs where several measures have one of its name.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.training.evaluation import table
from longtake.training.evaluation.figures import Figure, named
from longtake.training.evaluation.record import Result
from longtake.training.evaluation.run import RESULTS
from longtake.training.evaluation.table import Table
from longtake.training.registry import gate as gates
from longtake.training.registry import store
from longtake.training.registry.gate import Compared, Gate, Rows, Verdict
from longtake.training.registry.uri import in_store

_SETTLED = ("samples", "window")  # settings of a gate that an evaluation has itself
_FEWEST = 40  # replicates of both models that tell the error of their difference


def check(gate: Gate) -> None:
    """Raises UserError where a gate says what an evaluation has settled."""
    for field in _SETTLED:
        if field in gate.model_fields_set:
            raise UserError(f"gate: {field}: the evaluation has its own clips; leave it out")


def verdict(place: str, candidate: str, champion: str | None, gate: Gate) -> Verdict:
    """Decide by what an evaluation has found about both.

    Args:
        place: the evaluation's folder.
        candidate, champion: versions as "models:/NAME/VERSION".

    Raises:
        UserError: no evaluation there; a model was not evaluated in it; a figure of the gate was not measured of both, or
            its error is not known; the gate has settings that an evaluation has itself.
        Failure: damaged files; the store cannot be reached.
    """
    check(gate)
    folder = Path(storage.filesystem(place)[1])
    if not storage.is_local(place) or not (folder / table.FILE).is_file():
        raise UserError(f"evaluation: {place} has no {table.FILE}; name the folder of `longtake evaluate --out`")
    found = table.read(folder)
    ours = _digest(found, candidate, place, "candidate")
    theirs = _digest(found, champion, place, "champion") if champion else None

    rules = [*gate.metrics, *gate.must_not_regress]
    places = {name: each for name, each in named(found, rules).items() if ours in each.values}
    names = [name for name, each in places.items() if theirs is None or theirs in each.values]
    for name in rules:
        if name in places and name not in names:
            why = _why(found, theirs, places[name])
            raise UserError(f"gate: {name}: {place} has it of {candidate}, but not of the champion {champion}{why}")
    gates.check(gate, names, {name: places[name].better for name in names})

    result = _results(folder)
    pairs = {}
    for name in names:
        figure = places[name]
        units = min(figure.values[model]["units"] for model in (ours, theirs) if model)
        both = result(figure, ours), result(figure, theirs) if theirs else None
        pairs[name] = _compared(gate, figure, name, units, *both)
    for name in rules:
        pooled = places[name].name in result(places[name], ours).pooled
        if theirs and pooled and not pairs[name].gains:
            raise UserError(f"gate: {name}: {place} does not know its error, which a gate needs; leave it out")
    return gates.settled(
        gate,
        Compared(
            min(pairs[name].sources for name in rules),
            {name: value for pair in pairs.values() for name, value in pair.candidate.items()},
            {name: value for pair in pairs.values() for name, value in pair.champion.items()},
            {name: gain for pair in pairs.values() for name, gain in pair.gains.items()},
        ),
        theirs is not None,
    )


def _digest(found: Table, uri: str, place: str, who: str) -> str:
    """The name of a version in the table, which may have another version of the same weights."""
    for model in found.models:
        if model["pinned"] == uri:
            return str(model["digest"])
    weights = store.resolve(uri)["sha256"]
    for model in found.models:
        if weights and in_store(model["pinned"]) and _weights(model["pinned"]) == weights:
            return str(model["digest"])
    has = ", ".join(model["pinned"] for model in found.models) or "no model"
    raise UserError(
        f"evaluation: the {who} {uri} was not evaluated in {place}, which has {has};"
        f" run the same `longtake evaluate` with {uri} too"
    )


def _weights(uri: str) -> str | None:
    try:
        return store.resolve(uri)["sha256"]
    except UserError:
        return None  # deleted since


def _why(found: Table, model: str | None, place: Figure) -> str:
    """Why a model has no such figure, where the table says it."""
    reasons = [r["why"] for r in found.left_out if (r["model"], r["measure"]) == (model, place.group["measure"])]
    return f": {reasons[0]}" if reasons else ""


def _compared(gate: Gate, place: Figure, name: str, units: int, ours: Result, theirs: Result | None) -> Compared:
    """One figure of both, under its name in the gate; no gain is known of one that has hardly any replicates.

    Of a resample there may be no figure: such as of one video drawn again and again.
    """
    figure, better = place.name, place.better
    if figure not in ours.pooled:
        return gates.compared(
            gate, {name: better}, _rows(ours, figure, name), _rows(theirs, figure, name) if theirs else None
        )
    mine = ours.pooled[figure]
    if theirs is None:
        return Compared(units, {name: mine.value}, {}, {})
    their = theirs.pooled[figure]
    gains = {}
    shared = min(len(mine.replicates), len(their.replicates))
    replicates = np.subtract(mine.replicates[:shared], their.replicates[:shared])
    replicates = replicates[np.isfinite(replicates)]
    if units > 1 and len(replicates) >= _FEWEST:
        gain = gates.of_replicates(better, mine.value - their.value, replicates, units, gate.confidence)
        gains = {name: gain}
    return Compared(units, {name: mine.value}, {name: their.value}, gains)


def _rows(result: Result, figure: str, name: str) -> Rows:
    return {place: {name: row[figure]} for place, row in result.rows.items() if figure in row}


def _results(folder: Path) -> Callable[[Figure, str], Result]:
    """What is kept of a model by the measure of a place; each file is read once."""

    @cache
    def read(path: Path) -> Result:
        if not path.is_file():
            raise Failure(f"{path}: is gone; run the same `longtake evaluate` again")
        return table.parsed(path).result

    def result(place: Figure, model: str) -> Result:
        group = place.group
        return read(folder / RESULTS / model[:12] / f"{group['measure']}-{group['digest'][:12]}.json")

    return result
