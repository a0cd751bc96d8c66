"""Shared by the tests that kill: tiny videos, drivers in processes of their own, an S3 server with faults."""

import contextlib
import hashlib
import io
import os
import random
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from answering import Web
from drivers import Drivers

from longtake.datasets import storage
from longtake.infra.footage import write_video
from longtake.pipeline import retry
from longtake.pipeline.commit import make_group
from longtake.pipeline.stages import shard


@pytest.fixture(scope="session")
def tiny_videos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with 16 videos of one second."""
    folder = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for n in range(16):
        picture = rng.integers(40, 200, (48, 64, 3), dtype=np.uint8)
        write_video(folder / f"{n}.mp4", (np.roll(picture, t, 1) for t in range(20)), 20)
    return folder


@pytest.fixture
def web(tiny_videos: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Web]:
    monkeypatch.setattr("time.sleep", lambda _: None)
    server = Web(tiny_videos)
    yield server
    server.close()


@pytest.fixture(scope="session")
def tiny() -> Callable[[object], shard.Config]:
    """The job that makes one clip and one group of each tiny video."""

    def config(sources: object) -> shard.Config:
        clip = {"short_side": 32, "fps": 10, "max_seconds": 1}
        return shard.Config(kind="shard", sources=[str(sources)], clip=clip, val_fraction=0.2, group_sources=1)

    return config


@pytest.fixture
def drivers() -> Iterator[Drivers]:
    # a short name: Ray puts sockets below, whose paths may have 107 characters
    scratch = Path(tempfile.mkdtemp(prefix="lt"))
    running = Drivers(scratch)
    try:
        yield running
    finally:
        left = running.close()
        shutil.rmtree(scratch, ignore_errors=True)
    assert not left


@pytest.fixture(scope="session")
def victims() -> Callable[[int], list[psutil.Process]]:
    def find(driver: int) -> list[psutil.Process]:
        """The processes that do the work: Ray's workers. A decoder dies with its worker; alone, its source is rejected."""
        found = []
        with contextlib.suppress(psutil.Error):
            for process in psutil.Process(driver).children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    if "ray::" in " ".join(process.cmdline()):
                        found.append(process)
        return found

    return find


@pytest.fixture(scope="session")
def planned() -> Callable[[shard.Config, str], list[tuple[Any, ...]]]:
    def plan(config: shard.Config, output: str) -> list[tuple[Any, ...]]:
        """Begin a dataset; returns the arguments of `make_group` for each of its groups."""
        shard.describe(config, output)
        groups = shard.plan(output, config.sources, config.val_fraction, config.group_bytes, config.group_sources)
        return [(group, shard.sources_of(output, group), output, config.cut) for group in groups]

    return plan


@pytest.fixture(scope="session")
def made_alone(
    planned: Callable[[shard.Config, str], list[tuple[Any, ...]]], hashes: Callable[[object], dict[str, str]]
) -> Callable[[shard.Config, object], dict[str, str]]:
    def make(config: shard.Config, output: object) -> dict[str, str]:
        """The hashes of a dataset that this process makes group by group: no Ray, no faults, no kills."""
        for arguments in planned(config, str(output)):
            assert not make_group(*arguments)["error"]
        retry.record(str(output))
        return hashes(output)

    return make


@pytest.fixture(scope="session")
def hashes() -> Callable[[object], dict[str, str]]:
    def of(url: object) -> dict[str, str]:
        """The sha256 of every file below a folder or a prefix, hidden ones too."""
        fs, root = storage.filesystem(str(url))
        fs.invalidate_cache()
        names = {path: path.removeprefix(root).lstrip("/") for path in fs.find(root)}
        return {name: hashlib.sha256(fs.cat_file(path)).hexdigest() for path, name in names.items()}

    return of


@pytest.fixture
def shut(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], None]:
    """Makes a folder one that may be neither listed nor entered: root would be let in by its mode alone."""

    def close(folder: Path) -> None:
        for name in ("scandir", "listdir", "stat", "lstat"):
            monkeypatch.setattr(os, name, partial(refused, folder, getattr(os, name), name.endswith("stat")))

    def refused(folder: Path, call: Any, inside: bool, path: Any = ".", *args: Any, **options: Any) -> Any:
        known = isinstance(path, str | Path)
        if known and folder in (Path(path).parents if inside else (Path(path), *Path(path).parents)):
            raise PermissionError(13, "Permission denied", str(path))
        return call(path, *args, **options)

    return close


