"""What `make bench` has measured: the rows of `ratios.yaml`, the runs in `history.json`, and what has fallen.

A run is what one call of a program gave: its date, commit and machine, how busy that was, and the turns of each row.
"""

import json
import math
import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml

from longtake.datasets import storage

ALONE = 0.1  # share of the cores that others may use while something is measured
NOISES = 2.0  # a figure has fallen if it is worse by so many noises of a difference,
LEAST = 0.01  # and by such a share of the figure before, or of the goal
UNKNOWN = 0.05  # noise of a single turn, as a share of its figure [assumption]
UNITS = ("s", "GB")


@dataclass(frozen=True)
class Row:
    """An entry of `ratios.yaml`, whose head says what its fields are."""

    name: str
    says: str
    run: str
    figure: str
    most: float | None = None
    least: float | None = None
    unit: str = ""
    tried: str = ""
    since: str = ""

    def met(self, value: float) -> bool:
        return value <= self.most if self.most is not None else value >= (self.least or 0.0)

    def worse(self, value: float, than: float) -> float:
        """By how much a value is worse than another; below zero where it is better."""
        return value - than if self.most is not None else than - value

    @property
    def goal(self) -> str:
        return f"≤ {shown(self.most)}" if self.most is not None else f"≥ {shown(self.least or 0.0)}"


@dataclass(frozen=True)
class Run:
    """What a program gave.

    run      the program and its arguments
    date     of its end, as 2026-01-31
    commit   the last that changed anything but pages and figures; with + and a digest of what is not committed
    machine  cores, processor and versions, in words
    turns    that were asked for
    seconds  that it took
    load     the machine's load average before and after
    others   the share of the cores that others used just before and just after
    values   the turns of each row
    """

    run: str
    date: str
    commit: str
    machine: str
    turns: int
    seconds: int
    load: tuple[float, float]
    others: tuple[float, float]
    values: Mapping[str, Sequence[float]] = field(default_factory=dict)

    @property
    def disturbed(self) -> bool:
        return max(self.others) > ALONE


@dataclass(frozen=True)
class Figure:
    """A row's figure in a run: the median of the turns, and their standard deviation."""

    value: float
    noise: float
    run: Run


def read_rows(file: Path) -> dict[str, Row]:
    """The rows in their order. SystemExit that names the row and the field for a mistake."""
    rows = {}
    for name, given in (yaml.safe_load(file.read_text()) or {}).items():
        known = set(Row.__dataclass_fields__) - {"name"}
        if unknown := set(given) - known:
            raise SystemExit(f"{file.name}: {name}: no field {', '.join(sorted(unknown))}; there are {sorted(known)}")
        if missing := {"says", "run", "figure"} - set(given):
            raise SystemExit(f"{file.name}: {name}: say {', '.join(sorted(missing))}")
        row = Row(name, **given)
        if (row.most is None) == (row.least is None):
            raise SystemExit(f"{file.name}: {name}: give it one of `most` and `least`")
        if row.unit and row.unit not in UNITS:
            raise SystemExit(f"{file.name}: {name}: unit {row.unit!r} is not one of {', '.join(UNITS)}")
        rows[name] = row
    return rows


def read_history(file: Path) -> list[Run]:
    """All runs, the oldest first."""
    found = json.loads(file.read_text()) if file.exists() else []
    return [Run(**run | {"load": tuple(run["load"]), "others": tuple(run["others"])}) for run in found]


def write_history(file: Path, runs: Sequence[Run]) -> None:
    """Write them at once, a line each."""
    storage.write(str(file), ("[\n" + ",\n".join(json.dumps(asdict(run)) for run in runs) + "\n]\n").encode())


def figures_of(name: str, runs: Sequence[Run]) -> list[Figure]:
    """A row's figures, the oldest first."""
    return [_figure(run.values[name], run) for run in runs if name in run.values]


def _figure(values: Sequence[float], run: Run) -> Figure:
    value = statistics.median(values)
    return Figure(value, statistics.stdev(values) if len(values) > 1 else UNKNOWN * abs(value), run)


