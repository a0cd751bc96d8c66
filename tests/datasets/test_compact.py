import json
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from longtake.datasets import compact, index, later, schema, storage
from longtake.datasets.errors import Failure
from longtake.datasets.loader import Loader

COLUMNS = (None, "frame_diff", "latent-test")
OPTIONS: dict[str, Any] = {
    "columns": ("label", "frame_diff", "latent-test"),
    "frames": 5,
    "size": (16, 16),
    "batch": 4,
    "epochs": 1,
}


@pytest.fixture
def copy(small: str, tmp_path: Path) -> Path:
    """Five shards of four clips with two columns."""
    return Path(shutil.copytree(small, tmp_path / "dataset"))


def truth(root: Path, column: str | None = None) -> list[index.Shard]:
    return index.read_shards(str(root), "train", column)


def opens_as_it_is(root: Path) -> None:
    """All rows, facts and digests are those of the indexes, and no part of them comes from elsewhere."""
    for column in COLUMNS:
        rows, facts = compact.open_split(str(root), "train", column)
        shards = truth(root, column)
        assert [rows.name(n) for n in range(len(rows.shards))] == [s.name for s in shards]
        assert [rows.of(n) for n in range(len(shards))] == [s.table.replace_schema_metadata(None) for s in shards]
        assert [rows.tar(n)[1:] for n in range(len(shards))] == [(s.tar_bytes, s.tar_sha256) for s in shards]
        names = [name for name in compact.FACTS if name in shards[0].table.column_names]
        whole = pa.concat_tables([s.table.replace_schema_metadata(None) for s in shards])
        assert facts.to_pydict() == whole.select(names).to_pydict()
    assert compact.table(str(root), "train").equals(index.read_all(str(root), "train"))


def stream(root: Path) -> list[Any]:
    columns = ("label", "frame_diff", "latent")
    return [[b["key"], *(b[name].numpy().tobytes() for name in columns)] for b in Loader(str(root), **OPTIONS)]


def write_all(root: Path) -> list[int]:
    return [compact.write(str(root), "train", column) for column in COLUMNS]


def parts(root: Path, number: int) -> list[Path]:
    return sorted((root / "train").glob(f"{number:05d}.*"))


