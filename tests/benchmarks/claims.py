"""The papers' claims with small models: each arm with several seeds, a table a paper on its family's page.

    python tests/benchmarks/claims.py run PAPER [CLAIM…] [--seeds 3] [--short] [--jobs 1] [--out FOLDER] [--work FOLDER]
    python tests/benchmarks/claims.py table [PAPER…] [--out FOLDER] [--write]

PAPER is a file in `claimed/`. What an arm of a claim gives with a seed is a small JSON file,
`OUT/PAPER/CLAIM/ARM-SEED.json`, with the settings that made it; those that are there are not run again, unless the settings
have changed since. `table` refuses results of other settings. By default they are those in `claimed/results`, which the
pages show; `--short`, ten minutes a paper, says whether all of it runs, not whether a claim holds, and keeps its results in
the folder of work. A run may be killed and started again; of two that come to the same seed of a paper, one waits.

A claim holds where mean ± standard deviation over the seeds of the arms that it compares, three at least, do not overlap.
"""

import argparse
import importlib
import json
import math
import pkgutil
import platform
import re
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import claimed  # noqa: E402
from claimed import Claim, alone, digest  # noqa: E402

from longtake.datasets import storage  # noqa: E402

RESULTS = HERE / "claimed" / "results"
TRAINING = HERE.parents[1] / "training"
LEAST = 3  # seeds of an arm, for a verdict
BEGIN, END = "<!-- claims -->", "<!-- /claims -->"
PAPERS = tuple(sorted(module.name for module in pkgutil.iter_modules(claimed.__path__) if module.name[0] != "_"))


def claims_of(paper: str) -> Sequence[Claim]:
    """The claims in a file of `claimed`."""
    found: Sequence[Claim] = importlib.import_module(f"claimed.{paper}").CLAIMS
    return found


def result_file(out: Path, paper: str, claim: Claim, arm: str, seed: int) -> Path:
    names = [re.sub(r"[^\w.]+", "-", other).strip("-") for other in claim.arms]
    assert len(set(names)) == len(names), f"{claim.name}: two arms have the same file"
    return out / paper / claim.name / f"{names[list(claim.arms).index(arm)]}-{seed}.json"


def settings_of(claim: Claim, arm: str, short: bool) -> dict[str, Any]:
    """All that a result depends on beside its seed, as JSON gives it back."""
    settings: dict[str, Any] = json.loads(json.dumps({**claim.settings(short), "arm": claim.arms[arm]}))
    return settings


def run_one(paper: str, claim: Claim, arm: str, seed: int, out: Path, work: Path, short: bool) -> None:
    """Run an arm of a claim with a seed, unless its result is there and of these settings.

    AssertionError for figures that the claim has not.
    """
    file, settings = result_file(out, paper, claim, arm, seed), settings_of(claim, arm, short)
    mine = work / ("short" if short else "whole") / paper
    # arms and claims of a seed share models
    with alone(mine / f"seed-{seed}.lock"):
        if file.exists() and json.loads(file.read_text()).get("settings") == settings:
            return
        folder = mine / f"{claim.name}-{digest(claim.settings(short))}"
        folder.mkdir(exist_ok=True)
        begun = time.monotonic()
        figures = {name: float(value) for name, value in claim.run(arm, seed, folder, short).items()}
        assert figures.keys() <= claim.figures.keys(), (
            f"{claim.name}: no figure {figures.keys() - claim.figures.keys()}"
        )
        versions = {"longtake": version("longtake"), "torch": torch.__version__, "python": platform.python_version()}
        record = {"arm": arm, "seed": seed, "seconds": round(time.monotonic() - begun)}
        record |= {"settings": settings, "versions": versions, "figures": figures}
        lines = [f"{json.dumps(name)}: {json.dumps(value)}" for name, value in record.items()]
        storage.write(str(file), ("{\n  " + ",\n  ".join(lines) + "\n}\n").encode())
    print(f"{claim.name} {arm} {seed}: {json.dumps(figures)} in {record['seconds']} s", flush=True)


