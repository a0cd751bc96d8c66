"""Clusters, semantic duplicates and search over millions of synthetic vectors: seconds, memory, recall against brute force.

    python tests/benchmarks/bench_search.py [--clips 200000] [--width 512] [--folder FOLDER] [--beside]

The vectors are like those of an image encoder: topics within topics, most of the variance in 64 directions, the rest even.
One clip in twenty is near to another, in another shard, by a cosine of 0.9 to 1; one in two hundred is one of three pictures
that are all the same. The `cluster` stage runs on Ray as in a recipe. In a folder that is named everything is kept: another
call with the same arguments continues where the last one stopped, or died. Of ten million clips of 512 numbers that is 22 GB.

`--beside` compares with the indexes of faiss and Lance, which hold all vectors in memory or make a copy of their own.
"""

import argparse
import json
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa

from longtake.datasets import alike, clusters, compact, index, schema, scores, storage
from longtake.pipeline import dedup
from longtake.pipeline.cluster import connected
from longtake.pipeline.stages import cluster

SHARD = 25_000
DIRECTIONS = 64
TOPICS, SUBTOPICS = 200, 100


def about(width: int) -> scores.Column:
    field = scores.Field("vector", "vector", "made up", width=width)
    return scores.Column(scores.column_name("clip", ["synthetic", width]), "synthetic", {}, "", (field,))


def space(width: int) -> tuple[np.ndarray, np.ndarray]:
    """The centres (K, 64) of the mixture, and the directions (64, D)."""
    rng = np.random.default_rng(0)
    topics = rng.standard_normal((TOPICS, 1, DIRECTIONS), np.float32)
    centres = topics + 0.7 * rng.standard_normal((TOPICS, SUBTOPICS, DIRECTIONS), np.float32)
    fading = np.geomspace(1, 0.2, DIRECTIONS, dtype=np.float32)
    return centres.reshape(-1, DIRECTIONS) * fading, np.linalg.qr(rng.standard_normal((width, DIRECTIONS)))[0].T.astype(
        "f"
    )


