"""What a measure finds out about a model, before any mean is taken: by source, so that errors can be told. Plain data."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

Unit = (
    str  # what the bootstrap draws: a source of held-out clips, or a prompt of generated videos, or a video by itself
)


class Pooled(NamedTuple):
    """A figure of all clips together, such as a Fréchet distance.

    value        of all
    replicates   the same of each resample of the units, in the order of `bootstrap.draws`, so that models pair; of the first
                 resamples alone where each takes long, and none of a single unit
    units        how many there are; 0: as many as sources among the clips
    """

    value: float
    replicates: Sequence[float]
    units: int = 0


class Result(NamedTuple):
    """Figures of one model by one measure; any part may be empty.

    rows       by (unit, clip or video): figures that are means over them
    pooled     figures of all together
    curves     by figure: position (seconds, frames or a chunk's number) -> unit -> mean over its clips; or -> all together
    notes      facts for people, such as that frames were resampled, or why a figure was refused
    """

    rows: Mapping[tuple[Unit, str], Mapping[str, float]] = {}
    pooled: Mapping[str, Pooled] = {}
    curves: Mapping[str, Mapping[float, Mapping[Unit, float] | Pooled]] = {}
    notes: Sequence[str] = ()


def plain(result: Result) -> dict[str, Any]:
    """A result for JSON: rows as [unit, key, figures], curves as [position, means by unit, or what is of all together]."""
    return {
        "rows": [[*place, dict(figures)] for place, figures in result.rows.items()],
        "pooled": {name: _pooled(pooled) for name, pooled in result.pooled.items()},
        "curves": {
            name: [
                [at, {"all": _pooled(of)} if isinstance(of, Pooled) else {"units": dict(of)}]
                for at, of in curve.items()
            ]
            for name, curve in result.curves.items()
        },
        "notes": list(result.notes),
    }


def _pooled(pooled: Pooled) -> dict[str, Any]:
    return pooled._asdict() | {"replicates": list(pooled.replicates)}


def parsed(content: Mapping[str, Any]) -> Result:
    """The result that `plain` has written. Raises ValueError, KeyError, TypeError for anything else."""
    return Result(
        {
            (unit, key): {name: float(value) for name, value in figures.items()}
            for unit, key, figures in content["rows"]
        },
        {name: Pooled(**pooled) for name, pooled in content["pooled"].items()},
        {
            name: {float(at): Pooled(**of["all"]) if "all" in of else of["units"] for at, of in curve}
            for name, curve in content["curves"].items()
        },
        content["notes"],
    )
