import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets.errors import UserError
from longtake.pipeline import discover
from longtake.pipeline.discover import Found

identities = st.lists(st.text("0123456789abcdef", min_size=20, max_size=20), min_size=1, max_size=40)
FIRST = {"train": 0, "val": 0}


def found(names: list[str]) -> list[tuple[Found, str]]:
    return [(Found(f"u{n}", 10 + n, None), name) for n, name in enumerate(names)]


@given(identities, st.floats(0, 0.9), st.integers(1, 5), st.randoms())
def test_each_source_gets_one_row_in_one_group_whatever_the_listing_order(
    names: list[str], val: float, per_group: int, random
) -> None:
    sources = found(names)
    rows = discover.assign(sources, {}, FIRST, val, 1000, per_group)
    shuffled = list(sources)
    random.shuffle(shuffled)
    assert discover.assign(shuffled, {}, FIRST, val, 1000, per_group) == rows
    assert sorted(r["uri"] for r in rows) == sorted(f.uri for f, _ in sources)
    originals = [r for r in rows if r["duplicate_of"] is None]
    assert {r["source"] for r in originals} == set(names) and len(originals) == len(set(names))
    for split in ("train", "val"):
        groups = [r["group"] for r in rows if r["split"] == split]
        assert groups == sorted(groups) and set(groups) == set(range(len(set(groups))))
        assert all(groups.count(g) <= per_group for g in groups)
    assert len({(r["source"], r["split"]) for r in rows}) == len(set(names)), "a source is in one split"


@given(identities, identities)
def test_growth_moves_nothing_and_repeats_nothing(old: list[str], new: list[str]) -> None:
    first = discover.assign(found(old), {}, FIRST, 0.3, 1000, 3)
    known = {r["source"]: (r["uri"], r["split"]) for r in reversed(first)}
    free = {s: 1 + max((r["group"] for r in first if r["split"] == s), default=-1) for s in ("train", "val")}
    added = discover.assign(found(new), known, free, 0.3, 1000, 3)
    assert all(r["group"] >= free[r["split"]] for r in added)
    assert {r["source"] for r in added if r["duplicate_of"] is None} == set(new) - set(old)
    assert all(known[r["source"]][1] == r["split"] for r in added if r["source"] in known)


def test_a_small_dataset_has_both_splits() -> None:
    rows = discover.assign(found(["0" * 20, "1" * 20]), {}, FIRST, 0.01, 1000, 3)
    assert {r["split"] for r in rows} == {"train", "val"}


def test_identity_is_of_the_content_not_of_the_name(tmp_path: Path) -> None:
    paths = [tmp_path / n for n in ("a.mp4", "b c.mp4", "c.mp4")]
    for path, data in zip(paths, (b"x" * 300_000, b"x" * 300_000, b"x" * 299_999 + b"y"), strict=True):
        path.write_bytes(data)
    one, two, other = (discover.identity(Found(str(p), p.stat().st_size, None)) for p in paths)
    assert one == two != other


def test_a_folder_gives_its_videos_and_a_glob_what_it_matches(tmp_path: Path) -> None:
    for name in ("a.mp4", "sub/b.MKV", "notes.txt", ".hidden/c.mp4", "d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")

    def names(*patterns: str) -> list[str]:
        return [f.uri.removeprefix(f"{tmp_path}/") for f in discover.find(patterns)]

    assert names(str(tmp_path)) == ["a.mp4", "sub/b.MKV"]
    assert names(str(tmp_path / "*.txt"), str(tmp_path / "a.mp4"), str(tmp_path)) == ["a.mp4", "notes.txt", "sub/b.MKV"]
    with pytest.raises(UserError, match="no such file or folder"):
        discover.find([str(tmp_path / "missing")])
    with pytest.raises(UserError, match=r"no video there \(only 1 txt\)"):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "x.txt").write_bytes(b"1")
        discover.find([str(tmp_path / "texts")])


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
    assert all(p.equals(plans[0]) for p in plans)
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
        assert [(f.uri, f.size) for f in discover.find([f"{base}/a.mp4"])] == [(f"{base}/a.mp4", 5)]
        assert [f.uri for f in discover.find([f"{base}/"])] == [f"{base}/a.mp4"]
        assert [f.uri for f in discover.find([f"{base}/*.mp4"])] == [f"{base}/a.mp4"]
    finally:
        server.shutdown()
