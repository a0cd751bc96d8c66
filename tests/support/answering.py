"""A server that answers in many ways, and datasets that are made of what it gives, without Ray."""

from __future__ import annotations

import gzip
import hashlib
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from longtake.datasets import index, schema, storage
from longtake.datasets.verify import verify
from longtake.pipeline import plan, retry, seen
from longtake.pipeline.commit import make_group
from longtake.pipeline.config import ClipConfig, CutConfig, LimitsConfig
from longtake.pipeline.stages import shard

CUT = CutConfig(clip=ClipConfig(short_side=32, fps=10, max_seconds=1), limits=LimitsConfig(max_bytes=1 << 20))


class Web:
    """A server whose paths are MODE/FILE: the mode says in which way it answers. `healed` modes answer well."""

    def __init__(self, folder: Path) -> None:
        web = self
        self.folder = folder
        self.asked = Counter[str]()
        self.healed = set[str]()
        self.end = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                web._answer(self, folder, head=True)

            def do_GET(self) -> None:
                web.asked[self.path] += 1
                web._answer(self, folder, head=False)

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def close(self) -> None:
        self.end.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, to: BaseHTTPRequestHandler, folder: Path, head: bool) -> None:
        mode, _, name = to.path.strip("/").partition("/")
        if mode in self.healed:
            mode = "plain"
        data = (folder / name).read_bytes() if (folder / name).is_file() else b"none"
        headers = {"Content-Length": str(len(data))}
        status = int(mode) if mode.isdigit() else 200
        if mode.isdigit():
            data, headers = b"", {"Content-Length": "0"}
        elif mode in ("loop", "file", "moved"):
            place = {"loop": to.path, "file": (folder / name).as_uri(), "moved": f"/plain/{name}"}[mode]
            status, data, headers = 302, b"", {"Location": place, "Content-Length": "0"}
        elif mode == "gzip":
            data = gzip.compress(data)
            headers = {"Content-Encoding": "gzip", "Content-Length": str(len(data))}
        elif mode in ("chunked", "endless"):
            headers = {"Transfer-Encoding": "chunked"}
            data = b"%x\r\n%s\r\n0\r\n\r\n" % (len(data), data)
        elif mode == "silent":
            self.end.wait(60)
            to.close_connection = True
            return
        elif mode == "closed":
            headers = {"Connection": "close"}
            to.close_connection = True
        elif mode == "cut":
            data = data[: len(data) // 2]
            to.close_connection = True
        elif mode == "plain" and (asked := to.headers.get("Range")):
            first, last = (int(n) for n in asked.removeprefix("bytes=").split("-"))
            headers = {"Content-Range": f"bytes {first}-{min(last, len(data) - 1)}/{len(data)}"}
            status, data = 206, data[first : last + 1]
            headers["Content-Length"] = str(len(data))
        to.send_response(status)
        for key, value in headers.items():
            to.send_header(key, value)
        to.end_headers()
        try:
            if not head:
                while mode == "drip" and not self.end.wait(0.02):
                    to.wfile.write(b"x")
                while mode == "endless":
                    to.wfile.write(b"10000\r\n%s\r\n" % bytes(1 << 16))
                to.wfile.write(data)
        except OSError:
            to.close_connection = True


def listed(folder: Path, *uris: str, **columns: list[Any]) -> str:
    pq.write_table(pa.table({"uri": list(uris)} | columns), folder / "list.parquet")
    return str(folder / "list.parquet")


def cut(url: str, groups: list[dict[str, Any]]) -> None:
    """Make the groups that are missing."""
    if missing := shard.missing_groups(url, groups):
        again = seen.planned_again(url, missing)
        for group in missing:
            job = group | {"again": again.get((group["split"], group["group"]), {})}
            assert not make_group(job, plan.sources_of(url, group), url, CUT)["error"]


def make(dataset: Path, pattern: str, group_sources: int = 3) -> dict[str, Any]:
    """What the stage does, without Ray; returns what became of each source: `{URI: "good" or the reason}`."""
    url = str(dataset)
    storage.write(f"{url}/dataset.json", storage.canonical_json({"format": schema.FORMAT_VERSION}))
    cut(url, plan.plan(url, [pattern], 0.2, 1 << 30, group_sources))
    retry.record(url)
    assert not list(verify(url))
    totals = index.summary(url)
    rows = index.read_sources(url).to_pylist()
    assert len(rows) == totals["sources"] == totals["sources_good"] + totals["sources_rejected"]
    assert totals["clips"] == totals["sources_good"], "tiny videos have a clip each"
    assert len({row["uri"] for row in rows}) == len(rows)
    return {row["uri"]: row["reason"] or "good" for row in rows}


def hashes(dataset: Path) -> dict[str, str]:
    """Of all files but the one that says what to ask again."""
    files = [p for p in dataset.rglob("*") if p.is_file() and p.name != retry.RECORD]
    return {str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