def test_without_with_and_beyond_compact_files(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    opens_as_it_is(copy)
    digest, batches = compact.open_split(str(copy), "train")[0].digest, stream(copy)
    held = {path: path.read_bytes() for n in (2, 4) for path in parts(copy, n)}
    for path in held:
        path.unlink()
    assert write_all(copy) == [3, 3, 3]
    opens_as_it_is(copy)
    assert capsys.readouterr().err == ""
    assert compact.open_split(str(copy), "train")[0].digest != digest
    for path, data in held.items():
        path.write_bytes(data)
    opens_as_it_is(copy)
    assert stream(copy) == batches
    assert "the train indexes are not those that were folded in" in capsys.readouterr().err
    assert write_all(copy) == [5, 5, 5]
    opens_as_it_is(copy)
    assert stream(copy) == batches and compact.open_split(str(copy), "train")[0].digest == digest
    assert capsys.readouterr().err == ""


def reads(monkeypatch: pytest.MonkeyPatch, name: str) -> list[str]:
    """The files, or folders, that `storage.NAME` is asked for from now on."""
    asked: list[str] = []
    original = getattr(storage, name)
    monkeypatch.setattr(storage, name, lambda url: (asked.append("/".join(url.split("/")[-2:])), original(url))[1])
    return asked


def test_a_covered_shard_is_not_read_again(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_all(copy)
    read = reads(monkeypatch, "read")
    Loader(str(copy), **OPTIONS | {"columns": ("video", "frame_diff", "latent-test")})
    assert not [url for url in read if url.startswith("train/")]
    assert "compact/train.frame_diff.facts.parquet" in read


def plan(root: Path, name: str, groups: list[int]) -> None:
    rows = [{"source": f"{n}", "uri": f"{n}", "bytes": 1, "split": "train", "group": n} for n in groups]
    storage.write(f"{root}/plan/{name}.parquet", index.to_parquet(pa.Table.from_pylist(rows, schema=schema.PLAN)))


def test_no_folder_is_listed_where_all_that_was_planned_is_there(
    copy: Path, handmade: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan(copy, "0", [0, 1, 2, 3, 4])
    compact.write(str(copy), "train")
    listed = reads(monkeypatch, "names")
    opened = compact.open_split(str(copy), "train")[0]
    assert len(opened.shards) == 5 and [url.split("/")[-1] for url in listed] == ["plan", "annotations"]
    # a later plan may have made shards: look
    plan(copy, "1", [5])
    listed.clear()
    compact.open_split(str(copy), "train")
    assert sorted(url.split("/")[-1] for url in listed) == ["annotations", "plan", "train"]
    # and not all that was planned was there
    compact.write(str(copy), "train")
    listed.clear()
    opens_as_it_is(copy)
    assert "train" in {url.split("/")[-1] for url in listed}


def test_new_shards_are_seen_without_a_plan_too(copy: Path, handmade: Callable[..., str]) -> None:
    held = {path: path.read_bytes() for path in parts(copy, 4)}
    for path in held:
        path.unlink()
    write_all(copy)
    assert Loader(str(copy), **OPTIONS).samples == 16
    for path, data in held.items():
        path.write_bytes(data)
    assert Loader(str(copy), **OPTIONS).samples == 20


@pytest.mark.parametrize("gone", ["00000", "00004"])
def test_a_deleted_index_is_a_shard_no_more(copy: Path, gone: str, capsys: pytest.CaptureFixture[str]) -> None:
    plan(copy, "0", [0, 1, 2, 3, 4, 5])
    compact.write(str(copy), "train")
    (copy / "train" / f"{gone}.parquet").unlink()
    rows, facts = compact.open_split(str(copy), "train")
    assert gone not in rows.shards["name"].to_pylist() and len(rows.shards) == 4 and len(facts) == 16
    (line,) = capsys.readouterr().err.splitlines()
    assert "the train indexes are not those" in line and "run `longtake dataset compact" in line
    assert Loader(str(copy), **OPTIONS).samples == 16


def test_a_replaced_index_is_found_by_verify(copy: Path) -> None:
    compact.write(str(copy), "train")
    shard = index.read_shard(str(copy), "train", "00001")
    rows = [row | {"label": "other"} for row in shard.table.to_pylist()]
    url = str(copy / "train" / "00001.parquet")
    index.write_index(url, rows, schema.INDEX, shard.tar_bytes, shard.tar_sha256)
    (line,) = compact.problems(str(copy), "train")
    assert "00001 is not as its index" in line


@pytest.mark.parametrize("file", ["train.facts.parquet", "train.shards.parquet", "train.arrow"])
@pytest.mark.parametrize("damage", ["zero", "cut", "remove", "other"])
def test_a_damaged_compact_file_is_never_other_rows(
    copy: Path, file: str, damage: str, handmade: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    handmade(copy, [[{}]], split="val")
    batches = stream(copy)
    for split in schema.SPLITS:
        compact.write(str(copy), split)
    path = copy / "compact" / file
    data = path.read_bytes()
    third = len(data) // 3
    other = path.with_name(file.replace("train", "val")).read_bytes()
    path.unlink()
    if damage != "remove":
        zeroed = data[:third] + bytes(third) + data[2 * third :]
        path.write_bytes({"zero": zeroed, "cut": data[:-9], "other": other}[damage])
    if file == "train.arrow" and damage == "zero":
        # of the same size: seen when the rows are used
        with pytest.raises(
            Failure, match=r"compact: damaged, other rows than .*parquet has; run `longtake dataset com"
        ):
            stream(copy)
        assert list(compact.problems(str(copy), "train"))
        return
    assert stream(copy) == batches
    # without its commit record a compact file does not exist
    expected = 0 if damage == "remove" and "shards" in file else 1
    lines = [line for line in capsys.readouterr().err.splitlines() if "(val)" not in line]
    assert all(line.startswith("warning: ") and line.count("dataset compact") == 1 for line in lines)
    assert len(lines) == expected
    assert len(list(compact.problems(str(copy), "train"))) == expected


@pytest.mark.parametrize("column", COLUMNS)
def test_no_flipped_byte_gives_other_batches(copy: Path, column: str | None) -> None:
    batches = stream(copy)
    write_all(copy)
    path = copy / "compact" / ("train.arrow" if column is None else f"train.{column}.arrow")
    data = path.read_bytes()
    failed = 0
    for part in range(24):
        damaged = bytearray(data)
        damaged[part * (len(data) - 1) // 23] ^= 0x41
        path.write_bytes(damaged)
        try:
            assert stream(copy) == batches
        except Failure as e:
            assert "compact" in str(e) and "\n" not in str(e)
            failed += 1
    assert failed > 3


def test_rows_travel_by_the_path_of_their_file(copy: Path) -> None:
    write_all(copy)
    rows = compact.open_split(str(copy), "train")[0]
    rows.of(1)
    data = pickle.dumps(rows)
    again = pickle.loads(data)
    assert again.of(1) == rows.of(1) and again.digest == rows.digest
    # as many clips more are not to make the pickle larger
    shutil.rmtree(copy / "compact")
    assert len(data) < len(pickle.dumps(compact.open_split(str(copy), "train")[0])) - rows.of(1).nbytes
    with pytest.raises(Failure, match="damaged"):
        pickle.loads(data).of(0)


def test_many_shards_are_kept_in_bounds_by_many_threads(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from concurrent.futures import ThreadPoolExecutor

    monkeypatch.setattr(compact, "_TABLES", 2)
    rows = compact.open_split(str(copy), "train")[0]
    wanted = [rows.of(n) for n in range(5)]
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: rows.of(n % 5) == wanted[n % 5], range(400)))
    assert len(rows._tables) <= 2 + 8


def test_a_damaged_index_is_not_folded_in(copy: Path) -> None:
    (copy / "train" / "00001.parquet").write_bytes(b"PAR1")
    with pytest.raises(Failure, match=r"00001\.parquet: not a readable"):
        compact.write(str(copy), "train")
    assert not list((copy / "compact").glob("*"))


def test_a_split_without_clips_is_folded_too(handmade: Callable[..., str], tmp_path: Path) -> None:
    root = handmade(tmp_path, [[], [{}]], columns=("frame_diff",))
    (tmp_path / "train" / "00001.parquet").unlink()
    for split, shards in (("train", 1), ("val", 0)):
        assert compact.write(root, split) == shards
        rows, facts = compact.open_split(root, split)
        assert len(rows.shards) == shards and len(facts) == len(compact.table(root, split)) == 0


def test_a_remote_compact_file_is_fetched_once_for_all_processes(copy: Path, tmp_path: Path) -> None:
    import fsspec

    from longtake.datasets.cache import Cache

    batches = stream(copy)
    write_all(copy)
    fs = fsspec.filesystem("memory")
    fs.put(str(copy), "/compacted", recursive=True)
    cache = Cache(str(tmp_path / "cache"), 1 << 30)
    rows, _ = compact.open_split("memory://compacted", "train", cache=cache)
    assert isinstance(rows.data, str) and Path(rows.data).parent == tmp_path / "cache"
    fs.rm("/compacted/compact/train.arrow")
    assert compact.open_split("memory://compacted", "train", cache=cache)[0].of(0) == rows.of(0)
    remote = Loader("memory://compacted", **OPTIONS, cache=cache)
    assert [b["key"] for b in remote] == [b[0] for b in batches]
    fs.rm("/compacted", recursive=True)


def test_a_file_of_another_version_is_not_used(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compact.write(str(copy), "train")
    record = index.read_shard(str(copy), "compact", "train.shards")
    rows = [{k: v for k, v in row.items() if k != "format"} for row in record.table.to_pylist()]
    older = pa.schema([f for f in record.table.schema.remove_metadata() if f.name != "format"])
    url = str(copy / "compact" / "train.shards.parquet")
    index.write_index(url, rows, older, record.tar_bytes, record.tar_sha256)
    opens_as_it_is(copy)
    assert "written by another version" in capsys.readouterr().err


@pytest.mark.parametrize("folded", [False, True])
def test_labels_that_came_later_stand_at_their_clips_and_no_others_change(copy: Path, folded: bool) -> None:
    wanted = compact.open_split(str(copy), "train")[1]["label"].to_pylist()
    shards = truth(copy)
    for number in (0, 3):
        start = sum(len(shard.table) for shard in shards[:number])
        sources = shards[number].table["source"].to_pylist()
        rows = [{"source": sources[0], "uri": "a.mp4", "extra": json.dumps({"label": f"new {number}"})}]
        later.write(str(copy), "train", shards[number].name, rows)
        for place, source in enumerate(sources, start):
            wanted[place] = f"new {number}" if source == sources[0] else wanted[place]
    if folded:
        write_all(copy)
    rows, facts = compact.open_split(str(copy), "train")
    assert facts["label"].to_pylist() == wanted and facts.num_rows == len(wanted)
    assert rows.labelled(3)["label"].to_pylist() == wanted[rows.starts[3] :][: rows.counts[3]]
    assert len(Loader(str(copy), **OPTIONS).classes) == len(set(filter(None, wanted)))