def run(options: argparse.Namespace) -> None:
    """Seeds in turn, so that a claim that was stopped has all arms of the first ones. With `--jobs` each is a process."""
    claims = {claim.name: claim for claim in claims_of(options.paper)}
    if unknown := set(options.claims) - claims.keys():
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such claim; {options.paper} has {', '.join(claims)}")
    work = Path(options.work)
    out = Path(options.out) if options.out else work / "short" / "results" if options.short else RESULTS
    chosen = [claims[name] for name in options.claims or claims]
    if options.jobs == 1:
        for seed in range(options.first_seed, options.first_seed + options.seeds):
            for claim in chosen:
                for arm in claim.arms:
                    run_one(options.paper, claim, arm, seed, out, work, options.short)
        return

    def process(seed: int) -> int:
        command = [sys.executable, __file__, "run", options.paper, *(claim.name for claim in chosen)]
        command += ["--first-seed", str(seed), "--seeds", "1", "--out", str(out), "--work", str(work)]
        return subprocess.run([*command, *(["--short"] if options.short else [])]).returncode

    with ThreadPoolExecutor(options.jobs) as pool:
        seeds = range(options.first_seed, options.first_seed + options.seeds)
        if failed := [seed for seed, code in zip(seeds, pool.map(process, seeds), strict=True) if code]:
            raise SystemExit(f"seeds {', '.join(map(str, failed))} failed; run the same command again")


def results_of(out: Path, paper: str, claim: Claim, short: bool = False) -> dict[str, list[dict[str, Any]]]:
    """The records of each arm, in order of the seeds. SystemExit for one that was made with other settings."""
    found: dict[str, list[dict[str, Any]]] = {arm: [] for arm in claim.arms}
    for file in sorted((out / paper / claim.name).glob("*.json")):
        record = json.loads(file.read_text())
        if record["arm"] not in found:
            raise SystemExit(f"{file}: the claim has no arm {record['arm']}; delete the file")
        if record.get("settings") != settings_of(claim, record["arm"], short):
            raise SystemExit(f"{file}: made with other settings; run {paper} {claim.name} again, or delete the file")
        found[record["arm"]].append(record)
    return {arm: sorted(records, key=lambda record: record["seed"]) for arm, records in found.items()}


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation, NaN of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else math.nan


def verdict(better: str, first: Sequence[float], second: Sequence[float]) -> str:
    """Whether the first values are better than the second: holds, does not hold, or undecided of fewer seeds than `LEAST`."""
    if min(len(first), len(second)) < LEAST:
        return "undecided, too few seeds"
    (mean, deviation), (other, of_other) = spread(first), spread(second)
    ahead, both = mean - other if better == "higher" else other - mean, deviation + of_other
    return (
        "holds"
        if ahead > both
        else "does not hold, they overlap"
        if ahead >= -both
        else "does not hold, the reverse does"
    )


def table(out: Path, paper: str, claim: Claim, short: bool = False) -> str:
    """A claim in Markdown: what the paper says, mean ± sd of each figure by arm beside the paper's, if any, and what holds."""
    records = results_of(out, paper, claim, short)
    values = {
        (figure, arm): [r["figures"][figure] for r in records[arm] if figure in r["figures"]]
        for figure in claim.figures
        for arm in claim.arms
    }
    seeds = sorted({len(found) for found in records.values() if found})
    if not seeds:
        return wrapped(f"**{claim.name}**: {claim.says} Not run yet.") + "\n"
    count = "–".join(map(str, dict.fromkeys((seeds[0], seeds[-1]))))
    lines = [wrapped(f"**{claim.name}**: {claim.says} Seeds: {count}."), ""]
    head = ["", *claim.arms, "the paper's"]
    lines += ["| " + " | ".join(head).strip() + " |", "|" + "-|" * len(head)]
    for figure, shown in claim.figures.items():
        if not any(values[figure, arm] for arm in claim.arms):
            continue
        cells = [f"{shown.name} ({'↑' if shown.better == 'higher' else '↓'})"]
        cells += [cell(values[figure, arm]) for arm in claim.arms]
        lines.append("| " + " | ".join([*cells, shown.paper or "–"]) + " |")
    lines.append("")
    for better, other, figure in claim.holds:
        shown = claim.figures[figure]
        said = verdict(shown.better, values[figure, better], values[figure, other])
        lines.append(wrapped(f"- {better} against {other}, {shown.name}: {said}.", "  "))
    return "\n".join(lines) + "\n"


