"""The way of a benchmark's figures to `make bench`: by name, the value of each turn.

A benchmark that has an entry in `ratios.yaml` takes `--figures FILE` and writes there what it has measured, beside what it
prints for people.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path


def add_option(parser: argparse.ArgumentParser) -> None:
    """Add `--figures FILE`."""
    parser.add_argument("--figures", type=Path, help="Write the values of each turn there, by name, as JSON.")


def write(file: Path | None, figures: Mapping[str, Sequence[float]]) -> None:
    """Write the values of each turn, by name, if a file is given."""
    if file:
        file.write_text(json.dumps({name: list(values) for name, values in figures.items()}) + "\n")
