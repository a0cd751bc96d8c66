"""Datasets of video files, made in this process."""

from __future__ import annotations

from pathlib import Path

from longtake.datasets import schema, storage
from longtake.pipeline import plan
from longtake.pipeline.commit import make_group
from longtake.pipeline.stages import shard


def make_dataset(folder: Path, paths: list[Path], val_fraction: float = 0.3, group_sources: int = 2) -> str:
    """A dataset made without Ray, group by group."""
    config = shard.Config(kind="shard", sources=[str(paths[0])], clip={"short_side": 32, "fps": 12, "max_seconds": 3})
    described = {"format": schema.FORMAT_VERSION, **config.model_dump(mode="json", include={"clip", "frame_diff"})}
    storage.write(str(folder / "dataset.json"), storage.canonical_json(described))
    for group in plan.plan(str(folder), [str(p) for p in paths], val_fraction, 1 << 40, group_sources):
        assert not make_group(group, plan.sources_of(str(folder), group), str(folder), config.cut)["error"]
    return str(folder)