def wrapped(text: str, indent: str = "") -> str:
    """A paragraph in lines as long as pages have."""
    return textwrap.fill(text, 118, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)


def cell(values: Sequence[float]) -> str:
    """Mean ± sd with as many decimals as show three digits of the mean."""
    if not values:
        return "–"
    mean, deviation = spread(values)
    size = max(abs(mean), 1e-3)
    decimals = min(4, max(0, 2 - math.floor(math.log10(size))))
    return f"{mean:.{decimals}f}" + ("" if math.isnan(deviation) else f" ± {deviation:.{decimals}f}")


def page_of(family: str) -> Path:
    """The page of a family, or of a part of training that claims are about, such as text."""
    pages = (TRAINING / "models" / family / "README.md", TRAINING / family / "README.md")
    return next(page for page in pages if page.exists())


def blocks(out: Path, papers: Sequence[str] = PAPERS, short: bool = False) -> Iterator[tuple[Path, str]]:
    """Each page and its tables; a page without any result is left out."""
    found = [(claim.paper, paper, claim) for paper in papers for claim in claims_of(paper)]
    for family, rows in groupby(sorted(found, key=lambda row: row[0]), key=lambda row: row[0]):
        claims = [(paper, claim) for _, paper, claim in rows]
        if any(any(results_of(out, paper, claim, short).values()) for paper, claim in claims):
            yield page_of(family), "\n".join(table(out, paper, claim, short) for paper, claim in claims)


def with_block(text: str, block: str) -> str:
    """A page with its tables in place of those between the marks. SystemExit without the marks."""
    if BEGIN not in text or END not in text:
        raise SystemExit(f"put {BEGIN} and {END} where the tables go")
    before, after = text.split(BEGIN, maxsplit=1)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{block}\n{END}{after}"


def show(options: argparse.Namespace) -> None:
    if unknown := set(options.papers) - set(PAPERS):
        raise SystemExit(f"{', '.join(sorted(unknown))}: no such paper; there are {', '.join(PAPERS)}")
    # a page may have the claims of several papers
    papers = PAPERS if options.write else options.papers or PAPERS
    for page, block in blocks(Path(options.out or RESULTS), papers, options.short):
        print(block)
        if options.write:
            page.write_text(with_block(page.read_text(), block))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("paper", choices=PAPERS)
    running.add_argument("claims", nargs="*", help="All of the paper's by default.")
    running.add_argument("--seeds", type=int, default=3)
    running.add_argument("--first-seed", type=int, default=0)
    running.add_argument("--short", action="store_true", help="Ten minutes for the paper.")
    running.add_argument("--jobs", type=int, default=1, help="Seeds at once.")
    running.add_argument("--out", help="Where results are kept.")
    running.add_argument("--work", default="runs/claims", help="Where models and data are kept.")
    running.set_defaults(call=run)
    printing = commands.add_parser("table")
    printing.add_argument("papers", nargs="*", metavar="PAPER", help=f"Of {', '.join(PAPERS)}; all by default.")
    printing.add_argument("--out")
    where = printing.add_mutually_exclusive_group()
    where.add_argument("--write", action="store_true", help="Put them on the pages, between their marks.")
    where.add_argument("--short", action="store_true", help="Of results that `run --short` has made.")
    printing.set_defaults(call=show)
    options = parser.parse_args()
    options.call(options)


if __name__ == "__main__":
    main()
