"""How long `longtake` takes before it works: its help, a run with nothing to do, and a training until its first step.

    python tests/benchmarks/bench_start.py --turns 3

It makes some footage and runs a small recipe once, which is not timed. Then in turns: `longtake --help`; `longtake run` of
that recipe, in which all is finished, in seconds and in CPU seconds; and `longtake stage` of its training, made anew, from
the command to the end of the first step, as MLflow's record of that step has it.
"""

import argparse
import contextlib
import json
import os
import resource
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import figures

RECIPE = """
name: start
workspace: {folder}/workspace
stages:
  shards: {{kind: shard, sources: ["{folder}/footage"], clip: {{short_side: 64, fps: 12}}, val_fraction: 0.25}}
  view: {{kind: curate, dataset: shards}}
  vae:
    kind: pretrain_vae
    phase: image
    dataset: shards
    view: view
    model: {{preset: pv_vae_tiny}}
    sizes: [[64, 64]]
    lambda_gan: 0
    steps: 2
    batch: 2
    run: {{log_every: 1}}
"""


def longtake(*arguments: str) -> tuple[float, float]:
    """Run the command; returns its seconds and its CPU seconds."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", *arguments]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"MLFLOW_TRACKING_URI": ""})
    seconds, after = time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def first_step(store: Path, since: float) -> float:
    """Seconds from `since` to the first step that the store has of a training that began then."""
    question = "SELECT min(timestamp) FROM metrics WHERE key = 'loss' AND step = 1 AND timestamp > ?"
    with contextlib.closing(sqlite3.connect(store)) as db:
        return float(db.execute(question, (since * 1000,)).fetchone()[0]) / 1000 - since


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    figures.add_option(parser)
    options = parser.parse_args()
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(RECIPE.format(folder=folder))
        longtake("footage", f"{folder}/footage", "--count", "8")
        longtake("run", str(recipe))
        for _ in range(options.turns):
            help_seconds, _ = longtake("--help")
            run_seconds, run_cpu = longtake("run", str(recipe))
            began = time.time()
            longtake("stage", str(recipe), "vae", "--force")
            start = first_step(Path(folder) / "workspace" / "mlflow.db", began)
            turn = {
                "help": help_seconds,
                "run-nothing": run_seconds,
                "run-nothing-cpu": run_cpu,
                "start-training": start,
            }
            for name, value in turn.items():
                values.setdefault(name, []).append(value)
            # what was trained anew is the finished run from now on, and its report is not yet made
            longtake("run", str(recipe))
    print(json.dumps({name: round(statistics.median(each), 2) for name, each in values.items()}))
    figures.write(options.figures, values)


if __name__ == "__main__":
    main()
