"""Kills, a hundred in the soak: workers, their decoders and drivers die at random moments, and the dataset is the same."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest

from longtake.datasets import index
from longtake.datasets.verify import verify
from longtake.infra.footage import write_video
from longtake.pipeline.stages import shard

pytestmark = pytest.mark.slow

SCRIPT = """
import atexit, os, sys
from longtake.pipeline.stages import shard
if __name__ == "__main__":
    shard.run(shard.Config.model_validate_json(sys.argv[1]), {}, sys.argv[2])
    # as the command ends: a thread of Ray's that waits for an interpreter which is unloaded aborts the process
    atexit._run_exitfuncs()
    os._exit(0)
"""


def start(config: shard.Config, output: Path) -> subprocess.Popen[bytes]:
    environment = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    command = [sys.executable, "-P", "-c", SCRIPT, config.model_dump_json(), str(output)]
    return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.DEVNULL)


def victims(driver: int) -> list[tuple[str, psutil.Process]]:
    """The processes that do the work, each with what it is: Ray's workers and our decoders."""
    found = []
    for process in psutil.Process(driver).children(recursive=True):
        try:
            line = " ".join(process.cmdline())
        except psutil.Error:
            continue
        if "ray::" in line or "longtake.pipeline.isolate" in line:
            found.append(("worker" if "ray::" in line else "decoder", process))
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("kills", "videos"), [(10, 20), pytest.param(100, 60, marks=pytest.mark.soak)])
def test_kills_lose_double_and_tear_nothing(tmp_path: Path, kills: int, videos: int) -> None:
    rng = np.random.default_rng(0)
    (tmp_path / "videos").mkdir()
    for n in range(videos):
        picture = rng.integers(40, 200, (48, 64, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
        write_video(tmp_path / "videos" / f"{n}.mp4", (np.roll(picture, t, 1) for t in range(40)), 20)
    clip = {"short_side": 64, "fps": 20, "max_seconds": 1}
    config = shard.Config(
        kind="shard", sources=[str(tmp_path / "videos")], clip=clip, val_fraction=0.2, group_sources=1
    )
    assert start(config, tmp_path / "undisturbed").wait() == 0

    chance = random.Random(1)
    output, killed, drivers = tmp_path / "chaos", Counter[str](), 0
    deadline = time.time() + 900
    while killed.total() < kills and time.time() < deadline:
        driver, drivers = start(config, output), drivers + 1
        # as Ray comes up, or as the first videos are cut
        first = {"worker", "decoder"} if drivers % 2 else {"decoder"}
        while driver.poll() is None and not first & {kind for kind, _ in victims(driver.pid)}:
            time.sleep(0.05)
        last, share = time.time() + chance.uniform(2, 10), min(killed.total() + kills // 5, kills - 1)
        while driver.poll() is None and time.time() < last and killed.total() < share:
            time.sleep(chance.uniform(0.02, 0.2))
            # a decoder dies with its worker; killed alone, its source counts as one that crashes decoders
            if found := [process for kind, process in victims(driver.pid) if kind == "worker"]:
                chance.choice(found).kill()
                killed["worker"] += 1
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
            driver.wait()
            killed["driver"] += 1
        if sum(len(index.shard_names(str(output), s)) for s in ("train", "val")) == videos and killed.total() < kills:
            # all done before the last kill: take some away, as a crash between tar and index would
            for path in sorted((output / "train").glob("?????.parquet"))[::2]:
                path.unlink()
    assert killed.total() >= kills and drivers > 3, (killed, drivers)
    assert killed["worker"] and killed["driver"], killed
    assert start(config, output).wait() == 0
    assert hashes(output) == hashes(tmp_path / "undisturbed")
    assert not list(verify(str(output)))
