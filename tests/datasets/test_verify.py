import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.datasets import compact, index, schema, storage, verify


def rewrite(root: Path, name: str, change: Callable[[list[dict]], object], table_schema: object = schema.INDEX) -> None:
    """Commit a tar again with other rows: an index that is whole, but wrong."""
    shard = index.read_shard(str(root), "train", name)
    rows = shard.table.to_pylist()
    change(rows)
    index.write_index(str(root / "train" / f"{name}.parquet"), rows, table_schema, shard.tar_bytes, shard.tar_sha256)


def rewrite_sources(root: Path, change: Callable[[list[dict]], object]) -> None:
    url = str(root / "sources" / "train-00000.parquet")
    rows = index.from_parquet(url).to_pylist()
    change(rows)
    storage.write(url, index.to_parquet(index.rows_table(rows, schema.SOURCES)))


@pytest.fixture
def copy(dataset: str, tmp_path: Path) -> Path:
    return Path(shutil.copytree(dataset, tmp_path / "dataset"))


def test_a_whole_dataset_has_no_problem_and_all_its_bytes_are_read(copy: Path) -> None:
    read: list[int] = []
    assert list(verify.verify(str(copy), threads=3, progress=read.append)) == []
    assert sum(read) == verify.tar_bytes(str(copy)) == sum(p.stat().st_size for p in copy.rglob("*.tar"))


def test_blocks_smaller_than_a_member_give_the_same(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "_BLOCK", 700)
    assert list(verify.verify(str(copy))) == []
    flip(copy / "train" / "00000.tar", index.read_all(str(copy), "train")["mp4_offset"][1].as_py() + 800)
    (line,) = verify.verify(str(copy))
    assert index.read_all(str(copy), "train")["key"][1].as_py() + ".mp4)" in line


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def swap_two_clips(rows: list[dict]) -> None:
    places = ("mp4_offset", "mp4_size", "json_offset", "json_size")
    rows[0].update({p: rows[1][p] for p in places})


DAMAGES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "changed": (
        lambda d: flip(d / "train/00000.tar", 600),
        "train/00000.tar: its bytes are not those",
        ".mp4); delete",
    ),
    "changed json": (lambda d: flip(d / "train/00000.tar", -1), "train/00000.tar: its bytes are not those", "; delete"),
    "torn": (
        lambda d: (d / "train/00000.tar").write_bytes(b"0" * 512),
        "00000.tar: 512 bytes, the index says",
        "delete",
    ),
    "missing": (
        lambda d: (d / "train/00000.tar").unlink(),
        "train/00000.tar: is missing",
        "delete train/00000.parquet",
    ),
    "debris": (
        lambda d: (d / "train/00009.tar").touch(),
        "00009.tar: its shard was never committed",
        "run the `shard`",
    ),
    "other debris": (lambda d: (d / "train/00000.x.tar").touch(), "train/00000.x.tar: has no index", "delete it"),
    "stray": (lambda d: (d / "notes.txt").touch(), "notes.txt: belongs to nothing", "delete it"),
    "stray among tars": (lambda d: (d / "val/1.txt").touch(), "val/1.txt: belongs to nothing", "delete it"),
    "wrong place": (lambda d: rewrite(d, "00000", swap_two_clips), ".mp4 is not where the index says", "delete train"),
    "off by one": (
        lambda d: rewrite(d, "00000", lambda rows: rows[0].update(json_offset=rows[0]["json_offset"] + 1)),
        ".json is not where the index says",
        "delete train/00000.parquet",
    ),
    "beyond the end": (
        lambda d: rewrite(d, "00000", lambda rows: rows[0].update(mp4_offset=1 << 40)),
        ".mp4 is not where the index says",
        "delete train/00000.parquet",
    ),
    "no place": (
        lambda d: rewrite(d, "00000", lambda rows: rows[0].update(mp4_offset=None)),
        ".mp4 is not where the index says",
        "delete train/00000.parquet",
    ),
    "misaligned column": (
        lambda d: rewrite(d, "00000.frame_diff", lambda rows: rows.reverse(), schema.COLUMN_INDEX),
        "00000.frame_diff.tar: belongs to other clips",
        "delete train/00000.parquet",
    ),
    "damaged index": (
        lambda d: (d / "train/00000.parquet").write_bytes(b"PAR1"),
        "train/00000.parquet: not a",
        "; delete it and run",
    ),
    "no good source": (
        lambda d: rewrite_sources(d, lambda rows: [r.update(status="rejected", reason="damaged") for r in rows]),
        "has no good row",
        "delete train/00000.parquet",
    ),
    "other count": (
        lambda d: rewrite_sources(d, lambda rows: rows[0].update(clips=rows[0]["clips"] + 1)),
        "clips = ",
        "run the `shard` stage again",
    ),
    "neither good nor rejected": (
        lambda d: rewrite_sources(d, lambda rows: rows[0].update(status="odd")),
        "sources_good + sources_rejected = ",
        "run the `shard` stage again",
    ),
    "no sources": (
        lambda d: (d / "sources/train-00000.parquet").unlink(),
        "sources/train-00000.parquet: is missing",
        "delete train/00000.parquet",
    ),
    "not committed": (
        lambda d: [p.unlink() for p in (d / "train").glob("00000*")],
        "group train/00000 is planned but not committed",
        "run the `shard` stage",
    ),
    "damaged plan": (
        lambda d: (d / "plan/00000.parquet").write_bytes(b"PAR1"),
        "plan/00000.parquet: not a",
        "; bring the plan back",
    ),
    "damaged compact": (
        lambda d: (compact.write(str(d), "train"), flip(d / "compact/train.arrow", 1500)),
        "compact/train.arrow: damaged",
        "longtake dataset compact",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_each_damage_is_a_line_that_names_the_file_and_the_way_on(copy: Path, damage: str) -> None:
    make, says, remedy = DAMAGES[damage]
    make(copy)
    found = list(verify.verify(str(copy)))
    assert [line for line in found if says in line and remedy in line], found
    assert all("\n" not in line and str(copy) in line for line in found)


def test_files_of_a_writer_at_work_are_no_problem(copy: Path) -> None:
    (copy / "train" / ".00007.tar~host@1~abcd.tmp").touch()
    (copy / "views").mkdir()
    assert list(verify.verify(str(copy))) == []
