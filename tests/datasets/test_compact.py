import dataclasses
import os
import shutil
from pathlib import Path

import pytest

from longtake.datasets import compact, index, schema, storage
from longtake.datasets.errors import Failure


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> Path:
    """A dataset of five base shards in train: parts of the first one's rows."""
    root = Path(shutil.copytree(dataset, tmp_path / "dataset"))
    whole = index.read_shard(dataset, "train", "00000")
    for number in range(1, 5):
        part = dataclasses.replace(whole, tar_bytes=number, table=whole.table.slice(number % len(whole.table)))
        commit(root, f"{number:05d}", part)
    return root


def commit(root: Path, name: str, shard: index.Shard) -> None:
    url = str(root / "train" / f"{name}.parquet")
    index.write_index(url, shard.table.to_pylist(), schema.INDEX, shard.tar_bytes, shard.tar_sha256)


def opens_as_it_is(root: Path) -> None:
    for split in schema.SPLITS:
        table, shards = compact.open_split(str(root), split)
        truth = index.read_shards(str(root), split)
        assert table.equals(index.read_all(str(root), split), check_metadata=True)
        assert index.digest(shards) == index.digest(truth)
        assert [s.table for s in shards] == [s.table for s in truth]


def test_without_with_and_beyond_a_compact_file(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opens_as_it_is(copy)
    last = index.read_shard(str(copy), "train", "00004")
    second = index.read_shard(str(copy), "train", "00002")
    for name in ("00002", "00004"):
        (copy / "train" / f"{name}.parquet").unlink()
    assert compact.write(str(copy), "train") == 3
    opens_as_it_is(copy)
    commit(copy, "00004", last)
    opens_as_it_is(copy)
    commit(copy, "00002", second)
    opens_as_it_is(copy)
    assert capsys.readouterr().err == ""


def test_a_covered_shard_is_not_read_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    truth = index.read_all(str(copy), "train")
    compact.write(str(copy), "train")
    read = []
    original = storage.read
    monkeypatch.setattr(storage, "read", lambda url: (read.append(url), original(url))[1])
    assert compact.open_split(str(copy), "train")[0].equals(truth)
    assert sorted(Path(url).name for url in read) == ["train.parquet", "train.shards.parquet"]


@pytest.mark.parametrize("gone", ["00000", "00001", "00004"])
def test_a_deleted_index_is_a_shard_no_more(copy: Path, gone: str, capsys: pytest.CaptureFixture[str]) -> None:
    compact.write(str(copy), "train")
    (copy / "train" / f"{gone}.parquet").unlink()
    opens_as_it_is(copy)
    (line,) = capsys.readouterr().err.splitlines()
    assert "1 train indexes are not those" in line and "run `longtake dataset compact" in line


def test_a_replaced_index_counts_even_at_the_same_size(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact.write(str(copy), "train")
    shard = index.read_shard(str(copy), "train", "00001")
    rows = shard.table.to_pylist()
    rows[0]["sha256"] = rows[0]["sha256"][::-1]
    index.write_index(
        str(copy / "train" / "00001.parquet"), rows, schema.INDEX, shard.tar_bytes, shard.tar_sha256[::-1]
    )
    opens_as_it_is(copy)
    assert "run `longtake dataset compact" in capsys.readouterr().err


@pytest.mark.parametrize("file", ["train.parquet", "train.shards.parquet"])
@pytest.mark.parametrize("damage", ["zero", "cut", "remove", "other"])
def test_a_damaged_compact_file_is_not_used(
    copy: Path, file: str, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in schema.SPLITS:
        compact.write(str(copy), split)
    path = copy / "compact" / file
    data = path.read_bytes()
    third = len(data) // 3
    path.unlink()
    if damage != "remove":
        zeroed = data[:third] + bytes(third) + data[2 * third :]
        other = path.with_name(file.replace("train", "val")).read_bytes()
        path.write_bytes({"zero": zeroed, "cut": data[:-9], "other": other}[damage])
    opens_as_it_is(copy)
    # without its commit record a compact file does not exist
    expected = 0 if damage == "remove" and "shards" in file else 1
    assert len(capsys.readouterr().err.splitlines()) == len(list(compact.problems(str(copy), "train"))) == expected


def test_a_touched_index_is_read_itself(copy: Path) -> None:
    compact.write(str(copy), "train")
    os.utime(copy / "train" / "00000.parquet", (1, 1))
    opens_as_it_is(copy)


def test_a_damaged_index_is_not_folded_in(copy: Path) -> None:
    (copy / "train" / "00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(Failure, match=r"00001\.parquet: not a readable"):
        compact.write(str(copy), "train")
    assert not (copy / "compact").exists()
