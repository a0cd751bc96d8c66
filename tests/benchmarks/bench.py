"""All figures of speed and memory with a goal: measures them, keeps their history, and names what has fallen.

    python tests/benchmarks/bench.py [NAME…] [--turns 3] [--again] [--write]
    python tests/benchmarks/bench.py --list

NAME is a row of `ratios.yaml`, or the beginning of several; all by default. Rows of one program with the same arguments
are measured by one run of it. A figure is the median of the turns, and its noise their standard deviation.

What a run gives is kept in `history.json` as soon as it ends. What this code has given on this machine already is taken
from there: a command that was stopped continues where it was. `--again` measures it anew.

A figure has fallen if it is worse than the last of another commit, or than the best of them, by more than twice √(a² + b²) of
the noises a and b of both, and by more than 1 % of it or of the goal; or if it misses a goal that the last or the best met. It
is named, and the exit status is 1. So it is if a program fails, or gives fewer values than there are turns. Any other goal
that is missed is shown, and so is what cannot be measured here; neither is an error, and a row keeps its last figure.

The best is of committed code, of the same machine and arguments, while others used at most a tenth of the cores; twice its
noise counts against it. `since: COMMIT` in a row leaves out what is older: where a fall is accepted, or where something else
is measured.

LONGTAKE_VIDEOS is a folder of real footage. LONGTAKE_PEERS is a folder with an environment of Python for each other
tool that is compared with; the program's docstring says what to install there.
"""

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

import psutil

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import figures  # noqa: E402
import history  # noqa: E402
from claimed import alone  # noqa: E402
from history import Row, Run  # noqa: E402

ROOT = HERE.parents[1]
PROGRAMS, ROWS, HISTORY, PAGE = HERE, HERE / "ratios.yaml", HERE / "history.json", HERE / "README.md"
BEGIN, END = "<!-- figures -->", "<!-- /figures -->"
UNMEASURED = [":(exclude)*.md", *(f":(exclude){file.relative_to(ROOT)}" for file in (ROWS, HISTORY))]


class Left(Exception):
    """What cannot be measured here, and why."""


class Failed(Exception):
    """A program that ended with an error."""


def chosen(rows: dict[str, Row], names: Sequence[str]) -> list[Row]:
    """The rows that are named or begin so; all without names. SystemExit for a name that no row has."""
    if unknown := [name for name in names if not any(row.startswith(name) for row in rows)]:
        raise SystemExit(f"{', '.join(unknown)}: no such row; `--list` shows all")
    begun = tuple(name for name in names if name not in rows)
    return [row for name, row in rows.items() if not names or name in names or (begun and name.startswith(begun))]


def by_run(rows: Sequence[Row]) -> Iterator[tuple[str, list[Row]]]:
    """Each run and its rows, in the order of the first ones."""
    order = {run: number for number, run in reversed(list(enumerate(row.run for row in rows)))}
    for run, group in groupby(sorted(rows, key=lambda row: order[row.run]), key=lambda row: row.run):
        yield run, list(group)


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def commit() -> str:
    """The last commit that changed anything but pages and figures, with a digest of what is not committed, new files too."""
    changes = git("diff", "HEAD", "--", ".", *UNMEASURED)
    for name in git("ls-files", "--others", "--exclude-standard", "-z", "--", ".", *UNMEASURED).split("\0"):
        if (ROOT / name).is_file():
            with (ROOT / name).open("rb") as file:
                changes += f"{name} {hashlib.file_digest(file, 'sha256').hexdigest()}\n"
    digest = f"+{hashlib.sha256(changes.encode()).hexdigest()[:8]}" if changes else ""
    return git("log", "-1", "--format=%h", "--abbrev=9", "--", ".", *UNMEASURED).strip() + digest


def command_of(run: str) -> list[str]:
    """A row's program and arguments, with the folders of this machine. Left where one is not here."""
    program, *words = shlex.split(run)
    return [sys.executable, str(PROGRAMS / program), *map(_placed, words)]


def _placed(word: str) -> str:
    """An argument; where it begins with VIDEOS or PEERS, the folder or the Python that it stands for."""
    first, _, rest = word.partition("/")
    if first == "VIDEOS":
        folder = os.environ.get("LONGTAKE_VIDEOS", "")
        if not folder or not Path(folder, rest).is_dir():
            raise Left(f"set LONGTAKE_VIDEOS to a folder{f' with `{rest}`' * bool(rest)}, of footage")
        return str(Path(folder, rest).absolute())
    if first == "PEERS":
        python = Path(os.environ.get("LONGTAKE_PEERS", "."), rest, "bin", "python").absolute()
        if not python.exists():
            raise Left(f"no {python}: make that environment as the program says, and set LONGTAKE_PEERS")
        return str(python)
    return word


def others() -> float:
    """The share of the cores in use, of a second in which nothing is measured."""
    return round(psutil.cpu_percent(interval=1) / 100, 3)


