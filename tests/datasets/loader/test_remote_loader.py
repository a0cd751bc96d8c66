"""Loading from a store that is slow to please: with and without a cache, through storms, with shards that stay away."""

import contextlib
import functools
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

import fsspec
import pytest

from longtake.datasets import compact, index, storage
from longtake.datasets.cache import Cache
from longtake.datasets.errors import Failure
from longtake.datasets.loader import Loader, Mixture

WINDOW: dict[str, Any] = {
    "columns": ("video", "frame_diff", "latent-test", "label", "json"),
    "frames": 5,
    "size": (16, 16),
    "batch": 4,
    "epochs": 2,
}


class Store(fsspec.AbstractFileSystem):
    """Local files under another protocol; reads are counted by file and may be refused."""

    protocol = "stormy"
    reads: ClassVar[Counter[str]] = Counter()
    refuse: ClassVar[Callable[[str], bool]]

    def cat_file(self, path: str, start: int | None = None, end: int | None = None, **_: Any) -> bytes:
        Store.reads[Path(path).name] += 1
        if Store.refuse(path):
            raise OSError("503 slow down")
        return Path(path).read_bytes()[start:end]

    def ls(self, path: str, detail: bool = True, **_: Any) -> list[Any]:
        found = [
            {"name": str(p), "size": 0, "type": "directory" if p.is_dir() else "file"} for p in Path(path).iterdir()
        ]
        return found if detail else [entry["name"] for entry in found]

    def exists(self, path: str, **_: Any) -> bool:
        return Path(path).exists()


fsspec.register_implementation("stormy", Store, clobber=True)


@pytest.fixture(autouse=True)
def calm(monkeypatch: pytest.MonkeyPatch) -> None:
    """No faults to begin with, and waits a hundred times shorter."""
    Store.reads.clear()
    Store.refuse = staticmethod(lambda path: False)
    sleep = time.sleep
    monkeypatch.setattr(storage.time, "sleep", lambda seconds: sleep(seconds / 100))


def batches(loader: Any, count: int | None = None) -> list[Any]:
    """What batches hold, to be compared."""
    out = []
    for batch in islice(loader, count):
        tensors = [
            batch[name].numpy().tobytes() for name in ("video", "frame_diff", "latent", "label") if name in batch
        ]
        out.append((batch["key"], batch["epoch"], batch.get("part"), tensors))
    return out


@functools.cache
def local(small: str) -> list[Any]:
    return batches(Loader(small, **WINDOW))


@pytest.mark.parametrize("room", [None, 1 << 30, 200_000, 10])
def test_a_remote_dataset_gives_the_batches_of_a_local_one(small: str, tmp_path: Path, room: int | None) -> None:
    cache = Cache(str(tmp_path), room) if room else None
    assert batches(Loader(f"stormy://{small}", **WINDOW, cache=cache)) == local(small)
    kept = sum(path.stat().st_size for path in tmp_path.iterdir() if len(path.name) == 64)
    assert kept <= (room or 0)
    tars = [n for name, n in Store.reads.items() if name.endswith(".tar")]
    assert len(tars) == 15
    if room == 1 << 30:
        assert set(tars) == {1}  # each tar once, in one piece, for two epochs


