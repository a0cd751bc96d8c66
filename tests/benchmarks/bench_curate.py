"""Seconds and memory of curating a synthetic dataset of a million clips: thresholds, exact and near duplicates.

    python tests/benchmarks/bench_curate.py [--clips 1000000] [--radius 4]

One clip in ten has the content of another, one in ten a hash some bits away, one in fifty is black. Making the
indexes is not counted, reading them and writing the view is.
"""

import argparse
import hashlib
import multiprocessing
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa

from longtake.datasets import index, schema, storage
from longtake.pipeline.stages import curate

SHARD = 50_000


def make(dataset: str, count: int) -> None:
    """Index files without tars: curation reads nothing else."""
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


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=1_000_000)
    parser.add_argument("--radius", type=int, default=4)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        # in a process of its own, whose memory does not count
        maker = multiprocessing.get_context("spawn").Process(target=make, args=(folder, arguments.clips))
        maker.start()
        maker.join()
        config = curate.Config.model_validate(
            {
                "kind": "curate",
                "dataset": "x",
                "rules": {"motion": {"min": 0.02}, "sharpness": {"min_percentile": 2, "max_percentile": 99}},
                "near_duplicates": {"radius": arguments.radius},
            }
        )
        before = time.perf_counter()
        result = curate.run(config, {"dataset": folder}, "bench")
        seconds = time.perf_counter() - before
        size = Path(folder, "views", "bench.parquet").stat().st_size
    print(f"{arguments.clips} clips, radius {arguments.radius}: {seconds:.1f} s, view of {size >> 20} MiB")
    for reason, count in result["dropped_by_reason"].items():
        print(f"  {count:8d} {reason}")
    print(f"peak RSS {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10} MiB")