def before(row: Row, now: Figure, figures: Sequence[Figure]) -> Figure | None:
    """The last figure of another commit. One with a unit must be of the same machine; a ratio need not."""
    here = [f for f in figures if not row.unit or f.run.machine == now.run.machine]
    return next((f for f in reversed(here) if f.run.commit != now.run.commit), None)


def check_since(rows: Mapping[str, Row], runs: Sequence[Run]) -> None:
    """SystemExit for a row whose `since` names a commit that has not measured it."""
    for row in rows.values():
        if row.since and row.since not in [f.run.commit for f in figures_of(row.name, runs)]:
            raise SystemExit(
                f"{row.name}: since: no figure is of commit {row.since!r}; take one of its figures' commits"
            )


def best(row: Row, now: Figure, figures: Sequence[Figure]) -> Figure | None:
    """The best figure of other commits, of those by which a figure can be held: committed code, same machine, same arguments,
    and no others at work.

    Its noise counts against it: one that was good by luck is no measure, and hides none that was good for sure.
    """
    commits = [f.run.commit for f in figures]
    alike = [
        f
        for f in figures[commits.index(row.since) if row.since else 0 :]
        if f.run.commit != now.run.commit
        and "+" not in f.run.commit
        and not f.run.disturbed
        and (f.run.run, f.run.machine) == (row.run, now.run.machine)
    ]
    return min(alike, key=lambda f: row.worse(f.value, 0.0) + NOISES * f.noise, default=None)


def fallen(row: Row, now: Figure, other: Figure) -> bool:
    """Whether a figure is worse than another by more than the noise of both, or misses a goal that the other met."""
    goal = row.most if row.most is not None else row.least or 0.0
    least = max(NOISES * math.hypot(now.noise, other.noise), LEAST * max(abs(other.value), abs(goal)))
    return row.worse(now.value, other.value) > least or (row.met(other.value) and not row.met(now.value))


def shown(value: float) -> str:
    """Three digits, or all before the point."""
    decimals = min(4, max(0, 2 - math.floor(math.log10(max(abs(value), 1e-3)))))
    text = f"{value:.{decimals}f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def told(row: Row, figure: Figure) -> str:
    """A figure with its noise, in as many decimals, and its unit."""
    decimals = min(4, max(0, 2 - math.floor(math.log10(max(abs(figure.value), 1e-3)))))
    return f"{figure.value:.{decimals}f} ± {figure.noise:.{decimals}f} {row.unit}".strip()


def machine() -> str:
    """This machine in words."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    versions = f"Python {platform.python_version()}, torch {torch.__version__}"
    return f"{len(os.sched_getaffinity(0))} cores of {model}, {versions}"


def table(rows: Mapping[str, Row], runs: Sequence[Run]) -> str:
    """The last figure of each row in Markdown, and the machines that they are of."""
    lines = ["| what | goal | figure | met | measured | what was tried |", "|-|-|-|-|-|-|"]
    machines: dict[str, None] = {}
    disturbed = False
    for row in rows.values():
        what, goal = f"`{row.name}`: {row.says}", f"{row.goal} {row.unit}".strip()
        if not (figures := figures_of(row.name, runs)):
            lines.append(_line(what, goal, "–", "–", "not yet", row.tried))
            continue
        last = figures[-1]
        machines[last.run.machine] = None
        disturbed |= last.run.disturbed
        mark = "*" if last.run.disturbed else ""
        measured = f"{last.run.date}, {last.run.commit}"
        met = "yes" if row.met(last.value) else "no"
        lines.append(_line(what, goal, f"{told(row, last)}{mark}", met, measured, row.tried))
    text = "\n".join(lines) + "\n"
    if disturbed:
        text += f"\n\\* Others used more than {ALONE:.0%} of the cores just before or after.\n"
    if machines:
        text += "\nMeasured on:\n\n" + "".join(f"- {words}\n" for words in machines)
    return text


def _line(*cells: Any) -> str:
    return "| " + " | ".join(" ".join(str(cell).split()).replace("|", "\\|") for cell in cells).rstrip() + " |"
