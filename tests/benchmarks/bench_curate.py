"""Seconds and memory of curating a synthetic dataset of a million clips: thresholds, exact and near duplicates.

    python tests/benchmarks/bench_curate.py [--clips 1000000] [--radius 4] [--turns 1]
    python tests/benchmarks/bench_curate.py --columns 10 [--compact]

One clip in ten has the content of another, one in ten a hash some bits away, one in fifty is black. With --columns the
rules are on so many columns of scores, half of them numbers with bounds and percentiles, half of them labels, and
duplicates are exact ones alone: a million clips by ten columns take less than 5 s, with compact files and without;
without `--figures` it exits with 1 where they do not. Making the indexes is not counted, reading them and writing the view is. Leave
OMP_NUM_THREADS unset: it also limits the threads of Arrow.
"""

import argparse
import hashlib
import multiprocessing
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import figures
import numpy as np
import pyarrow as pa

from longtake.datasets import compact, index, schema, scores, storage
from longtake.pipeline.stages import curate

SHARD = 50_000
MOST_SECONDS = 5.0  # of a million clips by ten columns
LABELS = ("red", "green", "blue", *(f"label {number}" for number in range(17)))


def make(dataset: str, count: int, columns: int, folded: bool) -> None:
    """Index files without tars, and tables of scores: curation reads nothing else."""
    rng = np.random.default_rng(0)
    contents = rng.integers(0, 1 << 62, count)
    hashes = rng.integers(0, 1 << 64, count, dtype=np.uint64)
    tenth = count // 10
    contents[rng.integers(0, count, tenth)] = contents[rng.integers(0, count, tenth)]
    flips = np.bitwise_or.reduce(np.uint64(1) << rng.integers(0, 64, (3, tenth), dtype=np.uint64), axis=0)
    hashes[rng.integers(0, count, tenth)] = hashes[rng.integers(0, count, tenth)] ^ flips
    hashes[rng.integers(0, count, count // 50)] = 0
    storage.write(storage.join(dataset, "dataset.json"), b'{"format": 1}')
    for number, start in enumerate(range(0, count, SHARD)):
        rows = range(start, min(start + SHARD, count))
        sources = [hashlib.sha256(b"%d" % (row // 20)).hexdigest()[:20] for row in rows]
        made = {
            "key": [f"{source}-{row % 20:05d}" for source, row in zip(sources, rows, strict=True)],
            "source": sources,
            "clip": [row % 20 for row in rows],
            "sha256": [f"{content:064x}" for content in contents[rows.start : rows.stop]],
            "phash": hashes[rows.start : rows.stop],
            **{score: rng.random(len(rows), np.float32) for score in schema.SCORES},
        }
        url = storage.join(dataset, "val" if start == 0 else "train", f"{number:05d}.parquet")
        index.write_index(url, pa.table(made).to_pylist(), schema.INDEX, 0, "")
    named = {name: score(dataset, name, number) for number, name in enumerate(names(columns))}
    digests = {split: compact.open_split(dataset, split)[0].digest for split in schema.SPLITS}
    scores.write_scores(storage.join(dataset, "record"), scores.Scores(dataset, named, None, digests))
    for split, column in ((s, c) for s in schema.SPLITS for c in (None, *named.values()) if folded):
        compact.write(dataset, split, column and column.column)


def names(columns: int) -> list[str]:
    """Of scorers whose column is a label, and of those whose column is a number."""
    return [f"{'label' if number % 2 else 'number'}{number}" for number in range(columns)]


def score(dataset: str, name: str, seed: int) -> scores.Column:
    """A column of which one clip in a hundred has no value."""
    rng, is_label = np.random.default_rng(seed), name.startswith("label")
    field = scores.Field("value", "label" if is_label else "number", "made up", LABELS if is_label else ())
    column = scores.Column(scores.column_name(name, seed), "made-up", {}, "", (field,))
    for split in schema.SPLITS:
        for shard in index.read_shards(dataset, split):
            count = len(shard.table)
            missing = rng.random(count) < 0.01
            drawn = np.array(LABELS)[rng.integers(0, len(LABELS), count)] if is_label else rng.random(count, np.float32)
            values = pa.array(drawn, field.type, mask=missing)
            why = pa.array(np.where(missing, "no_value", None), pa.string())
            arrays = [shard.table["key"], shard.table["sha256"], why, values]
            url = storage.join(dataset, split, f"{shard.name}.{column.column}.parquet")
            index.commit_table(url, pa.table(arrays, schema=scores.table_schema((field,))), column.plain())
    return column


def options(columns: int, radius: int) -> dict[str, Any]:
    """The config of the stage."""
    if not columns:
        bounds = {"motion": {"min": 0.02}, "sharpness": {"min_percentile": 2, "max_percentile": 99}}
        return {"rules": bounds, "near_duplicates": {"radius": radius}}
    numbers = {f"{name}.value": {"min": 0.02, "max_percentile": 98} for name in names(columns)[::2]}
    labels = {f"{name}.value": {"never": ["blue"], "missing": "drop"} for name in names(columns)[1::2]}
    return {"scores": "y", "rules": numbers, "labels": labels}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--radius", type=int, default=4)
    parser.add_argument("--columns", type=int, default=0, help="columns of scores")
    parser.add_argument(
        "--compact", action="store_true", help="after `longtake dataset compact`, as large datasets are"
    )
    figures.add_option(parser, turns=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own, whose memory does not count
        given = (folder, arguments.clips, arguments.columns, arguments.compact)
        maker = multiprocessing.get_context("spawn").Process(target=make, args=given)
        maker.start()
        maker.join()
        config = curate.Config.model_validate(
            {"kind": "curate", "dataset": "x", **options(arguments.columns, arguments.radius)}
        )
        inputs = {"dataset": folder} | ({"scores": storage.join(folder, "record")} if arguments.columns else {})
        walls, cpus = [], []
        # the first of several only warms up
        for turn in range(arguments.turns + (arguments.turns > 1)):
            before = time.perf_counter(), time.process_time()
            result = curate.run(config, inputs, f"bench-{turn}")
            walls.append(time.perf_counter() - before[0])
            cpus.append(time.process_time() - before[1])
        walls, cpus = walls[-arguments.turns :], cpus[-arguments.turns :]
        seconds, busy = statistics.median(walls), statistics.median(cpus)
        size = Path(folder, "views", "bench-0.parquet").stat().st_size
    print(
        f"{arguments.clips} clips, {arguments.columns} columns, radius {arguments.radius}: {seconds:.1f} s,"
        f" {busy:.1f} s of CPU, view of {size >> 20} MiB"
    )
    for reason, count in result["dropped_by_reason"].items():
        print(f"  {count:8d} {reason}")
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
    figures.write(arguments.figures, {"seconds": walls})
    if arguments.columns and seconds > MOST_SECONDS and not arguments.figures:
        sys.exit(f"more than {MOST_SECONDS:g} s")
