import tarfile
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import index, schema, storage, verify
from longtake.datasets.errors import Failure
from longtake.datasets.shard import sha256_of, write_tar

_samples = st.lists(st.binary(max_size=2000), max_size=12).map(
    lambda parts: [(f"{n:05d}", {"mp4": data, "json": data[:7]}) for n, data in enumerate(parts)]
)


@given(_samples)
def test_members_lie_where_the_offsets_say_and_equal_samples_give_equal_tars(samples: list) -> None:
    with tempfile.TemporaryDirectory() as folder:
        one, two = Path(folder) / "1.tar", Path(folder) / "2.tar"
        members = write_tar(one, samples)
        write_tar(two, samples)
        raw = one.read_bytes()
        assert sha256_of(one) == sha256_of(two)
        assert [raw[m.offset : m.offset + m.size] for m in members] == [
            d for _, parts in samples for d in parts.values()
        ]
        with tarfile.open(one) as tar:
            assert [m.name for m in tar.getmembers()] == [f"{m.key}.{m.extension}" for m in members]
            assert all(m.mtime == 0 and m.uid == 0 and m.uname == "" for m in tar.getmembers())


def test_every_index_row_points_at_its_own_bytes(dataset: str) -> None:
    for split in schema.SPLITS:
        for row in index.read_all(dataset, split).to_pylist():
            tar = storage.join(dataset, split, f"{row['shard']}.tar")
            assert storage.read_range(tar, row["mp4_offset"] + 4, 4) == b"ftyp"
            assert storage.read_range(tar, row["json_offset"], row["json_size"]).startswith(b"{")


def test_a_plain_webdataset_user_reads_the_tars(dataset: str) -> None:
    import webdataset as wds

    urls = sorted(str(p) for p in Path(dataset, "train").glob("?????.tar"))
    samples = list(wds.WebDataset(urls, shardshuffle=False))
    assert [s["__key__"] for s in samples] == index.read_all(dataset, "train")["key"].to_pylist()
    assert all({"mp4", "json"} <= set(s) for s in samples)


def test_the_account_adds_up(dataset: str) -> None:
    totals = index.summary(dataset)
    assert totals["sources"] == totals["sources_good"] + totals["sources_rejected"] == 6
    assert totals["clips"] == totals["clips_cut"] > 6


def test_verify_finds_a_flipped_byte_a_truncation_and_a_missing_tar(dataset: str, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(dataset, copy)
    names = verify.tars(str(copy))
    assert not [p for name in names for p in verify.problems(str(copy), name)]
    tars = [copy / split / f"{name}.tar" for split, name in names]
    flipped = bytearray(tars[0].read_bytes())
    flipped[1000] ^= 1
    tars[0].write_bytes(flipped)
    tars[1].write_bytes(tars[1].read_bytes()[:-1])
    tars[2].unlink()
    found = [p for name in names for p in verify.problems(str(copy), name)]
    assert [
        "not those that were committed" in found[0],
        "bytes, the index says" in found[1],
        "is missing" in found[2],
    ] == [True] * 3
    assert len(found) == 3


def test_a_damaged_index_is_named(dataset: str, tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "00000.parquet").write_bytes(b"PAR1 not really")
    with pytest.raises(Failure, match=r"00000\.parquet: not a readable Parquet file"):
        index.read_shards(str(tmp_path), "train")
