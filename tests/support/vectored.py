"""Datasets of clips that have vectors and no videos."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scored

from longtake.datasets import index, schema, storage
from longtake.pipeline.column import Job
from longtake.pipeline.stages import cluster


def make(root: Path, vectors: np.ndarray, shard: int = 40, held_out: int = 0) -> str:
    """A dataset whose clips have these vectors (N, D) as `clip.vector`; the last `held_out` clips are the val split.

    A vector with NaN counts as none.
    """
    url = str(root)
    storage.write(storage.join(url, "dataset.json"), b'{"format": 2}')
    ends = {"train": len(vectors) - held_out, "val": len(vectors)}
    for split, start in (("train", 0), ("val", ends["train"])):
        for number, first in enumerate(range(start, ends[split], shard)):
            rows = [
                {
                    "key": f"{row:020d}-00000",
                    "sha256": f"{row:064x}",
                    "source": f"{row:020d}",
                    "frame_count": 8,
                    "fps": 8.0,
                }
                for row in range(first, min(first + shard, ends[split]))
            ]
            index.write_index(storage.join(url, split, f"{number:05d}.parquet"), rows, schema.INDEX, 0, "")
    if len(vectors):
        scored.write_record(f"{root}-scores", url, scored.write_columns(url, {"clip": {"vector": vectors}}))
    return url


def run(url: str, output: str, **settings: Any) -> dict[str, Any]:
    """Run a `cluster` stage on such a dataset."""
    known = {"kind": "cluster", "dataset": url, "scores": f"{url}-scores", "embedding": "clip.vector"}
    config = cluster.Config.model_validate(known | settings)
    inputs = {"dataset": url, "scores": f"{url}-scores"} | ({"view": config.view} if config.view else {})
    return cluster.run(config, inputs, output)


def make_here(
    stage: str, jobs: Sequence[Job], task: Any, load: Any, models: Sequence[Any], arguments: Mapping[str, Any]
) -> Counter[str]:
    """In place of `columns.make`: the jobs in this process, the last one first."""
    totals = Counter[str]()
    at_work = load("cpu", *models, **arguments)
    for job in reversed(jobs):
        keep = np.unpackbits(np.frombuffer(job.keep, np.uint8), count=job.clips).astype(bool)
        totals.update(at_work(split=job.split, name=job.name, keep=keep, report=lambda clips, position: None))
    return totals


def crowded(count: int, width: int, groups: int = 20, seed: int = 0) -> np.ndarray:
    """(N, D) unit vectors around some centres, of which one in five is near to the one before it."""
    rng = np.random.default_rng(seed)
    centres = rng.standard_normal((groups, width))
    vectors = centres[rng.integers(0, groups, count)] + rng.standard_normal((count, width))
    near = np.flatnonzero(rng.random(count - 1) < 0.2) + 1
    vectors[near] = vectors[near - 1] + rng.standard_normal((len(near), width)) * rng.uniform(0.05, 0.3, (len(near), 1))
    return np.asarray(vectors / np.linalg.norm(vectors, axis=1, keepdims=True), np.float32)


def true_pairs(vectors: np.ndarray, similarity: float) -> set[tuple[int, int]]:
    """All pairs of rows of at least a cosine, as float16 has the vectors."""
    unit = vectors.astype(np.float16).astype(np.float64)
    unit /= np.linalg.norm(unit, axis=1, keepdims=True)
    one, other = np.nonzero(np.triu(unit @ unit.T >= similarity, 1))
    return set(zip(one.tolist(), other.tolist(), strict=True))
