"""Datasets of indexes alone, and views of them."""

from collections import Counter
from pathlib import Path
from typing import Any

from longtake.datasets import index, schema, storage, view
from longtake.pipeline.stages import curate


def write_dataset(folder: Path, clips: list[dict[str, Any]], shards: int = 2) -> str:
    """Indexes alone: nothing else is read. A clip is {"key", "split"?, "phash"?, …}; its content is its key by default."""
    for split in schema.SPLITS:
        rows = [
            {"sha256": c["key"], "motion": 0.5, "still": 0.0} | c for c in clips if c.get("split", "train") == split
        ]
        for shard in range(shards):
            url = storage.join(str(folder), split, f"{shard:05d}.parquet")
            index.write_index(url, rows[shard::shards], schema.INDEX, 0, "")
    return str(folder)


def run(
    dataset: str, *, scores: str | None = None, clusters: str | None = None, **options: Any
) -> dict[str, dict[str, Any]]:
    """The view by key, checked for what holds of every view; `scores` and `clusters` are records of such stages."""
    inputs = {name: uri for name, uri in (("scores", scores), ("clusters", clusters)) if uri}
    config = curate.Config.model_validate({"kind": "curate", "dataset": "x", **inputs, **options})
    result = curate.run(config, {"dataset": dataset, **inputs}, "work/some")
    table = view.read_view(result["uri"]).to_pylist()
    kept = [row for row in table if row["keep"]]
    clips = [key for split in schema.SPLITS for key in index.read_all(dataset, split)["key"].to_pylist()]
    assert sorted(row["key"] for row in table) == sorted(clips)
    assert all((row["reason"] is None) == row["keep"] for row in table)
    assert result["dropped_by_reason"] == Counter(row["reason"] for row in table if not row["keep"])
    assert result["metrics"] == {"clips_kept": len(kept), "clips_dropped": len(table) - len(kept)}
    return {row["key"]: row for row in table}


def reasons(table: dict[str, dict[str, Any]]) -> dict[str, str | None]:
    return {key: row["reason"] for key, row in sorted(table.items())}
