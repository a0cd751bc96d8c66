"""What a measure finds out about a model, before any mean is taken: by source, so that errors can be told. Plain data."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Unit = (
    str  # what the bootstrap draws: a source of held-out clips, or a prompt of generated videos, or a video by itself
)


class Pooled(NamedTuple):
    """A figure of all clips together, such as a Fréchet distance.

    value        of all
    replicates   the same of each resample of the units, in the order of `bootstrap.draws`, so that models pair; only of the
                 first of them where each is slow, and none where there are too few units
    units        how many there are; 0: as many as sources among the clips
    """

    value: float
    replicates: Sequence[float]
    units: int = 0


class Result(NamedTuple):
    """Figures of one model by one measure; any part may be empty.

    rows       by (unit, clip or video): figures that are means over them
    pooled     figures of all together
    curves     by figure: position (seconds, frames or a chunk's number) -> unit -> mean over its clips
    notes      facts for people, such as that frames were resampled, or why a figure was refused
    """

    rows: Mapping[tuple[Unit, str], Mapping[str, float]] = {}
    pooled: Mapping[str, Pooled] = {}
    curves: Mapping[str, Mapping[float, Mapping[Unit, float] | Pooled]] = {}
    notes: Sequence[str] = ()


def plain(result: Result) -> dict[str, Any]:
    """A result for JSON: rows as [unit, key, figures], curves as [position, means by unit] or [position, [pooled]]."""
    curves = {
        name: [[at, [_plain(units)] if isinstance(units, Pooled) else dict(units)] for at, units in curve.items()]
        for name, curve in result.curves.items()
    }
    return {
        "rows": [[*place, dict(figures)] for place, figures in result.rows.items()],
        "pooled": {name: _plain(pooled) for name, pooled in result.pooled.items()},
        "curves": curves,
        "notes": list(result.notes),
    }


def parsed(content: Mapping[str, Any]) -> Result:
    """The result that `plain` has written. Raises ValueError, KeyError, TypeError for anything else."""
    curves = {
        name: {float(at): Pooled(**units[0]) if isinstance(units, list) else units for at, units in curve}
        for name, curve in content["curves"].items()
    }
    rows = {(unit, key): figures for unit, key, figures in content["rows"]}
    return Result(
        rows, {name: Pooled(**pooled) for name, pooled in content["pooled"].items()}, curves, content["notes"]
    )


def _plain(pooled: Pooled) -> dict[str, Any]:
    return pooled._asdict() | {"replicates": list(map(float, pooled.replicates))}
