"""Datasets of many clips to browse, made without a video a clip, and a server of one in a thread."""

from __future__ import annotations

import hashlib
import io
import secrets
import tarfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pyarrow as pa

from longtake.datasets import captions, clip, index, schema, storage, view
from longtake.infra.browse.server import listening, server_of

HOSTILE = '<script>document.title="taken"</script><img src=x onerror=alert(1)>'
LABELS = ("archery", "juggling", "surfing", None)
PORT, TOKEN = 8642, "the-token"  # of `client_of`
_ROWS = 25_000  # of a shard
_VIDEOS = 6


@dataclass(frozen=True)
class Server:
    """A server that runs.

    address  with the token
    """

    url: str
    token: str
    port: int

    @property
    def address(self) -> str:
        return f"{self.url}/?token={self.token}"


def client_of(library: Any, writable: bool = False, known: bool = True) -> Any:
    """A client of a library's server that needs no socket; it says where it comes from and, if `known`, has the token."""
    from starlette.testclient import TestClient

    from longtake.infra.browse.app import application

    url = f"http://127.0.0.1:{PORT}"
    client = TestClient(
        application(library, PORT, TOKEN, writable), url, follow_redirects=False, headers={"Origin": url}
    )
    if known:
        client.cookies.set(f"longtake-{PORT}", TOKEN)
    return client


def make_dataset(folder: Path | str, clips: int, val_fraction: float = 0.1, seed: int = 0) -> str:
    """A dataset of `clips` clips, at a path or URL, that share six videos in each shard, with sources, captions and two views, `calm` and `sharp`.

    Clip n of a split is "SOURCE-NNNNN"; scores are drawn at random. The source and the caption of clip 7 of train are HOSTILE.
    """
    random = np.random.default_rng(seed)
    dataset = str(folder)
    about = {"format": schema.FORMAT_VERSION, "clip": {"short_side": 48, "fps": 12}}
    storage.write(storage.join(dataset, "dataset.json"), storage.canonical_json(about))
    videos = [_video(n) for n in range(_VIDEOS)]
    val = round(clips * val_fraction)
    sources: list[dict[str, Any]] = []
    for split, count in (("train", clips - val), ("val", val)):
        for number, first in enumerate(range(0, count, _ROWS)):
            rows = min(_ROWS, count - first)
            sources += _write_shard(dataset, split, f"{number:05d}", videos, rows, random)
    table = index.rows_table(sources, schema.SOURCES)
    storage.write(storage.join(dataset, "sources", "train-00000.parquet"), index.to_parquet(table))
    for name, rule in (
        ("calm", {"motion": {"max": 0.5}}),
        ("sharp", {"sharpness": {"min": 0.3}, "still": {"max": 0.8}}),
    ):
        _write_view(dataset, name, rule)
    return dataset


def grow(dataset: str, clips: int = 40) -> None:
    """Add a shard of train."""
    _write_shard(dataset, "train", "00001", [_video(n) for n in range(_VIDEOS)], clips, np.random.default_rng(1))


