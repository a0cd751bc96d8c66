"""More workers, more drivers, more nodes, and one node fewer: always the same bytes."""

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from longtake.datasets import index, schema
from longtake.datasets.verify import verify
from longtake.pipeline.stages import shard

pytestmark = pytest.mark.slow

Tiny = Callable[[object], shard.Config]
Hashes = Callable[[object], dict[str, str]]
Alone = Callable[[shard.Config, object], dict[str, str]]

# a head without CPUs and two nodes with one each; ends when its standard input does
CLUSTER = """
import json, sys
import ray
from ray.cluster_utils import Cluster
small = {"object_store_memory": 100 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


def committed(output: Path) -> int:
    return sum(len(index.shard_names(str(output), split)) for split in schema.SPLITS)


@pytest.mark.parametrize("counts", [(1, 2), pytest.param((1, 2, 4), marks=pytest.mark.soak)])
def test_any_number_of_workers_makes_the_same_bytes(
    drivers: Any, tiny_videos: Path, tiny: Tiny, hashes: Hashes, tmp_path: Path, counts: tuple[int, ...]
) -> None:
    for workers in counts:
        drivers.run(tiny(tiny_videos), tmp_path / str(workers), TEST_CPUS=str(workers), **drivers.token)
    assert committed(tmp_path / "1") == 16
    assert all(hashes(tmp_path / "1") == hashes(tmp_path / str(workers)) for workers in counts)


def test_two_drivers_at_once_on_a_disk_make_one_dataset(
    drivers: Any, tiny_videos: Path, tiny: Tiny, hashes: Hashes, made_alone: Alone, tmp_path: Path
) -> None:
    undisturbed = made_alone(tiny(tiny_videos), tmp_path / "one")
    drivers.finish(*[drivers.start(tiny(tiny_videos), tmp_path / "two") for _ in range(2)])
    assert hashes(tmp_path / "two") == undisturbed
    assert not list(verify(str(tmp_path / "two")))


def test_a_cluster_that_loses_a_node_ends_with_the_same_bytes(
    drivers: Any, tiny_videos: Path, tiny: Tiny, hashes: Hashes, made_alone: Alone, tmp_path: Path
) -> None:
    undisturbed = made_alone(tiny(tiny_videos), tmp_path / "undisturbed")
    checks = {"period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3", "initial_delay_ms": "1000"}
    quick = drivers.token | {f"RAY_health_check_{name}": value for name, value in checks.items()}
    output = tmp_path / "out"
    cluster = drivers.script(CLUSTER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **quick)
    try:
        said = json.loads(cluster.stdout.readline())
        driver = drivers.start(tiny(tiny_videos), output, RAY_ADDRESS=said["address"], **quick)
        while committed(output) < 3 and driver.poll() is None:
            time.sleep(0.05)
        # the node at work with all that runs on it, at once
        raylet = max((psutil.Process(pid) for pid in said["raylets"]), key=lambda p: len(p.children(recursive=True)))
        node = [raylet, *raylet.children(recursive=True)]
        assert any("ray::" in " ".join(p.cmdline()) for p in node)
        for process in node:
            process.send_signal(signal.SIGKILL)
        assert committed(output) < 16
        drivers.finish(driver)
        assert hashes(output) == undisturbed
        assert not list(verify(str(output)))
    finally:
        cluster.stdin.close()
        try:
            cluster.wait(timeout=60)
        except subprocess.TimeoutExpired:
            drivers.kill(cluster)
