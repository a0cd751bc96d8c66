"""An S3 store that reads the files of a folder, each answer late and some requests failing, in a process of its own.

    python tests/benchmarks/slow_store.py FOLDER --latency 0.1 --faults 0.01

Its buckets are the folders in FOLDER. Of `--faults` of all requests a third each get "503 Slow Down", "500 Internal
Error", or half of an answer before the connection breaks. It knows listings, HEAD, and GET with a range: what readers of
datasets need. moto's server in its place would take as much of a core as the loaders that are measured.
"""

import argparse
import asyncio
import contextlib
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from email.utils import formatdate
from pathlib import Path
from xml.sax.saxutils import escape

from aiohttp import web

STATUSES = {503: "SlowDown", 500: "InternalError", 404: "NoSuchKey"}


@dataclass
class Store:
    folder: Path
    latency: float  # seconds
    faults: float  # share of the requests

    def __post_init__(self) -> None:
        self.counts, self._chance = Counter[str](), random.Random(0)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        self.counts["requests"] += 1
        fault = self._chance.choice(("503", "500", "torn")) if self._chance.random() < self.faults else ""
        await asyncio.sleep(self.latency)
        if fault:
            self.counts[fault] += 1
        if fault in ("503", "500"):
            return error(request, int(fault))
        path = self.folder / request.path.lstrip("/")
        if "list-type" in request.query:
            return web.Response(text=listing(self.folder, request), content_type="application/xml")
        if not path.is_file():
            return error(request, 404)
        return await answer(request, path, torn=bool(fault))


def error(request: web.Request, status: int) -> web.Response:
    text = f"<Error><Code>{STATUSES[status]}</Code><Message>No.</Message></Error>"
    return web.Response(status=status, text="" if request.method == "HEAD" else text, content_type="application/xml")


async def answer(request: web.Request, path: Path, torn: bool) -> web.StreamResponse:
    """The bytes asked for, or with `torn` the first half of them."""
    stat = path.stat()
    span = request.http_range
    start, stop = span.start or 0, min(stat.st_size if span.stop is None else span.stop, stat.st_size)
    headers = {"ETag": f'"{stat.st_mtime_ns:x}"', "Last-Modified": formatdate(stat.st_mtime, usegmt=True)}
    headers |= {"Content-Length": str(stop - start), "Accept-Ranges": "bytes"}
    partial = "Range" in request.headers
    if partial:
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{stat.st_size}"
    response = web.StreamResponse(status=206 if partial else 200, headers=headers)
    await response.prepare(request)
    if request.method == "HEAD":
        return response
    with path.open("rb") as file:
        file.seek(start)
        await response.write(file.read((stop - start) // (2 if torn else 1)))
    if torn and request.transport:
        request.transport.abort()
    return response


def listing(folder: Path, request: web.Request) -> str:
    """The keys below a prefix; with a delimiter those directly below it, and the folders."""
    bucket = folder / request.path.strip("/").partition("/")[0]
    prefix, flat = request.query.get("prefix", ""), "delimiter" not in request.query
    keys, folders = list[str](), list[str]()
    for path in sorted(bucket.rglob("*")):
        key = str(path.relative_to(bucket))
        if not key.startswith(prefix) or (not flat and "/" in key[len(prefix) :]):
            continue
        if path.is_dir() and not flat:
            folders.append(f"<CommonPrefixes><Prefix>{escape(key)}/</Prefix></CommonPrefixes>")
        elif path.is_file():
            size = path.stat().st_size
            about = f"<Size>{size}</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
            keys.append(f"<Contents><Key>{escape(key)}</Key>{about}</Contents>")
    inside = "".join((*keys, *folders))
    return f"<ListBucketResult><IsTruncated>false</IsTruncated>{inside}</ListBucketResult>"


@contextlib.contextmanager
def serving(folder: Path, latency: float, faults: float) -> Iterator[tuple[dict[str, str], dict[str, int]]]:
    """A store for the block: the environment of its clients, and the counts of its requests, filled when it has ended."""
    command = [sys.executable, __file__, str(folder), "--latency", str(latency), "--faults", str(faults)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdin and process.stdout
    counts: dict[str, int] = {}
    try:
        yield environment(json.loads(process.stdout.readline())), counts
    finally:
        process.stdin.close()
        counts |= json.loads(process.stdout.readline() or "{}")
        process.wait()


def environment(port: int) -> dict[str, str]:
    return {
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
    }


async def serve(store: Store) -> None:
    """Until standard input ends; prints the port first, and the counts last."""
    app = web.Application()
    app.router.add_route("*", "/{any:.*}", store.handle)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    print(runner.addresses[0][1], flush=True)
    await asyncio.to_thread(sys.stdin.read)
    print(json.dumps(store.counts), flush=True)
    await runner.cleanup()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--latency", type=float, default=0.1)
    parser.add_argument("--faults", type=float, default=0.01)
    arguments = parser.parse_args()
    asyncio.run(serve(Store(arguments.folder, arguments.latency, arguments.faults)))
