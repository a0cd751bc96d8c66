"""Twenty kills of a training of two processes, resumed each time on another world and other workers: no sample is lost or doubled."""

import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from longtake.datasets import clip, index, schema, storage
from longtake.datasets.loader import Loader
from longtake.datasets.shard import sha256_of, write_tar

pytestmark = pytest.mark.slow

KILLS, TARS, CLIPS, BATCH = 20, 5, 96, 4
LOADER: dict[str, Any] = {"frames": 5, "size": (16, 16), "batch": BATCH, "epochs": 2, "seed": 7}

# Forks the ranks of each round from a process that has imported torch: kills are as real, and a start takes no seconds.
SCRIPT = """
import json, os, signal, sys, time
from pathlib import Path
from longtake.datasets import storage
from longtake.datasets.loader import Loader

dataset, folder, options = sys.argv[1], Path(sys.argv[2]), json.loads(sys.argv[3])
options["size"] = tuple(options["size"])
state_file = folder / "state.json"

def state():
    return json.loads(state_file.read_text()) if state_file.exists() else None

def train(number, rank, world, workers):
    loader = Loader(dataset, rank=rank, world=world, workers=workers, **options)
    found = state()
    if found:
        loader.load_state_dict(found)
    logs = [folder / f"{number:02d}.{r}.log" for r in range(world)]
    with logs[rank].open("a") as log:
        for done, batch in enumerate(loader, 1):
            after = loader.state_dict()
            log.write(json.dumps([after["taken"] - 1, batch["epoch"], rank, world, batch["key"]]) + "\\n")
            log.flush()
            time.sleep(0.004)
            if rank == 0:
                while any(not p.exists() or p.read_bytes().count(b"\\n") < done for p in logs):
                    time.sleep(0.001)
                storage.write(str(state_file), json.dumps(after).encode())
            else:
                while (state() or {"taken": 0})["taken"] < after["taken"]:
                    time.sleep(0.001)
    (folder / f"finished.{rank}").touch()

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
print("ready", flush=True)
for line in sys.stdin:
    number, world, workers = json.loads(line)
    pids = []
    for rank in range(world):
        pid = os.fork()
        if not pid:
            os.setsid()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
            try:
                train(number, rank, world, workers)
            except BaseException as e:
                (folder / f"error.{number}.{rank}").write_text(repr(e))
                raise
            finally:
                os._exit(0)
        pids.append(pid)
    print(json.dumps(pids), flush=True)
"""


def make_dataset(folder: Path) -> str:
    """A dataset of many clips of the same few pixels."""
    clip.write(folder / "clip.mp4", np.random.default_rng(0).integers(0, 256, (9, 16, 16, 3), np.uint8), 4)
    mp4 = (folder / "clip.mp4").read_bytes()
    for tar in range(TARS):
        path = folder / "train" / f"{tar:05d}.tar"
        path.parent.mkdir(exist_ok=True)
        keys = [f"{zlib.crc32(bytes([tar, n])):020x}-00000" for n in range(CLIPS)]
        members = write_tar(path, [(k, {"mp4": mp4, "json": json.dumps({"key": k}).encode()}) for k in keys])
        rows = []
        for key, video, text in zip(keys, members[::2], members[1::2], strict=True):
            row = dict.fromkeys(schema.INDEX.names) | {
                "key": key,
                "source": key[:20],
                "clip": 0,
                "sha256": video.sha256,
            }
            row |= {"mp4_offset": video.offset, "mp4_size": video.size, "mp4_crc32": video.crc32}
            row |= {"json_offset": text.offset, "json_size": text.size, "json_crc32": text.crc32}
            row |= {"first_frame": 0, "start_seconds": 0.0, "frame_count": 9, "fps": 4.0, "width": 16, "height": 16}
            rows.append(row)
        url = str(path.with_suffix(".parquet"))
        index.write_index(url, rows, schema.INDEX, path.stat().st_size, sha256_of(path))
    description = {"format": schema.FORMAT_VERSION, "clip": {"short_side": 16, "fps": 4}}
    storage.write(str(folder / "dataset.json"), storage.canonical_json(description))
    return str(folder)


