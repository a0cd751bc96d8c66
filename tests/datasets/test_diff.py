import shutil
from pathlib import Path

import pytest

from longtake.datasets import index, schema, storage
from longtake.datasets.diff import differences
from longtake.datasets.errors import UserError


def test_a_copy_without_its_tars_is_the_same(dataset: str, tmp_path: Path) -> None:
    shutil.copytree(dataset, tmp_path / "b", ignore=shutil.ignore_patterns("*.tar"))
    assert differences(dataset, str(tmp_path / "b")) == {}


def test_every_kind_of_difference_is_named(dataset: str, tmp_path: Path) -> None:
    b = tmp_path / "b"
    shutil.copytree(dataset, b)
    described = index.describe(dataset)
    described["clip"]["fps"] = 25
    storage.write(str(b / "dataset.json"), storage.canonical_json(described))
    for path in [b / "sources" / "val-00000.parquet", *(b / "val").glob("00000*")]:
        path.unlink()
    sources = index.from_parquet(str(b / "sources" / "train-00000.parquet")).to_pylist()
    sources[0].update(status="rejected", reason="damaged")
    storage.write(
        str(b / "sources" / "train-00000.parquet"), index.to_parquet(index.rows_table(sources, schema.SOURCES))
    )
    shard = index.read_shard(dataset, "train", "00000")
    rows = shard.table.to_pylist()
    was = dict(rows[0])
    rows[0]["sha256"] = "0" * 64
    rows[1]["key"] = "elsewhere-00000"
    index.write_index(str(b / "train" / "00000.parquet"), rows, schema.INDEX, shard.tar_bytes, shard.tar_sha256)
    found = differences(dataset, str(b))
    gone = index.read_shard(dataset, "val", "00000").table
    keys = [f"train {shard.table['key'][1]}", *(f"val {key}" for key in gone["key"].to_pylist())]
    shards = sum(len(index.shard_names(dataset, split)) for split in schema.SPLITS)
    assert found["settings"] == ["clip.fps: 12.0 | 25"]
    assert set(found["sources only in A"]) == {f"val {s}" for s in gone["source"].to_pylist()}
    assert "sources only in B" not in found
    assert [line.split(": ")[0] for line in found["sources with another outcome"]] == [f"train {sources[0]['source']}"]
    assert found["clips only in A"] == keys
    assert found["clips only in B"] == ["train elsewhere-00000"]
    assert found["clips of other bytes"] == [f"train {was['key']}: {was['sha256']} | {'0' * 64}"]
    assert f"shards: {shards} | {shards - 1}" in found["counts"]
    mirrored = differences(str(b), dataset)
    assert mirrored["clips only in A"] == found["clips only in B"]


def test_what_is_no_dataset_is_said(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dataset here"):
        differences(dataset, str(tmp_path))
