"""Seconds and peak memory of opening a large dataset, of its first batch's samples, and of resuming in mid-epoch.

    python tests/benchmarks/bench_open.py [--shards 200000] [--samples 10000000] [--dataset FOLDER] [--profile]

The dataset is synthetic: a plan, and the compact index that `compact.write` makes of generated shard indexes with
their true digests; there are no tars and no indexes by themselves. `--dataset` keeps it in a folder, and takes it from
there the next time. Each measurement is of a process of its own, which has imported the loader before, and pandas,
which pyarrow imports with its first array (0.3 s; a training has it from MLflow); medians of `--turns`. `one shape` has windows of one length and size, `buckets` two lengths and the clips' own shapes.

open: `Loader(...)`. first: the samples of the first batch, with their index rows checked. resume: `load_state_dict`
after half an epoch and the samples of the batch that comes next. worker: making the plan ready for a worker process
and unpacking it there. The targets are 1 s and 1 GB for opening, 0.5 s for resuming.
"""

import argparse
import cProfile
import hashlib
import io
import json
import os
import pickle
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import figures
import numpy as np
import pyarrow as pa

from longtake.datasets import compact, index, schema, storage
from longtake.datasets.loader import Loader

BATCH = 8
KINDS: dict[str, dict[str, Any]] = {
    "one shape": {"frames": 17, "size": (128, 128)},
    "buckets": {"frames": (17, 33), "size": 128},
}


