"""A small dataset with captions, views of it, and what its exports say."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import spoken
from click.testing import CliRunner

from longtake.datasets import index, schema, storage, view
from longtake.datasets.captions import Caption
from longtake.datasets.errors import Failure
from longtake.pipeline import layouts, manifest
from longtake.pipeline.layouts import chosen

CAMERA = "observation.images.clip"  # of LeRobot


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


def join_videos(folder: Path) -> None:
    """Make the videos of an export to LeRobot one file, as LeRobot itself writes them."""
    paths = sorted((folder / "videos").rglob("*.mp4"))
    starts, packets = [0.0], []
    for path in paths:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            packets.append(
                [(p.pts, p.dts, p.is_keyframe, bytes(p)) for p in container.demux(stream) if p.dts is not None]
            )
            starts.append(starts[-1] + float(stream.duration * stream.time_base))
    with av.open(str(folder / "joined.mp4"), "w") as target, av.open(str(paths[0])) as first:
        stream = target.add_stream_from_template(first.streams.video[0])
        base = first.streams.video[0].time_base
        for start, several in zip(starts, packets, strict=False):
            for pts, dts, key, data in several:
                packet = av.Packet(data)
                packet.stream, packet.time_base, packet.is_keyframe = stream, base, key
                packet.pts, packet.dts = pts + round(start / base), dts + round(start / base)
                target.mux(packet)
    for path in paths:
        path.unlink()
    (folder / "joined.mp4").rename(paths[0])
    for path in sorted((folder / "meta" / "episodes").glob("*/*.parquet")):
        table = pq.read_table(path)
        numbers = table["episode_index"].to_numpy()
        changed = {"file_index": np.zeros(len(table), np.int64), "from_timestamp": np.array(starts)[numbers],
                   "to_timestamp": np.array(starts)[numbers + 1]}  # fmt: skip
        for name, values in changed.items():
            place = table.column_names.index(f"videos/{CAMERA}/{name}")
            table = table.set_column(place, f"videos/{CAMERA}/{name}", pa.array(values))
        # what LeRobot's own have: tasks alone
        pq.write_table(table.drop_columns(["key", "source", "split", "label", "captions"]), path)
