"""The commit protocol: a kill at any of its steps, then the same group again."""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from longtake.datasets import index, schema, storage
from longtake.pipeline import column as columns
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


@pytest.mark.parametrize("late", [b"other", b"the same"])
def test_a_shard_of_a_column_that_another_worker_commits_first_stays(dataset: str, tmp_path: Path, late: bytes) -> None:
    """Values differ in their last bits between processors."""
    copy = str(shutil.copytree(dataset, tmp_path / "dataset"))
    base = index.read_shard(copy, "train", "00000")
    keys = base.table["key"].to_pylist()

    def commit(value: bytes, meanwhile: Callable[[], Any] = lambda: None) -> int:
        def members() -> Iterator[tuple[str, dict[str, bytes]]]:
            yield keys[0], {"npy": value}
            meanwhile()
            yield from ((key, {"npy": value}) for key in keys[1:])

        return columns.commit(copy, base, "x", members(), lambda row: {}, schema.COLUMN_INDEX, {})

    size = commit(late, lambda: commit(b"the same"))
    shard = index.read_shard(copy, "train", "00000.x")
    tar = (tmp_path / "dataset" / "train" / "00000.x.tar").read_bytes()
    assert shard.tar_sha256 == hashlib.sha256(tar).hexdigest() and size == shard.tar_bytes == len(tar)
    assert b"other" not in tar
    assert not list((tmp_path / "dataset" / "train").glob(".*"))
