import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets import schema
from longtake.datasets.errors import UserError
from longtake.pipeline import discover

identities = st.lists(st.text("0123456789abcdef", min_size=20, max_size=20), min_size=1, max_size=40)
FIRST = {"train": 0, "val": 0}


def found(names: list[str]) -> pa.Table:
    count = len(names)
    return pa.table(
        {
            "source": pa.chunked_array([names], pa.string()),
            "uri": pa.chunked_array([[f"u{n}" for n in range(count)]], pa.string()),
            "bytes": pa.array([10 + n for n in range(count)], pa.int64()),
            "extra": pa.nulls(count, pa.string()),
        }
    )


def assigned(new: pa.Table, known: pa.Table, *options) -> pa.Table:
    ids = np.array([i.encode() for i in new["source"].to_pylist()], "S20")
    return pa.Table.from_batches(discover.assign(new.drop_columns("source"), ids, known, *options), schema.PLAN)


NOTHING = schema.PLAN.empty_table()


@given(identities, st.floats(0, 0.9), st.integers(1, 5), st.integers(0, 2**32 - 1))
def test_each_source_gets_one_row_in_one_group_whatever_the_listing_order(
    names: list[str], val: float, per_group: int, seed: int
) -> None:
    sources = found(names)
    table = assigned(sources, NOTHING, FIRST, val, 1000, per_group)
    shuffled = sources.take(np.random.default_rng(seed).permutation(len(names)))
    assert assigned(shuffled, NOTHING, FIRST, val, 1000, per_group).equals(table)
    rows = table.to_pylist()
    assert sorted(r["uri"] for r in rows) == sorted(sources["uri"].to_pylist())
    originals = [r for r in rows if r["duplicate_of"] is None]
    assert {r["source"] for r in originals} == set(names) and len(originals) == len(set(names))
    by_uri = {r["uri"]: r["source"] for r in originals}
    assert all(by_uri[r["duplicate_of"]] == r["source"] for r in rows if r["duplicate_of"])
    for split in ("train", "val"):
        groups = [r["group"] for r in rows if r["split"] == split]
        assert groups == sorted(groups) and set(groups) == set(range(len(set(groups))))
        assert all(groups.count(g) <= per_group for g in groups)
    assert len({(r["source"], r["split"]) for r in rows}) == len(set(names)), "a source is in one split"


@given(identities, identities)
def test_growth_moves_nothing_and_repeats_nothing(old: list[str], new: list[str]) -> None:
    first = assigned(found(old), NOTHING, FIRST, 0.3, 1000, 3)
    free = {
        s: 1 + max((r["group"] for r in first.to_pylist() if r["split"] == s), default=-1) for s in ("train", "val")
    }
    added = assigned(found(new), first, free, 0.3, 1000, 3).to_pylist()
    known = {r["source"]: r["split"] for r in first.to_pylist()}
    assert all(r["group"] >= free[r["split"]] for r in added)
    assert {r["source"] for r in added if r["duplicate_of"] is None} == set(new) - set(old)
    assert all(known[r["source"]] == r["split"] for r in added if r["source"] in known)


@given(identities.filter(lambda names: len(set(names)) > 3))
def test_the_split_of_a_source_depends_on_nothing_else(names: list[str]) -> None:
    def splits(some: list[str]) -> dict[str, str]:
        rows = assigned(found(some), found(["f" * 20]).append_column("split", pa.array(["train"])), FIRST, 0.4, 1000, 3)
        return {r["source"]: r["split"] for r in rows.to_pylist()}

    whole, half = splits(names), splits(names[::2])
    assert all(whole[k] == v for k, v in half.items())


@given(st.lists(st.integers(0, 50), max_size=60), st.integers(1, 120), st.integers(1, 7))
def test_groups_are_bounded(sizes: list[int], most_bytes: int, most_rows: int) -> None:
    groups = discover._cut(np.array(sizes, np.int64), most_bytes, most_rows).tolist()
    assert groups == sorted(groups)
    for number in set(groups):
        members = [s for s, g in zip(sizes, groups, strict=True) if g == number]
        assert len(members) <= most_rows and (sum(members) <= most_bytes or len(members) == 1)


def test_a_small_dataset_has_both_splits() -> None:
    rows = assigned(found(["0" * 20, "1" * 20]), NOTHING, FIRST, 0.01, 1000, 3)
    assert set(rows["split"].to_pylist()) == {"train", "val"}


