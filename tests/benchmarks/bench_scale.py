"""What a thousand GPUs and a faulty cluster ask of one machine at a time, simulated on this one.

    python tests/benchmarks/bench_scale.py [--only ranks|store|nodes] [--turns 3] [--figures FILE]

ranks: loaders of `--world` ranks over a synthetic dataset of `--samples` in `--shards` (that of bench_open.py), opened
    one after the other in one process, eight held at once. Figures: `open` in seconds and `memory` in GB, each of one
    rank. At three batches of an epoch the ranks' shares must be those of one process, and none be in two.
store: 8 ranks that read latents from an S3 store whose requests take `--latency` seconds, `--faults` of which fail (see
    slow_store.py), with a step of `--step` seconds that sleeps. A step begins when all ranks have their batch. Figures:
    `data_wait`, the share of all time that they wait, without the first step; `rate`, windows a second that a single
    worker reads as fast as it can. The batches must be those of the folder itself. Simulated are the GPUs and the store;
    loaders, workers and clients are the product's, all ranks' on this machine.
nodes: `shard` with `--groups` of one tiny video each on a head and two nodes of one CPU, one of which is killed at a
    third (see scale_nodes.py). Figures: `seconds` of the stage and `driver` in GB, its driver's peak of memory. Each
    group must be committed once and whole.

A plan of ten million sources is measured by bench_plan.py.
"""

import argparse
import json
import multiprocessing
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import bench_open
import figures
import scale_nodes
import scale_ranks
import scale_store

RANKS, BATCH = 8, 8  # of the store's part, and samples of a rank


def ranks(dataset: Path, world: int, turns: int) -> dict[str, list[float]]:
    """The figures of part `ranks`, measured in a process of its own."""
    command = [sys.executable, __file__, "--measure", str(dataset), str(world)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    taken: dict[str, list[float]] = json.loads(done.stdout)
    middle = {name: figures.parts(values, min(turns, len(values))) for name, values in taken.items()}
    print(
        f"{world} ranks: open {max(taken['open']):.2f} s at most, {middle['open']} s; first batch {middle['first']} s;"
        f" memory of a rank {middle['memory']} GB; the shares are disjoint and whole"
    )
    return {"open": middle["open"], "memory": middle["memory"]}


def store(folder: Path, arguments: argparse.Namespace) -> dict[str, list[float]]:
    """The figures of part `store`."""
    values: dict[str, list[float]] = {"data_wait": [], "rate": []}
    late = {"latency": arguments.latency, "faults": arguments.faults}
    scale_store.make(folder, 16, 32)
    for _ in range(arguments.turns):
        settings = {"workers": arguments.workers, "seconds": arguments.step, **late}
        found = _alone(scale_store.measure, folder, arguments.steps, RANKS, BATCH, **settings)
        waited = sum(found["waits"])
        values["data_wait"].append(waited / (waited + arguments.step * len(found["waits"])))
        values["rate"].append(_alone(scale_store.rate, folder, 256, BATCH, **late))
        print(
            f"store: {RANKS} ranks wait {values['data_wait'][-1]:.2%} of the time, {max(found['waits']):.2f} s at most,"
            f" {found['first']:.1f} s for the first; requests: {found['counts']}; a single worker: {values['rate'][-1]:.0f}/s"
        )
    return values


def _alone(measure: Callable[..., Any], *arguments: Any, **settings: Any) -> Any:
    """What `measure` returns in a process of its own: loaders' workers keep the environment that the first had."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments, **settings).result()


def nodes(groups: int, turns: int) -> dict[str, list[float]]:
    """The figures of part `nodes`."""
    values: dict[str, list[float]] = {"seconds": [], "driver": []}
    for _ in range(turns):
        with tempfile.TemporaryDirectory() as folder:
            scale_nodes.make(Path(folder), groups)
            found = scale_nodes.measure(Path(folder), groups)
        values["seconds"].append(found["seconds"])
        values["driver"].append(found["memory"])
        print(f"nodes: {groups} groups once each in {found['seconds']:.0f} s, driver {found['memory']:.2f} GB")
    return values


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=("ranks", "store", "nodes"), help="one part; all without it")
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--world", type=int, default=1000)
    parser.add_argument("--dataset", type=Path, help="keeps the dataset of `ranks` there, and takes it from there")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--step", type=float, default=0.5)
    parser.add_argument("--workers", type=int, default=1, help="of a rank's loader; 1 is what a training has")
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--faults", type=float, default=0.01)
    parser.add_argument("--groups", type=int, default=10_000)
    figures.add_option(parser, turns=3)
    parser.add_argument("--measure", nargs=2, metavar=("DATASET", "WORLD"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(scale_ranks.measure(arguments.measure[0], int(arguments.measure[1]))))
        raise SystemExit
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.only in (None, "ranks"):
            dataset = arguments.dataset or Path(scratch, "dataset")
            if not Path(dataset, "compact").exists():
                bench_open.make(str(dataset), arguments.shards, arguments.samples)
            values |= ranks(dataset, arguments.world, arguments.turns)
        if arguments.only in (None, "store"):
            values |= store(Path(scratch, "store"), arguments)
        if arguments.only in (None, "nodes"):
            values |= nodes(arguments.groups, arguments.turns)
    figures.write(arguments.figures, values)
