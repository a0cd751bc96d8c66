import threading
from collections.abc import Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.pipeline import discover, listed


def rows_of(*patterns: str) -> list[dict[str, Any]]:
    return [row for batch in discover.find(patterns) for row in batch.to_pylist()]


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
    before = listed.listing_digest([str(tmp_path)])
    assert before == listed.listing_digest([str(tmp_path)])
    (tmp_path / "b.mp4").write_bytes(b"1")
    assert listed.listing_digest([str(tmp_path)]) != before


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


class _Odd(BaseHTTPRequestHandler):
    """Gives /list.csv and /a.mp4 to those who sign, the status that a path names, and half of /cut.csv."""

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        name, _, query = self.path[1:].partition("?")
        status = int(name[:3]) if name[:3].isdecimal() else 200 if query == "sig=a/b.mp4" or name == "cut.csv" else 403
        body = b"12345" if name == "a.mp4" else b"uri,caption\na.mp4?sig=a/b.mp4,one\n"
        self.send_response(status)
        self.send_header("Content-Length", str(len(body) * (2 if name == "cut.csv" else 1)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)


@pytest.fixture(scope="module")
def odd() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def test_a_manifest_with_a_signed_address_is_a_manifest(odd: str) -> None:
    (row,) = rows_of(f"{odd}/list.csv?sig=a/b.mp4")
    assert row == {"uri": f"{odd}/a.mp4?sig=a/b.mp4", "bytes": 5, "etag": None, "extra": '{"caption": "one"}'}
    with pytest.raises(UserError, match="neither a video nor a manifest"):
        rows_of(f"{odd}/list.xlsx?sig=a/b.mp4")
    assert [r["uri"] for r in rows_of(f"{odd}/a.mp4?as=list.csv")] == [f"{odd}/a.mp4?as=list.csv"]


@pytest.mark.parametrize(
    ("name", "kind", "says"),
    [
        ("404.csv", UserError, "no such manifest"),
        ("401.parquet", UserError, r"may not be read \(HTTP 401 Unauthorized\)"),
        ("403.csv", UserError, r"may not be read \(HTTP 403 Forbidden\)"),
        ("503.csv", Failure, "Service Unavailable.*gave up after 5 attempts"),
        ("cut.csv", Failure, "did not come whole"),
    ],
)
def test_why_a_manifest_does_not_come_is_said(
    odd: str, name: str, kind: type[Exception], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: None)
    with pytest.raises(kind, match=says):
        rows_of(f"{odd}/{name}")


def test_a_store_without_a_bucket_is_a_line() -> None:
    with pytest.raises(UserError, match="sources: s3://: "):
        rows_of("s3://")