def make(folder: str, shards: int, samples: int) -> None:
    """Write dataset.json, the plan and the compact index."""
    storage.write(f"{folder}/dataset.json", storage.canonical_json({"format": schema.FORMAT_VERSION}))
    ends = np.linspace(0, samples, shards + 1).astype(np.int64)
    names = sorted(f"{n:05d}" for n in range(shards))
    nothing = {name: pa.nulls(shards, schema.PLAN.field(name).type) for name in ("duplicate_of", "extra")}
    known = {
        "source": pa.array([_digest(name)[:20] for name in names]),
        "uri": pa.array([f"s3://bucket/{name}.mp4" for name in names]),
        "bytes": pa.array(np.full(shards, 1 << 24)),
        "split": pa.array(["train"] * shards),
        "group": pa.array(np.arange(shards, dtype=np.int32)),
    }
    plan = pa.table({name: (known | nothing)[name] for name in schema.PLAN.names}, schema=schema.PLAN)
    storage.write(f"{folder}/plan/00000.parquet", index.to_parquet(plan))

    def read(dataset: str, split: str, some: Sequence[str]) -> Iterator[index.Shard]:
        for start in range(0, len(some), 2048):
            part = range(start, min(start + 2048, len(some)))
            table = _rows(int(ends[part[0]]), int(ends[part[-1] + 1]))
            for n in part:
                rows = table.slice(int(ends[n] - ends[part[0]]), int(ends[n + 1] - ends[n]))
                record = {"format": schema.FORMAT_VERSION, "bytes": 1 << 26, "sha256": _digest(names[n])}
                digest = index._rows_sha256(f"{dataset}/{split}/{names[n]}.parquet", record, rows)
                yield index.Shard(split, names[n], record["bytes"], record["sha256"], rows, rows_sha256=digest)

    def first(dataset: str, split: str, name: str) -> index.Shard:
        return next(read(dataset, split, [name]))

    listed = mock.patch.object(index, "shard_names", lambda *_: names)
    with listed, mock.patch.object(index, "read_shard", first), mock.patch.object(compact, "_read", read):
        compact.write(folder, "train")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _rows(start: int, stop: int) -> pa.Table:
    """Index rows of the samples with these numbers."""
    rng, count = np.random.default_rng(start), stop - start

    def hexadecimal(digits: int) -> pa.Array:
        text = rng.bytes(count * digits // 2).hex()
        return pa.array([text[n : n + digits] for n in range(0, count * digits, digits)])

    sides = np.array([(128, 224), (224, 128), (128, 128), (128, 176), (176, 128)], np.int32)[
        rng.integers(5, size=count)
    ]
    source = hexadecimal(20)
    labels = rng.integers(400, size=count).tolist()
    known: dict[str, Any] = {
        "key": [f"{one}-00000" for one in source.to_pylist()],
        "source": source,
        "sha256": hexadecimal(64),
        "frame_count": rng.integers(24, 241, count),
        "fps": np.full(count, 24.0),
        "height": sides[:, 0],
        "width": sides[:, 1],
        "label": [f"class {n}" for n in labels],
        "phash": rng.integers(1 << 63, size=count),
    }
    columns = []
    for one in schema.INDEX:
        values = known.get(one.name)
        if values is None:
            values = rng.integers(1 << 20, size=count)
        columns.append(pa.array(values).cast(one.type))
    return pa.Table.from_arrays(columns, schema=schema.INDEX)


def measure(dataset: str, kind: str, profile: bool) -> dict[str, float]:
    """What one fresh process takes."""
    pa.array([0])  # imports pandas
    out = {"import": _peak()}
    profiler = cProfile.Profile()
    if profile:
        profiler.enable()
    begun, cpu = time.perf_counter(), time.process_time()
    loader = Loader(dataset, columns=("video",), batch=BATCH, **KINDS[kind])
    out["open"], out["open CPU"] = time.perf_counter() - begun, time.process_time() - cpu
    out["open peak"] = _peak()
    plan: Any = loader.plan

    def samples(number: int) -> float:
        begun = time.perf_counter()
        for one in plan.samples_of(number)[2]:
            plan.split.base.row(one.shard, one.row)
        return time.perf_counter() - begun

    out["first"] = samples(0)
    state = loader.state_dict() | {"taken": loader.batches_per_epoch // 2}
    # as a new process would: nothing of the epoch is known
    plan._epochs.clear()
    plan.split.base._tables.clear()
    begun = time.perf_counter()
    loader.load_state_dict(state)
    out["resume"] = time.perf_counter() - begun + samples(state["taken"])
    out["next"] = statistics.median(samples(state["taken"] + n) for n in range(1, 33))
    out["peak"] = _peak()
    profiler.disable()
    begun = time.perf_counter()
    packed = pickle.dumps(plan)
    pickle.loads(packed)
    out["worker"], out["worker MB"] = time.perf_counter() - begun, len(packed) / 1e6
    if profile:
        sink = io.StringIO()
        pstats.Stats(profiler, stream=sink).strip_dirs().sort_stats("cumtime").print_stats(40)
        print(sink.getvalue(), file=sys.stderr)
    return out


def _peak() -> float:
    # ru_maxrss would begin with that of the process which started this one
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1e6


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shards", type=int, default=200_000)
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--dataset", type=Path)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    figures.add_option(parser)
    parser.add_argument("--measure", nargs=2, metavar=("DATASET", "KIND"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(*arguments.measure, arguments.profile)))
        raise SystemExit
    with tempfile.TemporaryDirectory() as spool:
        folder = str(arguments.dataset or Path(spool, "dataset"))
        if not Path(folder, "compact").exists():
            begun = time.perf_counter()
            make(folder, arguments.shards, arguments.samples)
            print(f"made in {time.perf_counter() - begun:.0f} s")
        files = ", ".join(
            f"{p.name} {p.stat().st_size / 1e6:.0f} MB" for p in sorted(Path(folder, "compact").iterdir())
        )
        print(f"compact index: {files}")
        found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
        for _ in range(arguments.turns):
            for kind, taken in found.items():
                command = [sys.executable, __file__, "--measure", folder, kind]
                done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
                taken.append(json.loads(done.stdout))
        for kind, taken in found.items():
            mid = {name: statistics.median(one[name] for one in taken) for name in taken[0]}
            print(
                f"{kind}: open {mid['open']:.2f} s ({mid['open CPU']:.2f} of CPU), peak {mid['open peak']:.2f} GB (of which imports {mid['import']:.2f}); "
                f"first {mid['first']:.2f} s; resume {mid['resume']:.2f} s, each batch after {1e3 * mid['next']:.1f} ms; "
                f"peak in all {mid['peak']:.2f} GB; worker {mid['worker']:.2f} s, {mid['worker MB']:.0f} MB"
            )
        # the slower of the kinds
        worst = {
            name: [max(turn) for turn in zip(*([o[name] for o in t] for t in found.values()), strict=True)]
            for name in ("open", "resume", "open peak")
        }
        figures.write(arguments.figures, worst)
        print(f"load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores")
        if arguments.profile:
            for kind in KINDS:
                print(f"profile of {kind}:", flush=True)
                command = [sys.executable, __file__, "--measure", folder, kind, "--profile"]
                subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=sys.stdout)