@contextmanager
def trainer(dataset: str, folder: Path) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-P", "-c", SCRIPT, dataset, str(folder), json.dumps(LOADER)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stdout.readline() == "ready\n"
        yield process
    finally:
        process.kill()
        process.wait()


@contextmanager
def ranks(process: subprocess.Popen[str], *job: int) -> Iterator[None]:
    """A round of training, as (number, world, workers); in the end its process groups are killed, workers and all."""
    assert process.stdin and process.stdout
    process.stdin.write(json.dumps(job) + "\n")
    process.stdin.flush()
    groups = json.loads(process.stdout.readline())
    try:
        yield
    finally:
        for group in groups:
            # a moment later it is the leader of its group; or it has ended
            while alive(group):
                with suppress(ProcessLookupError):
                    os.killpg(group, signal.SIGKILL)
                time.sleep(0.001)


def alive(pid: int) -> bool:
    with suppress(ProcessLookupError):
        os.kill(pid, 0)
        return True
    return False


def taken(folder: Path) -> int:
    file = folder / "state.json"
    return json.loads(file.read_text())["taken"] if file.exists() else 0


def wait(folder: Path, until: Any) -> None:
    """Until it is so. A rank that failed ends the test."""
    deadline = time.monotonic() + 60
    while not until():
        errors = [p.read_text() for p in folder.glob("error.*")]
        assert not errors and time.monotonic() < deadline, errors
        time.sleep(0.002)


def test_twenty_kills_lose_and_double_no_sample(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    folder = tmp_path / "training"
    folder.mkdir()
    whole = [(batch["epoch"], batch["key"]) for batch in Loader(dataset, **LOADER)]
    steps = 2 * TARS * CLIPS // BATCH
    assert len(whole) == steps
    rng = random.Random(0)
    with trainer(dataset, folder) as process:
        for number in range(KILLS):
            # workers take seconds to start
            world, workers = {4: (1, 3), 13: (2, 3)}.get(number, (rng.choice([1, 2]), 0))
            with ranks(process, number, world, workers):
                # at some steps on, or while it starts
                goal = taken(folder) + (rng.randint(0, 14) if number % 7 else 0)
                wait(folder, lambda goal=goal: taken(folder) >= goal)
                time.sleep(rng.uniform(0, 0.03))
            assert taken(folder) < steps, f"it ended before kill {number}"
        with ranks(process, KILLS, 2, 0):
            wait(folder, lambda: all((folder / f"finished.{rank}").exists() for rank in range(2)))
    assert taken(folder) == steps
    check(folder, whole)


def check(folder: Path, whole: list[tuple[int, list[str]]]) -> None:
    """Whether what the rounds saw is what a run without kills does."""
    rebuilt: dict[int, list[str]] = {}
    again = 0
    for number in range(KILLS + 1):
        shares: dict[int, dict[int, list[str]]] = {}
        for log in sorted(folder.glob(f"{number:02d}.*.log")):
            for line in log.read_text().splitlines(keepends=True):
                if not line.endswith("\n"):
                    continue  # torn by the kill, before it counted
                step, epoch, rank, world, keys = json.loads(line)
                share = slice(rank * BATCH // world, (rank + 1) * BATCH // world)
                assert (epoch, keys) == (whole[step][0], whole[step][1][share])
                shares.setdefault(step, {})[rank] = keys
        for step, parts in shares.items():
            keys = [key for rank in sorted(parts) for key in parts[rank]]
            if len(keys) == BATCH:
                again += step in rebuilt
                assert rebuilt.setdefault(step, keys) == keys
    assert sorted(rebuilt) == list(range(len(whole)))
    assert [rebuilt[step] for step in range(len(whole))] == [keys for _, keys in whole]
    for epoch in range(2):
        keys = [key for step, (e, _) in enumerate(whole) if e == epoch for key in rebuilt[step]]
        assert len(keys) == len(set(keys)) == TARS * CLIPS
    # some kills fell between a step and its saved state
    assert again
