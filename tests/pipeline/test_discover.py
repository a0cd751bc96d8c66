import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from longtake.datasets.errors import UserError
from longtake.pipeline import discover


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
