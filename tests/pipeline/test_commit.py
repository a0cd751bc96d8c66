"""The commit protocol: a kill at any of its steps, then the same group again."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from longtake.datasets import index, storage
from longtake.pipeline import discover
from longtake.pipeline.commit import make_group
from longtake.pipeline.config import CutConfig
from longtake.pipeline.stages import shard

SCRIPT = """
import json, os, signal, sys
from contextlib import contextmanager
from longtake.datasets import storage
from longtake.pipeline.commit import make_group
from longtake.pipeline.config import CutConfig

when, group, rows, folder, cut = json.loads(sys.argv[1])
plain, calls = storage.staged, 0

@contextmanager
def dying(url):
    global calls
    calls += 1
    if [calls, "before"] == when:
        os.kill(os.getpid(), signal.SIGKILL)
    with plain(url) as path:
        yield path
        if [calls, "during"] == when:
            path.write_bytes(path.read_bytes()[:700])
            os.kill(os.getpid(), signal.SIGKILL)
    if [calls, "after"] == when:
        os.kill(os.getpid(), signal.SIGKILL)

storage.staged = dying
print(json.dumps(make_group(group, rows, folder, CutConfig(**cut))))
"""


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.rglob("*") if p.is_file()
    }


@pytest.mark.parametrize("when", [(step, moment) for step in range(1, 8) for moment in ("before", "during", "after")])
def test_a_kill_at_any_step_of_a_commit_loses_and_doubles_nothing(
    when: tuple[int, str], footage: Path, tmp_path: Path, committed: dict[str, str]
) -> None:
    arguments = group_of(footage, tmp_path)
    command = [sys.executable, "-P", "-c", SCRIPT, json.dumps([when, *arguments])]
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == -9
    whole = index.shard_names(str(tmp_path), "train")
    # the index is the seventh file, and the tar exists from then on, not a moment earlier
    assert whole == (["00000"] if when == (7, "after") else [])
    for part in ("train", "sources"):
        storage.sweep(str(tmp_path / part))
    assert made_again(*arguments)["error"] == ""
    assert hashes(tmp_path) == committed


def group_of(footage: Path, folder: Path) -> tuple[Any, ...]:
    """What `make_group` needs to make a group of one video, as plain data."""
    config = shard.Config(kind="shard", sources=["x"], clip={"short_side": 32, "fps": 6, "max_seconds": 3})
    (found,) = (row for batch in discover.find([str(sorted(footage.glob("*.mp4"))[0])]) for row in batch.to_pylist())
    del found["etag"]
    row = {"source": "ab" * 10, "split": "train", "group": 0, "duplicate_of": None} | found
    return {"split": "train", "group": 0}, [row], str(folder), config.cut.model_dump(mode="json")


def made_again(group: Any, rows: Any, folder: str, cut: Any) -> dict[str, Any]:
    return make_group(group, rows, folder, CutConfig(**cut))


@pytest.fixture(scope="module")
def committed(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("undisturbed")
    assert made_again(*group_of(footage, folder))["error"] == ""
    return hashes(folder)
