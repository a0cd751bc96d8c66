"""A target that cannot be written: one line that says what to do, and afterwards the run goes on."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from longtake.datasets.errors import Failure
from longtake.pipeline.stages import shard

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("ray_session"),
    pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="making a read-only disk needs root"),
]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(folder)]).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def remount(disk: Path, how: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{how}", str(disk)], check=True)


@pytest.mark.parametrize("begun", [False, True])
def test_a_read_only_target_is_one_line_and_the_run_can_go_on(
    begun: bool,
    disk: Path,
    tiny_videos: Path,
    tiny: Callable[[object], shard.Config],
    hashes: Callable[[object], dict[str, str]],
    tmp_path: Path,
) -> None:
    job, output = tiny(tiny_videos), disk / "out"
    shard.run(job, {}, str(tmp_path / "undisturbed"))
    if begun:
        shard.run(job, {}, str(output))
        (output / "train" / "00003.parquet").unlink()
        # what a dead writer left cannot be swept either
        (output / "train" / f".00003.tar~{os.uname().nodename}@999999999~ab.tmp").write_bytes(b"debris")
    remount(disk, "ro")
    try:
        with pytest.raises(Failure) as caught:
            shard.run(job, {}, str(output))
    finally:
        remount(disk, "rw")
    message = str(caught.value)
    assert "\n" not in message and str(output) in message
    assert "Read-only file system" in message and "choose a `workspace` that can be written" in message
    shard.run(job, {}, str(output))
    assert hashes(output) == hashes(tmp_path / "undisturbed")