def measured(run: str, rows: Sequence[Row], turns: int, code: str) -> Run:
    """Run a program. Left where it cannot run here, Failed where it ends with an error."""
    command = command_of(run)
    loads, shares, start = [round(os.getloadavg()[0], 2)], [others()], time.monotonic()
    if shares[0] > history.ALONE:
        print(f"  others use {shares[0]:.0%} of the cores (load average {loads[0]}): figures may suffer", flush=True)
    with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryFile("w+") as errors:
        file = Path(folder, "figures.json")
        done = subprocess.run([*command, "--turns", str(turns), "--figures", str(file)], cwd=ROOT, stderr=errors)
        seconds = round(time.monotonic() - start)
        if done.returncode:
            errors.seek(0)
            said = [line for line in errors.read().splitlines() if line.strip()] or [f"exit status {done.returncode}"]
            missing = said[-1].startswith("ModuleNotFoundError")
            raise (Left if missing or done.returncode == figures.UNABLE else Failed)(said[-1])
        given = json.loads(file.read_text()) if file.exists() else {}
    if lacking := [row.figure for row in rows if not given.get(row.figure)]:
        raise Failed(f"it gave no {', '.join(lacking)}, but {', '.join(given) or 'nothing'}")
    if short := [f"{len(given[row.figure])} of {row.figure}" for row in rows if len(given[row.figure]) < turns]:
        raise Failed(f"it gave fewer values than the {turns} turns: {', '.join(short)}")
    loads.append(round(os.getloadavg()[0], 2))
    shares.append(others())
    if shares[1] > history.ALONE:
        print(f"  others used {shares[1]:.0%} of the cores at the end (load average {loads[1]})", flush=True)
    values = {row.name: [float(f"{value:.6g}") for value in given[row.figure]] for row in rows}
    date = f"{datetime.now(UTC):%Y-%m-%d}"
    load, share = (loads[0], loads[1]), (shares[0], shares[1])
    return Run(run, date, code, history.machine(), turns, seconds, load, share, values)


def judged(row: Row, runs: Sequence[Run]) -> tuple[str, bool]:
    """A line about a row's last figure, and whether it has fallen."""
    found = history.figures_of(row.name, runs)
    now = found[-1]
    last, best = history.before(row, now, found), history.best(row, now, found)
    line = f"{row.name}: {history.told(row, now)}, goal {row.goal}{'' if row.met(now.value) else ', MISSED'}"
    if last is None:
        return f"{line}; the first", False
    line += f"; {history.told(row, last)} at {last.run.commit}, {last.run.date}"
    if last.run.machine != now.run.machine:
        line += f", on {last.run.machine}"
    if best is not None and best is not last:
        line += f"; the best {history.told(row, best)} at {best.run.commit}, {best.run.date}"
    fell = any(history.fallen(row, now, other) for other in (last, best) if other is not None)
    return line + (": FALLEN" if fell else ""), fell


def measure(rows: dict[str, Row], names: Sequence[str], turns: int, again: bool) -> bool:
    """Measure what is not there yet, and say what has become of each row. True if something fell or failed."""
    code, here = commit(), history.machine()
    runs, bad, left = history.read_history(HISTORY), [], []
    history.check_since(rows, runs)
    work = [(run, [row for row in rows.values() if row.run == run]) for run, _ in by_run(chosen(rows, names))]
    for number, (run, group) in enumerate(work, 1):
        print(f"[{number}/{len(work)}] {run}", flush=True)
        known = [r for r in runs if (r.run, r.commit, r.machine) == (run, code, here) and r.turns >= turns]
        if again or not any({row.name for row in group} <= r.values.keys() for r in known):
            try:
                runs.append(measured(run, group, turns, code))
                history.write_history(HISTORY, runs)
            except (Left, Failed) as e:
                found = [f for row in group for f in history.figures_of(row.name, runs)]
                kept = f"; the last figures are of {found[-1].run.date}" if found else ""
                print(f"  {'left out' if isinstance(e, Left) else 'FAILED'}: {e}{kept}", flush=True)
                (left if isinstance(e, Left) else bad).append(run)
                continue
        # a program measures all its rows, and those that were not asked for have no say
        for row in (row for row in group if row in chosen(rows, names)):
            line, fell = judged(row, runs)
            print(f"  {line}", flush=True)
            bad += [row.name] if fell else []
    if left:
        print(f"left out: {'; '.join(left)}")
    print(f"fallen or failed: {'; '.join(bad)}" if bad else "nothing fell")
    return bool(bad)


def with_table(text: str, table: str) -> str:
    """A page with the table in place of that between the marks. SystemExit without the marks."""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"put {BEGIN} and {END} where the table goes")
    return f"{text.split(BEGIN, maxsplit=1)[0]}{BEGIN}\n\n{table}\n{END}{text.split(END)[1]}"


def write_page(rows: dict[str, Row]) -> None:
    PAGE.write_text(with_table(PAGE.read_text(), history.table(rows, history.read_history(HISTORY))))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="Rows, or what their names begin with; all by default."
    )
    parser.add_argument("--turns", type=int, default=3, help="What is compared takes so many turns (3).")
    parser.add_argument("--again", action="store_true", help="Measure also what this code has given here already.")
    parser.add_argument("--write", action="store_true", help=f"Put the table into {PAGE.relative_to(ROOT)}.")
    parser.add_argument("--list", action="store_true", help="Show rows and goals, and measure nothing.")
    options = parser.parse_args(words)
    if options.turns < 1:
        parser.error("--turns: at least 1")
    rows = history.read_rows(ROWS)
    if options.list:
        for run, group in by_run(chosen(rows, options.names)):
            print(run, *(f"  {row.name:<26} {row.goal} {row.unit}  {row.says}" for row in group), sep="\n")
        if options.write:
            write_page(rows)
        return 0
    with alone(ROOT / "runs" / "bench.lock"):  # of two at once, one waits
        try:
            return int(measure(rows, options.names, options.turns, options.again))
        except KeyboardInterrupt:
            print("stopped; the same command continues here", file=sys.stderr)
            return 130
        finally:
            if options.write:
                write_page(rows)


if __name__ == "__main__":
    sys.exit(main())
