"""The simulations of scale at a small size: they accept what is right, and notice what is not."""

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from longtake.datasets import schema
from longtake.datasets.loader import order
from longtake.pipeline import retry
from longtake.pipeline.commit import make_group
from longtake.pipeline.stages import shard

BENCHMARKS = Path(__file__).resolve().parent / "benchmarks"


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Any]:
    """Imports a program of the benchmarks."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module


def test_all_ranks_see_what_one_process_sees(
    program: Callable[[str], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program("bench_open").make(str(tmp_path), 40, 4000)
    measure = program("scale_ranks").measure
    taken = measure(str(tmp_path), world=10, batch=4)
    assert len(taken["open"]) == len(taken["first"]) == 10 and len(taken["memory"]) == 2
    # ranks that have the samples of others
    monkeypatch.setattr(order, "rank_slice", lambda rows, rank, world: rows.reshape(world, -1)[rank // 2])
    with pytest.raises(AssertionError, match="rank 1 has another share"):
        measure(str(tmp_path), world=10, batch=4)


def test_ranks_on_a_late_and_failing_store_see_what_is_in_its_folder(tmp_path: Path) -> None:
    # in a process of its own: workers have the environment in which the first of a process was started
    script = (
        "import json, sys\nfrom pathlib import Path\nimport scale_store as store\nfolder = Path(sys.argv[1])\n"
        "store.make(folder, 2, 8)\n"
        "settings = dict(steps=12, ranks=2, batch=2, workers=1, seconds=0.0, latency=0.01, faults=0.2)\n"
        "print(json.dumps(store.measure(folder, **settings)))"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    done = subprocess.run(
        command, cwd=BENCHMARKS, env=os.environ | {"PYTHONPATH": str(BENCHMARKS)}, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    found = json.loads(done.stdout)
    counts = found["counts"]
    assert len(found["waits"]) == 11
    assert counts["503"] and counts["500"] and counts["torn"] and counts["requests"] > 12 * 2 * 2


def test_a_group_that_is_lost_or_torn_is_noticed(program: Callable[[str], Any], tmp_path: Path) -> None:
    nodes = program("scale_nodes")
    nodes.make(tmp_path, 6)
    config, output = nodes.config_of(tmp_path), str(tmp_path / "out")
    shard.describe(config, output)
    for group in shard.plan(output, config.sources, config.val_fraction, config.group_bytes, config.group_sources):
        assert not make_group(group, shard.sources_of(output, group), output, config.cut)["error"]
    retry.record(output)
    nodes.check(output, 6)

    (split, first), *_ = [(s, p) for s in schema.SPLITS for p in sorted(Path(output, s).glob("?????.tar"))]
    debris = first.with_name(f".{first.name}~host@1~00.tmp")
    debris.touch()
    with pytest.raises(AssertionError):
        nodes.check(output, 6)
    debris.unlink()
    first.with_suffix(".frame_diff.tar").unlink()
    with pytest.raises(AssertionError):
        nodes.check(output, 6)
    Path(output, split, f"{first.stem}.parquet").unlink()
    with pytest.raises(AssertionError):
        nodes.check(output, 6)


@pytest.mark.soak
@pytest.mark.timeout(1200)
def test_a_node_lost_amid_hundreds_of_groups_loses_and_doubles_none(
    program: Callable[[str], Any], tmp_path: Path
) -> None:
    nodes = program("scale_nodes")
    nodes.make(tmp_path, 300)
    found = nodes.measure(tmp_path, 300)
    assert found["seconds"] > 0 and found["memory"] > 0
