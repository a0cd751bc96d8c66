"""More workers, more drivers, more nodes, and one node fewer: always the same bytes."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.datasets import index, schema
from longtake.datasets.verify import verify
from longtake.pipeline.stages import shard

pytestmark = pytest.mark.slow

Tiny = Callable[[object], shard.Config]
Hashes = Callable[[object], dict[str, str]]
Alone = Callable[[shard.Config, object], dict[str, str]]


def committed(output: Path) -> int:
    return sum(len(index.shard_names(str(output), split)) for split in schema.SPLITS)


@pytest.mark.soak
def test_any_number_of_workers_makes_the_same_bytes(
    drivers: Any, tiny_videos: Path, tiny: Tiny, hashes: Hashes, tmp_path: Path
) -> None:
    counts = (1, 2, 4)
    for workers in counts:
        drivers.run(tiny(tiny_videos), tmp_path / str(workers), TEST_CPUS=str(workers), **drivers.token)
    assert committed(tmp_path / "1") == 16
    assert all(hashes(tmp_path / "1") == hashes(tmp_path / str(workers)) for workers in counts)


@pytest.mark.soak
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
    output = tmp_path / "out"
    with drivers.cluster() as cluster:
        driver = drivers.start(tiny(tiny_videos), output, **cluster.environment)
        while committed(output) < 3 and driver.poll() is None:
            time.sleep(0.05)
        cluster.lose_node()
        assert committed(output) < 16
        drivers.finish(driver)
        assert hashes(output) == undisturbed
        assert not list(verify(str(output)))
