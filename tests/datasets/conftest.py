"""A dataset made by hand, clip by clip, for what footage and the pipeline would take too long to give."""

import functools
import io
import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtake.datasets import clip, index, schema, storage
from longtake.datasets.shard import Member, sha256_of, write_tar

FACTOR = 4
CHANNELS = 3
Clips = Sequence[Sequence[dict[str, Any]]]


@functools.cache
def encoded(number: int, frames: int, size: tuple[int, int], folder: Path) -> bytes:
    """An mp4 of noise that no other number has."""
    path = folder / "clip.mp4"
    noise = np.random.default_rng(number).integers(0, 256, (frames, size[0] // 8, size[1] // 8, 3), np.uint8)
    clip.write(path, noise.repeat(8, 1).repeat(8, 2), 12)
    return path.read_bytes()


def latent_of(number: int, frames: int, size: tuple[int, int]) -> np.ndarray:
    """(steps, 2, C, h, w) float16 whose values tell the clip (64 each) and the step; the variances are negative."""
    steps = 1 + (frames - 1) // FACTOR
    out = np.empty((steps, 2, CHANNELS, size[0] // 8, size[1] // 8), np.float16)
    out[:] = (64 * number + np.arange(steps)).reshape(-1, 1, 1, 1, 1)
    out[:, 1] *= -1
    return out


def make(folder: Path, shards: Clips, split: str = "train", columns: Sequence[str] = ()) -> str:
    """A dataset of shards of clips, numbered through: `frames`, `size`, `source`, `clip`, `start`, `label` of each."""
    root = str(folder)
    (folder / split).mkdir(parents=True, exist_ok=True)
    storage.write(f"{root}/dataset.json", json.dumps({"format": schema.FORMAT_VERSION}).encode())
    number = 0
    for name, clips in enumerate(shards):
        rows = []
        for given in clips:
            row = {"source": f"{split}{number:03d}", "clip": 0, "frames": 12, "size": (16, 16), "start": 0.0} | given
            rows.append(row | {"number": number, "key": f"{row['source']}-{row['clip']:05d}"})
            number += 1
        videos = [encoded(row["number"], row["frames"], row["size"], folder) for row in rows]
        parts = [{"mp4": v, "json": json.dumps({"key": r["key"]}).encode()} for r, v in zip(rows, videos, strict=True)]
        path = folder / split / f"{name:05d}.tar"
        members = write_tar(path, [(r["key"], p) for r, p in zip(rows, parts, strict=True)])
        _commit(path, [_base(r, *members[2 * n : 2 * n + 2]) for n, r in enumerate(rows)], schema.INDEX)
        for column in columns:
            _column(path, column, rows, members[::2])
    return root


def _base(row: dict[str, Any], mp4: Member, data: Member) -> dict[str, Any]:
    return {
        **{name: row[name] for name in ("key", "source", "clip")},
        **{f"mp4_{name}": getattr(mp4, name) for name in ("offset", "size", "crc32")},
        **{f"json_{name}": getattr(data, name) for name in ("offset", "size", "crc32")},
        "sha256": mp4.sha256,
        "start_seconds": row["start"],
        "frame_count": row["frames"],
        "fps": 12.0,
        "height": row["size"][0],
        "width": row["size"][1],
        "label": row.get("label"),
    }


def _column(base: Path, column: str, rows: list[dict[str, Any]], mp4s: Sequence[Member]) -> None:
    latent = column.startswith("latent-")
    arrays, datas = [], []
    for row in rows:
        if latent:
            arrays.append(latent_of(row["number"], row["frames"], row["size"]))
            buffer = io.BytesIO()
            np.save(buffer, arrays[-1])
            datas.append({"npy": buffer.getvalue()})
        else:
            video = clip.decode(encoded(row["number"], row["frames"], row["size"], base.parents[1]))
            datas.append({"npy.zst": clip.pack_array(clip.frame_difference(video, 1))})
    path = base.with_name(f"{base.stem}.{column}.tar")
    members = write_tar(path, [(r["key"], d) for r, d in zip(rows, datas, strict=True)])
    index_rows = []
    for number, (m, mp4) in enumerate(zip(members, mp4s, strict=True)):
        found = {name: getattr(m, name) for name in ("key", "offset", "size", "crc32", "sha256")}
        found["base_sha256"] = mp4.sha256
        if latent:
            steps, _, channels, height, width = arrays[number].shape
            sums = np.array([zlib.crc32(step.tobytes()) for step in arrays[number]], "<u4")
            found |= {"factor": FACTOR, "steps": steps, "channels": channels, "height": height, "width": width}
            found["step_crc32"] = sums.tobytes()
        index_rows.append(found)
    _commit(path, index_rows, schema.LATENT_INDEX if latent else schema.COLUMN_INDEX)


def _commit(tar: Path, rows: list[dict[str, Any]], table_schema: Any) -> None:
    index.write_index(str(tar.with_suffix(".parquet")), rows, table_schema, tar.stat().st_size, sha256_of(tar))


@pytest.fixture(scope="session")
def handmade() -> Callable[..., str]:
    """`make`: a dataset of given clips in a folder."""
    return make


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Five shards of four clips of 12 frames, 16 x 16, labels and both columns: read it, do not change it."""
    shards = [[{"label": "ab"[n % 2]} for n in range(4)] for _ in range(5)]
    return make(tmp_path_factory.mktemp("small"), shards, columns=("frame_diff", "latent-test"))
