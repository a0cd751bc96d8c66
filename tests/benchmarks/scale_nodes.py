"""A `shard` stage of many small groups on a cluster of three raylets, one of which is lost in the middle."""

import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np

from longtake.datasets import index, schema, storage
from longtake.infra.footage import write_video
from longtake.pipeline.stages import shard

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "support"))

from drivers import Drivers

CLIP = {"short_side": 32, "fps": 8, "max_seconds": 1}
_NAMES = ("tar", "parquet", "frame_diff.tar", "frame_diff.parquet")  # what a group of a split has


def measure(folder: Path, groups: int) -> dict[str, float]:
    """Seconds of the stage, as `seconds`, and the driver's peak of memory in GB, as `memory`.

    A head without CPUs and two nodes with one each, of which the one at work is killed with all its processes when a third
    of the groups is committed, for good.

    Raises:
        AssertionError: a group or a source is missing, twice, or half there; or the stage ended before the loss.
    """
    config, output, peak = config_of(folder), str(folder / "out"), 0.0
    # a short name: Ray puts sockets below, whose paths may have 107 characters
    scratch = Path(tempfile.mkdtemp(prefix="lt"))
    drivers, lost_at = Drivers(scratch), 0
    try:
        with drivers.cluster() as cluster:
            begun = time.perf_counter()
            driver = drivers.start(config, output, **cluster.environment)
            while driver.poll() is None:
                peak = max(peak, _peak(driver.pid))
                if not lost_at and (done := _committed(output)) >= groups // 3:
                    cluster.lose_node()
                    lost_at = done
                time.sleep(0.5)
            seconds = time.perf_counter() - begun
            drivers.finish(driver)
    finally:
        drivers.close()
        shutil.rmtree(scratch, ignore_errors=True)
    assert 0 < lost_at < groups, f"the node was lost at {lost_at} of {groups} groups"
    check(output, groups)
    return {"seconds": seconds, "memory": peak}


def config_of(folder: Path) -> shard.Config:
    """One video a group, without sound."""
    sources = (str(folder / "videos"),)
    return shard.Config(kind="shard", sources=sources, clip=CLIP, audio=None, val_fraction=0.1, group_sources=1)


def make(folder: Path, count: int) -> None:
    """Videos of a second, which differ by a note behind them."""
    (folder / "videos").mkdir()
    picture = np.random.default_rng(0).integers(40, 200, (32, 48, 3), dtype=np.uint8)
    write_video(folder / "one.mp4", (np.roll(picture, t, 1) for t in range(8)), 8)
    data = (folder / "one.mp4").read_bytes()
    for number in range(count):
        note = f"{number:08d}".encode()
        (folder / "videos" / f"{number}.mp4").write_bytes(data + (8 + len(note)).to_bytes(4, "big") + b"free" + note)


def check(output: str, groups: int) -> None:
    """Raise AssertionError unless each group is committed once and whole, with its one source and clip."""
    totals = index.summary(output)
    assert totals["sources"] == totals["sources_good"] == totals["clips"] == totals["shards"] == groups, totals
    keys, files = Counter[str](), 0
    for split in schema.SPLITS:
        names = index.shard_names(output, split)
        # no temporary file of a lost worker, and no shard without an index
        assert set(storage.names(f"{output}/{split}")) == {f"{name}.{ending}" for name in names for ending in _NAMES}
        keys.update(index.read_all(output, split)["key"].to_pylist())
        files += len(names)
    assert files == len(keys) == groups and set(keys.values()) == {1}


def _committed(output: str) -> int:
    return sum(len(index.shard_names(output, split)) for split in schema.SPLITS)


def _peak(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/status").read_text().partition("VmHWM:")[2].split()[0]) / 1e6
    except (OSError, IndexError):
        return 0.0  # it has just ended
