"""The way of a benchmark's figures to `make bench`: by name, the value of each turn.

A benchmark that has an entry in `ratios.yaml` takes `--turns N` and `--figures FILE`. It writes there what it has
measured, beside what it prints for people.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

UNABLE = 77  # exit status of a benchmark that cannot run here


def add_option(parser: argparse.ArgumentParser, turns: int | None = None) -> None:
    """Add `--figures FILE`, and `--turns` with a default where one is given."""
    parser.add_argument("--figures", type=Path, help="Write the values of each turn there, by name, as JSON.")
    if turns is not None:
        parser.add_argument("--turns", type=int, default=turns, help=f"What is compared takes so many turns ({turns}).")


def write(file: Path | None, figures: Mapping[str, Sequence[float]]) -> None:
    """Write the values of each turn, by name, if a file is given."""
    if file:
        file.write_text(json.dumps({name: list(values) for name, values in figures.items()}) + "\n")


def unable(why: str) -> NoReturn:
    """End, since something that is no part of Longtake is not here: not an error, and its row keeps its last figure."""
    print(why, file=sys.stderr)
    sys.exit(UNABLE)


def parts(values: Sequence[float], turns: int) -> list[float]:
    """The medians of as many parts of what was measured one after the other, every so many steps a value each."""
    return [statistics.median(values[n * len(values) // turns : (n + 1) * len(values) // turns]) for n in range(turns)]
