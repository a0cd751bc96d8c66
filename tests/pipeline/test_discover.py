import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.datasets.errors import UserError
from longtake.pipeline import discover


def rows_of(*patterns: str) -> list[dict[str, Any]]:
    return [row for batch in discover.find(patterns) for row in batch.to_pylist()]


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
    listed = rows_of(str(path))
    assert [(r["uri"], r["bytes"]) for r in listed] == [(f"{tmp_path}/a.mp4", 5), (f"{tmp_path}/gone.mp4", 0)]
    assert json.loads(listed[0]["extra"]) == {"label": "cat", "caption": "a cat, sitting"}


VALUES = {
    "text": st.text(st.characters(exclude_categories=["Cs"])),
    "whole": st.integers(-(2**63), 2**63 - 1),
    "real": st.floats(allow_nan=False),
    "flag": st.booleans(),
    "list": st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=3),
}


@given(st.lists(st.fixed_dictionaries({name: st.none() | value for name, value in VALUES.items()}), min_size=1))
def test_every_value_of_a_manifest_comes_through(tmp_path_factory: pytest.TempPathFactory, rows: list[Any]) -> None:
    path = tmp_path_factory.mktemp("m") / "list.parquet"
    types = [pa.string(), pa.int64(), pa.float64(), pa.bool_(), pa.list_(pa.string())]
    named = [row | {"uri": f"s3://b/{n}", "bytes": 1} for n, row in enumerate(rows)]
    columns = [("uri", pa.string()), ("bytes", pa.int64()), *zip(VALUES, types, strict=True)]
    pq.write_table(pa.Table.from_pylist(named, schema=pa.schema(columns)), path)
    assert [json.loads(row["extra"]) for row in rows_of(str(path))] == rows


def test_a_long_manifest_in_many_blocks_is_read_whole(tmp_path: Path) -> None:
    lines = [json.dumps({"uri": f"s3://b/{n}.mp4", "bytes": n, "caption": "x" * 500}) for n in range(20_000)]
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    (tmp_path / "m.csv").write_text(
        "uri,bytes,caption\n" + "".join(f"s3://b/{n}.mp4,{n},{'x' * 500}\n" for n in range(20_000))
    )
    for name in ("m.jsonl", "m.csv"):
        rows = rows_of(str(tmp_path / name))
        assert [row["bytes"] for row in rows] == list(range(20_000))
        assert all(json.loads(row["extra"]) == {"caption": "x" * 500} for row in rows)


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
        rows_of(str(tmp_path / "m.csv"))


def test_a_folder_gives_its_videos_and_a_glob_what_it_matches(tmp_path: Path) -> None:
    for name in ("a.mp4", "sub/b.MKV", "notes.txt", ".hidden/c.mp4", "d"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")

    def names(*patterns: str) -> list[str]:
        return [uri.removeprefix(f"{tmp_path}/") for uri in sorted({row["uri"] for row in rows_of(*patterns)})]

    assert names(str(tmp_path)) == ["a.mp4", "sub/b.MKV"]
    assert names(str(tmp_path / "*.txt"), str(tmp_path / "a.mp4"), str(tmp_path)) == ["a.mp4", "notes.txt", "sub/b.MKV"]
    with pytest.raises(UserError, match="no such file or folder"):
        rows_of(str(tmp_path / "missing"))
    with pytest.raises(UserError, match=r"no video there \(only 1 txt\)"):
        (tmp_path / "texts").mkdir()
        (tmp_path / "texts" / "x.txt").write_bytes(b"1")
        rows_of(str(tmp_path / "texts"))


def test_the_listing_digest_follows_the_listing(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    before = discover.listing_digest([str(tmp_path)])
    assert before == discover.listing_digest([str(tmp_path)])
    (tmp_path / "b.mp4").write_bytes(b"1")
    assert discover.listing_digest([str(tmp_path)]) != before


def test_a_glob_follows_links(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"12")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "b.mp4").symlink_to(tmp_path / "a.mp4")
    assert [(r["uri"], r["bytes"]) for r in rows_of(f"{tmp_path}/links/*.mp4")] == [(f"{tmp_path}/links/b.mp4", 2)]


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


def test_sources_are_found_over_http(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"video")
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=tmp_path))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_port}"
    try:
        assert [(r["uri"], r["bytes"]) for r in rows_of(f"{base}/a.mp4")] == [(f"{base}/a.mp4", 5)]
        assert [r["uri"] for r in rows_of(f"{base}/")] == [f"{base}/a.mp4"]
        assert [r["uri"] for r in rows_of(f"{base}/*.mp4")] == [f"{base}/a.mp4"]
    finally:
        server.shutdown()