class FaultyS3:
    """An S3 server in front of which requests fail in bursts and answers are late, while `faults` is set.

    A request that fails was either never carried out, or carried out and its answer lost.
    """

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app
        from werkzeug.serving import WSGIRequestHandler, make_server

        class Quiet(WSGIRequestHandler):
            def log(self, *_: object) -> None:
                pass

        self.faults = False
        self.counts = Counter[str]()
        self._chance, self._burst = random.Random(2), 0
        self._lock, self._store = threading.Lock(), threading.Lock()
        self._app = DomainDispatcherApplication(create_backend_app)
        self._server = make_server("127.0.0.1", 0, self._handle, threaded=True, request_handler=Quiet)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.environment = {
            "AWS_ACCESS_KEY_ID": "a",
            "AWS_SECRET_ACCESS_KEY": "b",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self._server.server_port}",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def _handle(self, environ: dict[str, Any], start_response: Any) -> Iterable[bytes]:
        length = int(environ.get("CONTENT_LENGTH") or 0)
        whole = environ.get("wsgi.input_terminated", False)
        with contextlib.suppress(OSError):
            body = environ["wsgi.input"].read() if whole else environ["wsgi.input"].read(length)
        with self._lock:
            self.counts["requests"] += 1
            if not whole and len(body) < length:
                # a real store keeps nothing of an upload that breaks off
                self.counts["torn"] += 1
                start_response("400 Bad Request", [("Content-Length", "0")])
                return []
            fails, lost, late = self._fate()
        if late:
            time.sleep(0.3)
        if not fails or lost:
            answer = self._carry_out(environ | {"wsgi.input": io.BytesIO(body)})
        if fails:
            error = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
            start_response("503 Slow Down", [("Content-Length", str(len(error))), ("Content-Type", "application/xml")])
            return [] if environ["REQUEST_METHOD"] == "HEAD" else [error]
        status, headers, data = answer
        start_response(status, headers)
        return [data]

    def _fate(self) -> tuple[bool, bool, bool]:
        if not self.faults:
            return False, False, False
        if not self._burst and self._chance.random() < 0.06:
            self._burst = self._chance.randint(1, 4)
        fails, late = self._burst > 0, self._chance.random() < 0.05
        self._burst -= fails
        lost = fails and self._chance.random() < 0.3
        self.counts.update(failed=fails, lost=lost, late=late)
        return fails, lost, late

    def _carry_out(self, environ: dict[str, Any]) -> tuple[str, list[tuple[str, str]], bytes]:
        said: list[Any] = []
        # moto looks whether a key is there and then writes it: a real store does both at once
        with self._store if environ["REQUEST_METHOD"] != "GET" else contextlib.nullcontext():
            answer = self._app(environ, lambda *head, **_: said.extend(head[:2]))
            data = b"".join(answer)
        return said[0], said[1], data

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


@pytest.fixture(scope="module")
def s3_server() -> Iterator[FaultyS3]:
    """A server with s3://raw and s3://lake, both empty; this process and its children reach it."""
    from moto.backends import get_backend
    from s3fs import S3FileSystem

    server = FaultyS3()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        # s3fs keeps one client for all of a process, whatever server the environment names by now
        S3FileSystem.clear_instance_cache()
        # nor of what another server in this process has been given
        get_backend("s3").reset()
        try:
            fs = storage.filesystem("s3://raw")[0]
            for bucket in ("raw", "lake"):
                fs.mkdir(bucket)
            yield server
        finally:
            S3FileSystem.clear_instance_cache()
            server.close()
            get_backend("s3").reset()


@pytest.fixture(scope="module")
def s3(s3_server: FaultyS3, tiny_videos: Path) -> FaultyS3:
    """The server with the tiny videos in s3://raw."""
    storage.filesystem("s3://raw")[0].put([str(p) for p in sorted(tiny_videos.iterdir())], "raw/")
    return s3_server
