"""A listing that is planned already is not read again; whatever could make a source new is."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from longtake.datasets import annotations, later
from longtake.datasets.errors import UserError
from longtake.datasets.verify import verify
from longtake.pipeline import discover, listed, plan

Planned = Callable[[], tuple[int, int]]


@pytest.fixture
def planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planned:
    """Plans tmp_path/list.jsonl; gives the number of planned sources, and of rows that were read for it."""
    read = list[int]()

    def find(*arguments: Any) -> Any:
        for batch in discover.find(*arguments):
            read.append(len(batch))
            yield batch

    monkeypatch.setattr(plan, "find", find)

    def run() -> tuple[int, int]:
        read.clear()
        groups = plan.plan(str(tmp_path / "dataset"), [str(tmp_path / "list.jsonl")], 0.5, 1000, 10)
        return sum(group["sources"] for group in groups), sum(read)

    return run


def write(folder: Path, *rows: dict[str, Any]) -> None:
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def row(n: int, **more: Any) -> dict[str, Any]:
    return {"uri": f"{n}.mp4", "bytes": 5, "etag": f"tag{n}", **more}


def test_what_is_planned_is_not_read_again(tmp_path: Path, planned: Planned) -> None:
    write(tmp_path, row(1), row(2))
    assert planned() == (2, 2)
    assert planned() == (2, 0)
    write(tmp_path, row(1), row(2), row(3))
    assert planned() == (3, 3)
    assert planned() == (3, 0)
    assert (tmp_path / "dataset" / listed.RECORD).is_file()
    assert not any(listed.RECORD in problem for problem in verify(str(tmp_path / "dataset")))


def test_the_rows_of_a_manifest_with_all_sizes_are_not_read_for_its_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sized, unsized = tmp_path / "sized.parquet", tmp_path / "unsized.parquet"
    pq.write_table(pa.Table.from_pylist([row(1), row(2)]), sized)
    pq.write_table(pa.Table.from_pylist([row(1), row(2, bytes=None)]), unsized)
    read = list[str]()
    monkeypatch.setattr(listed, "find", lambda patterns: read.extend(patterns) or discover.find(patterns))

    before = listed.listing_digest([str(sized)])
    assert not read and listed.listing_digest([str(sized)]) == before
    pq.write_table(pa.Table.from_pylist([row(1, label="a"), row(2)]), sized)
    assert listed.listing_digest([str(sized)]) != before and not read
    # a negative size is as good as none, and an unknown one may change while the manifest does not
    pq.write_table(pa.Table.from_pylist([row(1), row(2, bytes=-1)]), sized)
    listed.listing_digest([str(sized)])
    assert read == [str(sized)]
    read.clear()
    before = listed.listing_digest([str(unsized)])
    (tmp_path / "2.mp4").write_bytes(b"video")
    assert listed.listing_digest([str(unsized)]) != before and len(read) == 2
    sized.write_bytes(b"no Parquet")
    with pytest.raises(UserError, match=r"sized\.parquet"):
        listed.listing_digest([str(sized)])


def test_a_manifest_of_the_same_length_and_age_is_read_by_its_bytes(tmp_path: Path, planned: Planned) -> None:
    write(tmp_path, row(1))
    status = (tmp_path / "list.jsonl").stat()
    assert planned() == (1, 1)
    write(tmp_path, row(2))
    os.utime(tmp_path / "list.jsonl", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert planned() == (2, 1)


def test_sources_without_sizes_are_asked_each_time(tmp_path: Path, planned: Planned) -> None:
    (tmp_path / "1.mp4").write_bytes(b"short")
    write(tmp_path, {"uri": "1.mp4"})
    assert planned() == (1, 1)
    (tmp_path / "1.mp4").write_bytes(b"longer")
    assert planned() == (2, 1)


def test_changed_annotations_are_found_and_stay(tmp_path: Path, planned: Planned) -> None:
    dataset = str(tmp_path / "dataset")
    write(tmp_path, row(1, label="cat"))
    planned()
    write(tmp_path, row(1, label="dog"))
    assert planned() == (1, 1)
    assert planned() == (1, 0)
    ((split, shard),) = [(s, name) for s in ("train", "val") for name in later.shards(dataset, s)]
    (changed,) = later.read(dataset, split, shard)
    assert annotations.of_sample(changed["extra"])["label"] == "dog"
    # whoever deletes them gets them back
    Path(dataset, later.FOLDER, f"{split}-{shard}.parquet").unlink()
    assert planned() == (1, 1)
    assert later.read(dataset, split, shard) == [changed]


def test_a_plan_or_record_that_is_gone_is_made_again(tmp_path: Path, planned: Planned) -> None:
    write(tmp_path, row(1))
    planned()
    (tmp_path / "dataset" / "plan" / "00000.parquet").unlink()
    assert planned() == (1, 1)
    (tmp_path / "dataset" / listed.RECORD).write_text("{damaged")
    assert planned() == (1, 1)
    assert planned() == (1, 0)


def test_a_manifest_that_changes_while_it_is_read_is_read_again(
    tmp_path: Path, planned: Planned, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, row(1))
    digest = listed.digest_of_manifests

    def digest_then_change(patterns: Any) -> str:
        before = digest(patterns)
        monkeypatch.setattr(listed, "digest_of_manifests", digest)
        write(tmp_path, row(2))
        return before

    monkeypatch.setattr(listed, "digest_of_manifests", digest_then_change)
    assert planned() == (1, 1)
    write(tmp_path, row(1))
    assert planned() == (2, 1), "the first listing came back, but the second was planned"


@pytest.mark.parametrize("text", ['say "a"', "back\\slash", "ü", '\x7f"', "tab\t", ""])
def test_captions_reach_the_plan_as_they_are(tmp_path: Path, text: str) -> None:
    table = pa.table({"uri": ["1.mp4", "2.mp4"], "bytes": [5, 6], "caption": [text, 'other "b" \\']})
    pq.write_table(table, tmp_path / "list.parquet")
    groups = plan.plan(str(tmp_path / "dataset"), [str(tmp_path / "list.parquet")], 0.5, 1000, 10)
    rows = [row for group in groups for row in plan.sources_of(str(tmp_path / "dataset"), group)]
    captions = {Path(r["uri"]).name: annotations.of_sample(r["extra"])["caption"] for r in rows}
    assert captions == {"1.mp4": text, "2.mp4": 'other "b" \\'}