def test_the_memory_filesystem_serves_a_mixture_too(small: str, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(small, "/mixed", recursive=True)

    def mixture(url: str, cache: Cache | None = None) -> Mixture:
        options: dict[str, Any] = {"size": (16, 16), "batch": 4, "cache": cache}
        return Mixture({"a": (Loader(url, frames=5, **options), 2), "b": (Loader(url, frames=1, **options), 1)})

    whole = batches(mixture(small), 30)
    assert batches(mixture("memory://mixed"), 30) == whole
    assert batches(mixture("memory://mixed", Cache(str(tmp_path), 1 << 30)), 30) == whole
    fs.rm("/mixed", recursive=True)


def test_the_next_blocks_shards_are_fetched_before_they_are_needed(
    handmade: Callable[..., str], tmp_path: Path
) -> None:
    root = handmade(tmp_path / "data", [[{}] for _ in range(40)])
    cache = Cache(str(tmp_path / "cache"), 1 << 30)
    loader = Loader(f"stormy://{root}", frames=5, size=(16, 16), batch=1, cache=cache)
    # the first of 40 samples, and 32 that wait: not yet the last block of 8
    first = next(stream := iter(loader))
    deadline = time.monotonic() + 20
    while len(list((tmp_path / "cache").glob("?" * 64))) < 40 and time.monotonic() < deadline:
        time.sleep(1)
    fetched = {name for name in Store.reads if name.endswith(".tar")}
    assert len(first["key"]) == 1 and len(fetched) == 40
    rest = list(islice(stream, 39))
    assert len(rest) == 39
    assert {n for name, n in Store.reads.items() if name.endswith(".tar")} == {1}


def test_a_storm_passes(small: str, tmp_path: Path) -> None:
    tries = Counter[int]()

    def refuse(path: str) -> bool:
        # each thread's first and second try, and so on
        tries[threading.get_ident()] += 1
        return tries[threading.get_ident()] % 3 != 0

    Store.refuse = staticmethod(refuse)
    assert batches(Loader(f"stormy://{small}", **WINDOW)) == local(small)
    assert batches(Loader(f"stormy://{small}", **WINDOW, cache=Cache(str(tmp_path), 1 << 30))) == local(small)


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_that_stays_away_stops_the_run_with_its_name(small: str, tmp_path: Path, cached: bool) -> None:
    Store.refuse = staticmethod(lambda path: path.endswith("00002.tar"))
    cache = Cache(str(tmp_path), 1 << 30) if cached else None
    with pytest.raises(Failure, match=r"train/00002\.tar: .*503 slow down") as caught:
        list(Loader(f"stormy://{small}", **WINDOW, cache=cache))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("cached", [False, True])
def test_a_shard_that_stays_away_may_be_skipped(
    small: str, tmp_path: Path, cached: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    Store.refuse = staticmethod(lambda path: path.endswith("00002.tar"))
    away = set(index.read_shard(small, "train", "00002").table["key"].to_pylist())
    cache = Cache(str(tmp_path), 1 << 30) if cached else None
    loader = Loader(f"stormy://{small}", **WINDOW | {"batch": 10}, cache=cache, unreadable="skip")
    seen = list(loader)
    assert len(seen) == 4 and all(len(b["key"]) == len(b["video"]) == 10 for b in seen)
    assert not away & {key for batch in seen for key in batch["key"]}
    assert loader.skipped == sum(b["skipped"] for b in seen) == 2 * len(away)
    lines = [line for line in capsys.readouterr().err.splitlines() if "skipped" in line]
    assert len(lines) == 8 and all(line.startswith("warning: ") and "00002.tar" in line for line in lines)
    # those that can be read are where they would have been
    for batch, (keys, *_) in zip(seen, batches(Loader(small, **WINDOW | {"batch": 10})), strict=True):
        assert batch["key"][: 10 - batch["skipped"]] == [key for key in keys if key not in away]


def test_nothing_readable_stops_even_where_samples_are_skipped(small: str) -> None:
    Store.refuse = staticmethod(lambda path: path.endswith("00002.tar"))
    with pytest.raises(Failure, match=r"00002\.tar"):
        list(Loader(f"stormy://{small}", **WINDOW | {"batch": 1}, unreadable="skip"))


def test_a_full_cache_disk_gives_the_same_batches(small: str, tmp_path: Path) -> None:
    compacted = tmp_path / "compacted"
    subprocess.run(["cp", "-r", small, str(compacted)], check=True)
    compact.write(str(compacted), "train")
    tiny = tmp_path / "tiny"
    tiny.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(tiny)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no tmpfs may be mounted here: {done.stderr.strip()}")
    try:
        (tiny / "other").write_bytes(bytes(60 << 10))
        for url in (small, str(compacted)):
            assert batches(Loader(f"stormy://{url}", **WINDOW, cache=Cache(str(tiny), 1 << 30))) == local(small)
    finally:
        subprocess.run(["umount", "-l", str(tiny)], check=True)


def test_a_cache_without_room_for_the_compact_file_does_without(
    small: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    compacted = tmp_path / "compacted"
    subprocess.run(["cp", "-r", small, str(compacted)], check=True)
    compact.write(str(compacted), "train")

    @contextlib.contextmanager
    def full(url: str) -> Iterator[Path]:
        raise Failure(f"{url}: No space left on device")
        yield

    monkeypatch.setattr(storage, "staged", full)
    cache = Cache(str(tmp_path / "cache"), 1 << 30)
    assert batches(Loader(f"stormy://{compacted}", **WINDOW, cache=cache)) == local(small)
    assert "warning: " in capsys.readouterr().err


class Quiet(SimpleHTTPRequestHandler):
    """Files with byte ranges; the first request of each range of a file is refused."""

    requests: ClassVar[list[str]] = []
    asked: ClassVar[set[tuple[str, str | None]]] = set()

    def do_GET(self) -> None:
        self.requests.append(self.path)
        path = Path(self.translate_path(self.path))
        wanted = (self.path, self.headers.get("Range"))
        if wanted not in self.asked:
            self.asked.add(wanted)
            return self.send_error(503)
        if path.is_dir():
            return super().do_GET()
        if not path.exists():
            return self.send_error(404)
        data, asked = path.read_bytes(), self.headers.get("Range")
        first, _, last = (asked or "bytes=0-").removeprefix("bytes=").partition("-")
        part = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206 if asked else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.end_headers()
        self.wfile.write(part)
        return None

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def served(small: str) -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=small))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    Quiet.requests.clear()
    Quiet.asked.clear()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()


def test_a_web_server_gives_the_same_batches(small: str, served: str, tmp_path: Path) -> None:
    cache = Cache(str(tmp_path), 1 << 30)
    assert batches(Loader(served, **WINDOW, cache=cache)) == local(small)
    tars = Counter(path for path in Quiet.requests if path.endswith(".tar"))
    assert len(tars) == 15 and max(tars.values()) < 5


@pytest.mark.slow
def test_worker_processes_share_what_a_web_server_gives(small: str, served: str, tmp_path: Path) -> None:
    whole = local(small)
    assert batches(Loader(served, **WINDOW, workers=2)) == whole
    Quiet.requests.clear()
    Quiet.asked.clear()
    assert batches(Loader(served, **WINDOW, workers=2, cache=Cache(str(tmp_path), 1 << 30))) == whole
    tars = Counter(path for path in Quiet.requests if path.endswith(".tar"))
    assert len(tars) == 15 and max(tars.values()) < 5