def test_identity_is_of_the_content_not_of_the_name(tmp_path: Path) -> None:
    paths = [tmp_path / n for n in ("a.mp4", "b c.mp4", "c.mp4")]
    for path, data in zip(paths, (b"x" * 300_000, b"x" * 300_000, b"x" * 299_999 + b"y"), strict=True):
        path.write_bytes(data)
    one, two, other = discover.identify(discover.find([str(p) for p in paths])).tolist()
    assert one == two != other


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_manifest_names_sources_and_carries_its_columns(tmp_path: Path, suffix: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"12345")
    rows = [
        {"uri": "a.mp4", "label": "cat", "caption": "a cat, sitting"},
        {"uri": f"{tmp_path}/gone.mp4", "label": "dog", "caption": ""},
    ]
    table, path = pa.Table.from_pylist(rows), tmp_path / f"list.{suffix}"
    if suffix == "csv":
        pyarrow.csv.write_csv(table, path)
    elif suffix == "parquet":
        pq.write_table(table, path)
    else:
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    listed = discover.find([str(path)]).to_pylist()
    assert [(r["uri"], r["bytes"]) for r in listed] == [(f"{tmp_path}/a.mp4", 5), (f"{tmp_path}/gone.mp4", 0)]
    assert json.loads(listed[0]["extra"]) == {"label": "cat", "caption": "a cat, sitting"}


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("url,label\na,b\n", "no column `uri`; there are url, label"),
        ("uri\n", "no source"),
        ("", "not a readable manifest"),
    ],
)
def test_a_manifest_that_cannot_be_used_is_one_line(tmp_path: Path, content: str, says: str) -> None:
    (tmp_path / "m.csv").write_text(content)
    with pytest.raises(UserError, match=says):
        discover.find([str(tmp_path / "m.csv")])


def test_a_folder_gives_its_videos_and_a_glob_what_it_matches(tmp_path: Path) -> None:
    for name in ("a.mp4", "sub/b.MKV", "notes.txt", ".hidden/c.mp4", "d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")

    def names(*patterns: str) -> list[str]:
        return [uri.removeprefix(f"{tmp_path}/") for uri in sorted(set(discover.find(patterns)["uri"].to_pylist()))]

    assert names(str(tmp_path)) == ["a.mp4", "sub/b.MKV"]
    assert names(str(tmp_path / "*.txt"), str(tmp_path / "a.mp4"), str(tmp_path)) == ["a.mp4", "notes.txt", "sub/b.MKV"]
    with pytest.raises(UserError, match="no such file or folder"):
        discover.find([str(tmp_path / "missing")])
    with pytest.raises(UserError, match=r"no video there \(only 1 txt\)"):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "x.txt").write_bytes(b"1")
        discover.find([str(tmp_path / "texts")])


def test_a_file_that_is_named_twice_is_planned_once(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    (tmp_path / "b.mp4").write_bytes(b"2")
    groups = discover.plan(str(tmp_path / "ds"), [f"{tmp_path}/*.mp4", f"{tmp_path}/a.mp4"], 0.5, 1 << 30, 4)
    assert sum(g["sources"] for g in groups) == 2


def test_the_listing_digest_follows_the_listing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    before = discover.listing_digest([str(tmp_path)])
    assert before == discover.listing_digest([str(tmp_path)])
    (tmp_path / "b.mp4").write_bytes(b"1")
    assert discover.listing_digest([str(tmp_path)]) != before


def test_of_two_drivers_that_plan_at_once_one_plan_stands(tmp_path: Path) -> None:
    for n in range(20):
        (tmp_path / f"{n}.mp4").write_bytes(bytes([n]) * 100)
    plans = []
    threads = [
        threading.Thread(
            target=lambda: plans.append(discover.plan(str(tmp_path / "ds"), [f"{tmp_path}/*.mp4"], 0.2, 1 << 30, 4))
        )
        for _ in range(4)
    ]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(plans) == 4 and all(p == plans[0] for p in plans)
    assert sum(g["sources"] for g in plans[0]) == 20
    assert [p.name for p in (tmp_path / "ds" / "plan").iterdir()] == ["00000.parquet"]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_sources_are_found_over_http(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"video")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        assert [(r["uri"], r["bytes"]) for r in discover.find([f"{base}/a.mp4"]).to_pylist()] == [(f"{base}/a.mp4", 5)]
        assert discover.find([f"{base}/"])["uri"].to_pylist() == [f"{base}/a.mp4"]
        assert discover.find([f"{base}/*.mp4"])["uri"].to_pylist() == [f"{base}/a.mp4"]
    finally:
        server.shutdown()
