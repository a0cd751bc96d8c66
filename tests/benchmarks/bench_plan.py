"""Seconds and peak memory of planning a synthetic manifest of ten million sources.

python tests/benchmarks/bench_plan.py [--rows 10000000]
"""

import argparse
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longtake.pipeline import discover


def write_manifest(path: Path, rows: int) -> None:
    schema = pa.schema([("uri", pa.string()), ("bytes", pa.int64()), ("etag", pa.string())])
    rng = np.random.default_rng(0)
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1 << 18):
            numbers = pa.array(np.arange(start, min(start + (1 << 18), rows))).cast(pa.string())
            uris = pc.binary_join_element_wise("s3://bucket/videos/", numbers, ".mp4", "")
            sizes = pa.array(rng.integers(1 << 16, 1 << 28, len(numbers)))
            writer.write_table(pa.table({"uri": uris, "bytes": sizes, "etag": numbers}, schema=schema))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        manifest = Path(folder) / "manifest.parquet"
        write_manifest(manifest, arguments.rows)
        begin = time.perf_counter()
        groups = discover.plan(f"{folder}/dataset", [str(manifest)], 0.01, 1 << 36, 1024)
        seconds = time.perf_counter() - begin
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        again = time.perf_counter()
        assert discover.plan(f"{folder}/dataset", [str(manifest)], 0.01, 1 << 36, 1024) == groups
        again = time.perf_counter() - again
        one = time.perf_counter()
        assert len(discover.sources_of(f"{folder}/dataset", groups[len(groups) // 2]))
        one = time.perf_counter() - one
        later = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
        print(f"{arguments.rows} sources in {len(groups)} groups: {seconds:.1f} s, peak {peak:.2f} GB")
        print(f"again, nothing new: {again:.1f} s, peak {later:.2f} GB; one group read in {one:.2f} s")
