"""Seconds and peak memory of planning a synthetic manifest of ten million sources with captions and labels.

    python tests/benchmarks/bench_plan.py [--rows 10000000] [--turns 3] [--figures FILE]

Three runs, each in a process of its own: the first plan, the same again, and with one source in a hundred new.
Figures: `first` and `again` in seconds, `peak` in GB, the most of the three.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import figures
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from longtake.pipeline.plan import plan, sources_of

SCHEMA = pa.schema([(n, pa.string()) for n in ("uri", "etag", "caption", "label")] + [("bytes", pa.int64())])


def write_manifest(path: Path, rows: int) -> None:
    sizes, labels = np.random.default_rng(0).integers((1 << 16, 0), (1 << 28, 400), (1 << 18, 2)).T
    with pq.ParquetWriter(path, SCHEMA) as writer:
        for start in range(0, rows, 1 << 18):
            numbers = pa.array(np.arange(start, min(start + (1 << 18), rows))).cast(pa.string())
            columns = {
                "uri": pc.binary_join_element_wise("s3://bucket/videos/", numbers, ".mp4", ""),
                "etag": numbers,
                "caption": pc.binary_join_element_wise('clip "', numbers, '", a person walks a dog in the park', ""),
                "label": pa.array(labels[: len(numbers)]).cast(pa.string()),
                "bytes": pa.array(sizes[: len(numbers)]),
            }
            writer.write_table(pa.table(columns, schema=SCHEMA))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--turns", type=int, default=1)
    figures.add_option(parser)
    parser.add_argument("--plan", nargs=2, metavar=("DATASET", "MANIFEST"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.plan:
        begin = time.perf_counter()
        groups = plan(arguments.plan[0], [arguments.plan[1]], 0.01, 1 << 36, 1024)
        seconds = time.perf_counter() - begin
        one = time.perf_counter()
        assert len(sources_of(arguments.plan[0], groups[len(groups) // 2]))
        one = time.perf_counter() - one
        # not ru_maxrss, which a child takes over from its parent
        peak = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e6
        sources = sum(group["sources"] for group in groups)
        print(
            f"{sources} sources in {len(groups)} groups: {seconds:.1f} s, peak {peak:.2f} GB; one group in {one:.2f} s",
            file=sys.stderr,
        )
        print(json.dumps([seconds, peak]))
    else:
        values: dict[str, list[float]] = {"first": [], "again": [], "peak": []}
        with tempfile.TemporaryDirectory() as folder:
            write_manifest(Path(folder) / "manifest.parquet", arguments.rows)
            write_manifest(Path(folder) / "longer.parquet", arguments.rows + arguments.rows // 100)
            for turn in range(arguments.turns):
                peaks = []
                for what, manifest in (("first", "manifest"), ("again", "manifest"), ("more", "longer")):
                    print(what, end=": ", flush=True, file=sys.stderr)
                    dataset = f"{folder}/dataset{turn}"
                    command = [sys.executable, __file__, "--plan", dataset, f"{folder}/{manifest}.parquet"]
                    seconds, peak = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
                    peaks.append(peak)
                    if what in values:
                        values[what].append(seconds)
                values["peak"].append(max(peaks))
                shutil.rmtree(f"{folder}/dataset{turn}")
        figures.write(arguments.figures, values)
