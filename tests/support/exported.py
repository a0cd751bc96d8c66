"""A small dataset with captions, views of it, and what its exports say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import spoken
from click.testing import CliRunner

from longtake.datasets import index, schema, storage, view
from longtake.datasets.captions import Caption
from longtake.datasets.errors import Failure
from longtake.pipeline import layouts, manifest
from longtake.pipeline.layouts import chosen


def told(dataset: str, folder: Path) -> str:
    """A copy of a dataset with captions of all clips but one."""
    copy = str(shutil.copytree(dataset, folder))
    said = {key: [Caption('<b>a</b> läuft, "fast"\n🐕'), Caption("later", 0.1, 0.2)] for key in spoken.keys(copy)}
    spoken.describe(copy, said | {min(said): None})
    return copy


def rows_of(folder: str) -> dict[str, dict[str, Any]]:
    """The index rows of a dataset by key, with their split."""
    tables = {split: index.read_all(folder, split).to_pylist() for split in schema.SPLITS}
    return {row["key"]: row | {"split": split} for split, rows in tables.items() for row in rows}


def mp4_of(folder: str, row: dict[str, Any]) -> bytes:
    """The bytes of a clip."""
    tar = storage.join(folder, row["split"], f"{row['shard']}.tar")
    return storage.read_range(tar, row["mp4_offset"], row["mp4_size"])


def half(folder: str) -> tuple[str, set[str]]:
    """A view of every second clip, and their keys."""
    url, kept, tables = f"{folder}/views/half.parquet", set[str](), []
    for split in schema.SPLITS:
        keys = index.read_all(folder, split)["key"].to_pylist()
        kept |= set(keys[::2])
        tables.append(view.rows(split, keys, [None if n % 2 == 0 else "odd" for n in range(len(keys))]))
    view.write(url, pa.concat_tables(tables), {})
    return url, kept


def invoke(*arguments: str) -> str:
    """What `longtake dataset` with these arguments says."""
    from longtake.infra.cli import cli

    result = CliRunner().invoke(cli, ["dataset", *arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def read_manifest(path: Path) -> list[dict[str, Any]]:
    """The rows of a manifest, as a `shard` stage reads them."""
    rows = [row for batch in manifest.read(str(path)) for row in batch.to_pylist()]
    return [{"uri": row["uri"], **json.loads(row["extra"] or "{}")} for row in rows]


def stop_at(clip: int, selection: chosen.Chosen, layout: str, folder: str) -> None:
    """An export that fails at a clip."""
    module, calls = layouts.load(layout), 0
    original = module.clips_of

    def failing(*arguments: Any) -> Iterator[Any]:
        nonlocal calls
        for one in original(*arguments):
            calls += 1
            if calls == clip:
                raise Failure("the disk is away")
            yield one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "clips_of", failing)
        with pytest.raises(Failure, match="the disk is away"):
            chosen.write(selection, layout, folder)


def files_of(folder: Path) -> dict[str, bytes]:
    """All files below a folder by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