def drawn(rng: np.random.Generator, count: int, width: int) -> np.ndarray:
    """Unit vectors (N, D) of clips that have nothing to do with each other."""
    centres, directions = space(width)
    inner = centres[rng.integers(0, len(centres), count)]
    inner = inner + 0.6 * np.geomspace(1, 0.2, DIRECTIONS, dtype=np.float32) * rng.standard_normal(
        (count, DIRECTIONS), np.float32
    )
    vectors = inner @ directions
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors += 0.4 / width**0.5 * rng.standard_normal((count, width), np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def near_rows(number: int, count: int) -> np.ndarray:
    """Those of a shard's rows that are near to others."""
    return np.flatnonzero(np.random.default_rng([5, number]).random(count) < 0.05)


def make_shard(folder: str, number: int, clips: int, width: int) -> None:
    """A shard's index and vectors."""
    split, name = ("val" if number == 0 else "train"), f"{number:05d}"
    column = about(width)
    url = storage.join(folder, split, f"{name}.{column.column}.parquet")
    if storage.exists(url):
        return
    start = number * SHARD
    count = min(SHARD, clips - start)
    rng = np.random.default_rng([1, number])
    vectors = drawn(rng, count, width)

    # near to others, and equal to others
    near = near_rows(number, count)
    anchors = rng.integers(0, max(1, clips // 40), len(near))
    for row, anchor in zip(near, anchors, strict=True):
        vectors[row] = drawn_anchor(int(anchor), width)
    vectors[near] += (
        rng.uniform(0, 0.35, (len(near), 1)).astype("f")
        * rng.standard_normal((len(near), width), np.float32)
        / width**0.5
    )
    same = np.flatnonzero(rng.random(count) < 0.005)
    vectors[same] = drawn(np.random.default_rng(2), 3, width)[rng.integers(0, 3, len(same))]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)

    keys = [f"{row:020d}-00000" for row in range(start, start + count)]
    shas = [f"{row:064x}" for row in range(start, start + count)]
    base = {"key": keys, "sha256": shas, "source": [key[:20] for key in keys]}
    facts = {
        "frame_count": np.full(count, 48),
        "fps": np.full(count, 24.0),
        "height": np.full(count, 64),
        "width": np.full(count, 64),
    }
    table = pa.table({field.name: pa.array((base | facts)[field.name], field.type) if field.name in base | facts
                      else pa.nulls(count, field.type) for field in schema.INDEX})  # fmt: skip
    index.commit_table(storage.join(folder, split, f"{name}.parquet"), table)
    lists = pa.ListArray.from_arrays(
        pa.array(np.arange(count + 1) * width, pa.int32()), pa.array(vectors.astype("e").ravel())
    )
    arrays = [pa.array(keys), pa.array(shas), pa.nulls(count, pa.string()), lists]
    index.commit_table(url, pa.table(arrays, scores.table_schema(column.fields)), column.plain())


_ANCHORS: dict[int, np.ndarray] = {}


def drawn_anchor(number: int, width: int) -> np.ndarray:
    """The vector that some clips are near to; drawn a thousand at once."""
    block = number // 1000
    if block not in _ANCHORS:
        if len(_ANCHORS) > 400:
            _ANCHORS.clear()
        _ANCHORS[block] = drawn(np.random.default_rng([3, block]), 1000, width).astype("e")
    return _ANCHORS[block][number % 1000].astype("f")


def make(folder: str, clips: int, width: int, processes: int) -> None:
    """The dataset, and the record of its scores."""
    storage.write(storage.join(folder, "dataset.json"), b'{"format": 2}')
    numbers = range(-(-clips // SHARD))
    with ProcessPoolExecutor(processes, get_context("spawn")) as pool:
        for job in [pool.submit(make_shard, folder, number, clips, width) for number in numbers]:
            job.result()
    for split in schema.SPLITS:
        compact.write(folder, split)
    digests = {split: compact.open_split(folder, split)[0].digest for split in schema.SPLITS}
    scores.write_scores(f"{folder}-scores", scores.Scores(folder, {"clip": about(width)}, None, digests))


class Memory(threading.Thread):
    """The most memory that this process and Ray's workers have had at once, and that of one of them."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.total = self.one = 0
        self.stopped = threading.Event()

    def run(self) -> None:
        while not self.stopped.wait(0.5):
            sizes = []
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    name = " ".join(process.cmdline())
                    if process.pid == psutil.Process().pid or "ray::" in name:
                        sizes.append(process.memory_full_info().uss)
                except psutil.Error:
                    continue
            self.total, self.one = max(self.total, sum(sizes)), max(self.one, max(sizes, default=0))


@contextmanager
def timed(label: str) -> Iterator[None]:
    """Print the seconds of the block, and its memory."""
    memory = Memory()
    memory.start()
    start = time.perf_counter()
    yield
    seconds = time.perf_counter() - start
    memory.stopped.set()
    memory.join()
    print(
        f"{label}: {seconds:.1f} s, {memory.total / 2**30:.2f} GiB in all, {memory.one / 2**30:.2f} GiB in one process",
        flush=True,
    )


def truth(
    folder: str, column: str, rows: np.ndarray, least: float, width: int
) -> tuple[list[tuple[int, int]], np.ndarray]:
    """The vectors of some clips, and by brute force their pairs of at least a cosine and the 10 greatest cosines of each."""
    asked = np.zeros((len(rows), width), np.float32)
    for part in alike.vectors(folder, column, "vector"):
        mine = np.flatnonzero((rows >= part.row) & (rows < part.row + len(part.has)))
        asked[mine] = part.unit[rows[mine] - part.row]
    pairs: list[tuple[int, int]] = []
    best = np.full((len(rows), 10), -2, np.float32)
    for part in alike.vectors(folder, column, "vector"):
        cosines = asked @ part.unit.T
        for one, other in zip(*np.nonzero(cosines >= least), strict=True):
            if rows[one] != part.row + other:
                pairs.append((int(min(rows[one], part.row + other)), int(max(rows[one], part.row + other))))
        best = -np.partition(-np.append(best, cosines, 1), 10)[:, :10]
    best = -np.sort(-best)
    return asked, pairs, best


def recall(found: np.ndarray, best: np.ndarray) -> float:
    """Share of the ten nearest whose cosine was reached; of equal ones any will do."""
    return float(
        np.mean(
            [(cosines >= nearest[-1] - 2e-4).sum() / len(nearest) for cosines, nearest in zip(found, best, strict=True)]
        )
    )


def measure(folder: str, clips: int, width: int, sample: int, similarity: float, settings: dict[str, Any]) -> None:
    known = {"kind": "cluster", "dataset": folder, "scores": f"{folder}-scores", "embedding": "clip.vector"}
    config = cluster.Config.model_validate(known | settings)
    inputs = {"dataset": folder, "scores": f"{folder}-scores"}
    output = f"{folder}-clusters"
    with connected("bench"), timed(f"cluster {clips} x {width}"):
        metrics = cluster.run(config, inputs, output)["metrics"]
    print("  " + ", ".join(f"{name} {value:.0f}" for name, value in metrics.items()), flush=True)
    made, column = clusters.read_clusters(output), about(width).column

    with timed("drop semantic duplicates"):
        drop = dedup.semantic(clusters.pair_tables(made, 0.95), np.arange(clips), 0.95)
    print(f"  {drop.sum()} clips dropped", flush=True)

    # half of those that are asked for are near to others, whether the clusters know it or not
    rng = np.random.default_rng(4)
    # the first shard is the val split, whose rows come last
    counts = [min(SHARD, clips - n * SHARD) for n in range(-(-clips // SHARD))]
    firsts = [(n - 1) * SHARD if n else clips - counts[0] for n in range(len(counts))]
    near = np.concatenate([firsts[n] + near_rows(n, count) for n, count in enumerate(counts)])
    rows = np.unique(np.append(rng.choice(clips, sample), rng.choice(near, min(sample, len(near)))))
    with timed(f"brute force of {len(rows)} clips"):
        vectors, true, best = truth(folder, column, rows, similarity, width)
    every = clusters.pairs(made)
    stands = np.arange(clips)
    crowd = every.filter(every["crowd"])
    stands[crowd["second"].to_numpy()] = crowd["first"].to_numpy()
    plain = every.filter(pa.compute.invert(every["crowd"]))
    has = set(zip(plain["first"].to_pylist(), plain["second"].to_pylist(), strict=True))
    pairs = {(min(a, b), max(a, b)) for one, other in true if (a := int(stands[one])) != (b := int(stands[other]))}
    print(
        f"pairs of at least {similarity}: {len(pairs)} by brute force, recall {len(pairs & has) / max(1, len(pairs)):.4f}",
        flush=True,
    )

    chosen = rng.choice(len(rows), min(sample, len(rows)), replace=False)
    vectors, best = vectors[chosen], best[chosen]
    for probes in (1, 2, 4, 8, 16, 32, 64):
        start = time.perf_counter()
        found = [alike.approximate(made, vector, 10, probes).cosines for vector in vectors]
        milliseconds = (time.perf_counter() - start) / len(vectors) * 1000
        print(
            f"10 nearest by {probes} probes: recall {recall(found, best):.4f}, {milliseconds:.1f} ms",
            flush=True,
        )
    start = time.perf_counter()
    alike.exact(folder, column, "vector", vectors[0], 10)
    print(f"10 nearest exactly: {time.perf_counter() - start:.2f} s", flush=True)


def beside(folder: str, clips: int, width: int, sample: int, scratch: Path) -> None:
    """The indexes of others: seconds to build, milliseconds a query, recall of the 10 nearest, memory or bytes."""
    import faiss

    column = about(width).column
    unit = np.concatenate([part.unit for part in alike.vectors(folder, column, "vector")])
    asked = unit[np.random.default_rng(4).choice(clips, sample, replace=False)]
    flat = faiss.IndexFlatIP(width)
    flat.add(unit)
    best = flat.search(asked, 10)[0]

    def report(
        name: str, build: Callable[[], Any], search: Callable[[Any, np.ndarray, int], np.ndarray], efforts: list[int]
    ) -> None:
        before, start = psutil.Process().memory_info().rss, time.perf_counter()
        made = build()
        seconds, grown = time.perf_counter() - start, (psutil.Process().memory_info().rss - before) / 2**20
        for effort in efforts:
            start = time.perf_counter()
            found = [search(made, one, effort) for one in asked]
            each = (time.perf_counter() - start) / len(asked) * 1000
            print(
                f"{name}, effort {effort}: built in {seconds:.1f} s, {grown:.0f} MiB, {each:.2f} ms, recall {recall(found, best):.4f}",
                flush=True,
            )

    lists = round(clips**0.5)

    def ivf() -> Any:
        made = faiss.IndexIVFFlat(faiss.IndexFlatIP(width), width, lists, faiss.METRIC_INNER_PRODUCT)
        made.train(unit[:: max(1, clips // (64 * lists))])
        made.add(unit)
        return made

    def probing(made: Any, one: np.ndarray, effort: int) -> np.ndarray:
        made.nprobe = effort
        return np.asarray(made.search(one[None], 10)[0][0])

    def hnsw() -> Any:
        made = faiss.IndexHNSWFlat(width, 32, faiss.METRIC_INNER_PRODUCT)
        made.hnsw.efConstruction = 100
        made.add(unit)
        return made

    def wandering(made: Any, one: np.ndarray, effort: int) -> np.ndarray:
        made.hnsw.efSearch = effort
        return np.asarray(made.search(one[None], 10)[0][0])

    def lance() -> Any:
        import lance as lancedb

        path = scratch / "lance"
        shutil.rmtree(path, ignore_errors=True)
        values = pa.FixedSizeListArray.from_arrays(pa.array(unit.ravel()), width)
        made = lancedb.write_dataset(pa.table({"row": np.arange(clips), "vector": values}), str(path))
        return made.create_index("vector", "IVF_FLAT", metric="dot", num_partitions=lists) or lancedb.dataset(str(path))

    def asking(made: Any, one: np.ndarray, effort: int) -> np.ndarray:
        nearest = {"column": "vector", "q": one, "k": 10, "nprobes": effort, "metric": "dot"}
        rows = made.to_table(columns=["row"], nearest=nearest)["row"].to_numpy()
        return unit[rows] @ one

    report("faiss IVF", ivf, probing, [1, 4, 8, 16, 32])
    report("faiss HNSW", hnsw, wandering, [16, 64, 256])
    report("Lance IVF", lance, asking, [1, 4, 8, 16, 32])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=200_000)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--sample", type=int, default=200, help="clips that are asked for, and compared by brute force")
    parser.add_argument("--similarity", type=float, default=0.9)
    parser.add_argument(
        "--settings", type=json.loads, default={}, help="of the stage, as JSON, such as '{\"border\": 0.05}'"
    )
    parser.add_argument("--processes", type=int, default=2, help="that make the vectors")
    parser.add_argument("--folder", help="to keep everything in, and to continue from")
    parser.add_argument("--beside", action="store_true", help="compare with faiss and Lance")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(arguments.folder or scratch, f"{arguments.clips}x{arguments.width}")
        dataset = str(root.absolute())
        with timed("make the vectors"):
            make(dataset, arguments.clips, arguments.width, arguments.processes)
        settings = {"similarity": arguments.similarity} | arguments.settings
        measure(dataset, arguments.clips, arguments.width, arguments.sample, arguments.similarity, settings)
        if arguments.beside:
            beside(dataset, arguments.clips, arguments.width, arguments.sample, Path(scratch))