def _video(number: int) -> tuple[bytes, int, int, int]:
    """An mp4 with a square that moves, its frames, height and width."""
    t, h, w = 24, (48, 64)[number % 2], (64, 48)[number % 2]
    video = np.full((t, h, w, 3), 40 * number, np.uint8)
    for n, frame in enumerate(video):
        frame[8 : 8 + h // 3, n : n + w // 3] = (250 - 40 * number, 200, 40 * number)
    with TemporaryDirectory() as spool:
        path = Path(spool) / "clip.mp4"
        clip.write(path, video, 12)
        return path.read_bytes(), t, h, w


def _write_shard(
    dataset: str,
    split: str,
    name: str,
    videos: list[tuple[bytes, int, int, int]],
    rows: int,
    random: np.random.Generator,
) -> list[dict[str, Any]]:
    """Write a tar, its index and its captions; returns rows of its sources."""
    tar, offsets = io.BytesIO(), []
    with tarfile.open(fileobj=tar, mode="w") as file:
        for n, (data, *_) in enumerate(videos):
            entry = tarfile.TarInfo(f"{n:05d}.mp4")
            entry.size = len(data)
            offsets.append(tar.tell() + 512)
            file.addfile(entry, io.BytesIO(data))
    storage.write(storage.join(dataset, split, f"{name}.tar"), tar.getvalue())

    scores = random.random((len(schema.SCORES), rows)).astype(np.float32)
    scores[1, ::11] = np.nan  # some have no value
    ids = [hashlib.sha256(f"{split}-{name}-{n // 100}".encode()).hexdigest()[:20] for n in range(rows)]
    digests = [hashlib.sha256(data).hexdigest() for data, *_ in videos]
    entries, said = [], []
    for n in range(rows):
        kind = n % len(videos)
        data, t, h, w = videos[kind]
        key = f"{ids[n]}-{n:05d}"
        place = {"mp4_offset": offsets[kind], "mp4_size": len(data), "mp4_crc32": 0, "json_offset": 0, "json_size": 0}
        facts = {"frame_count": t, "fps": 12.0, "width": w, "height": h, "label": LABELS[n % len(LABELS)]}
        row = {"key": key, "source": ids[n], "clip": n, "sha256": digests[kind], "first_frame": 24 * n, "phash": n}
        row |= {"json_crc32": 0, "start_seconds": 2.0 * n, **place, **facts}
        entries.append(
            row | {s: None if np.isnan(v) else float(v) for s, v in zip(schema.SCORES, scores[:, n], strict=True)}
        )
        hostile = split == "train" and name == "00000" and n == 7
        text = HOSTILE if hostile else f"a {('red', 'green', 'blue')[n % 3]} square moves, number {n}"
        said.append(captions.row_of(row, [captions.Caption(text)] if n % 5 else [], "none", ""))
    digest = hashlib.sha256(tar.getvalue()).hexdigest()
    index.write_index(
        storage.join(dataset, split, f"{name}.parquet"), entries, schema.INDEX, len(tar.getvalue()), digest
    )
    index.write_table(
        storage.join(dataset, split, f"{name}.caption-0123456789abcdef.parquet"), said, schema.CAPTION_INDEX
    )
    hostile_source = ids[0] if split == "train" and name == "00000" else None
    return [
        {
            "source": source,
            "uri": f"/footage/{HOSTILE if source == hostile_source else source}.mp4",
            "split": split,
            "status": "good",
            "clips": 100,
        }
        for source in dict.fromkeys(ids)
    ]


def _write_view(dataset: str, name: str, rules: dict[str, dict[str, float]]) -> None:
    tables = []
    for split in schema.SPLITS:
        clips = index.read_all(dataset, split)
        reasons = np.full(len(clips), None, object)
        for reason, broken in view.broken(clips, rules):
            reasons[broken & (reasons == None)] = reason  # noqa: E711
        tables.append(view.rows(split, clips["key"], reasons))
    view.write(storage.join(dataset, "views", f"{name}.parquet"), pa.concat_tables(tables), {})


@contextmanager
def serving(library: Any, writable: bool = False, port: int = 0) -> Iterator[Server]:
    """A server of a library, in a thread."""
    from longtake.infra.browse.app import application

    with listening(port) as listener:
        port, token = listener.getsockname()[1], secrets.token_urlsafe(32)
        server = server_of(application(library, port, token, writable))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield Server(f"http://127.0.0.1:{port}", token, port)
        finally:
            server.should_exit = True
            thread.join(10)


if __name__ == "__main__":
    # python tests/support/browsed.py FOLDER [CLIPS [PORT]]: make a dataset there if there is none, and serve it
    import sys

    import scored

    from longtake.infra.browse.library import load

    place = Path(sys.argv[1])
    if not (place / "dataset.json").exists():
        made = make_dataset(place, int(sys.argv[2]) if len(sys.argv) > 2 else 100_000)
        scored.write_columns(made, {"flow": {"camera": "number", "move": "label"}, "clip": {"vector": 64}})
    with serving(load(str(place)), True, int(sys.argv[3]) if len(sys.argv) > 3 else 0) as running:
        print(running.address, flush=True)
        threading.Event().wait()
