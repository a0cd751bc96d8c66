import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError


def test_a_failed_write_leaves_neither_the_file_nor_debris(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), storage.staged(str(tmp_path / "a")) as path:
        path.write_bytes(b"half")
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("root", ["local", "memory://longtake-storage"])
def test_of_many_writers_if_absent_exactly_one_wins(tmp_path: Path, root: str) -> None:
    url = storage.join(str(tmp_path) if root == "local" else root, "claim")
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: storage.write_if_absent(url, str(n).encode()), range(32)))
    assert sum(won) == 1
    assert storage.read(url) == str(won.index(True)).encode()


def test_sweep_removes_what_the_dead_left_and_spares_the_living(tmp_path: Path) -> None:
    script = (
        "import os, sys; from longtake.datasets import storage\n"
        "with storage.spool_folder(sys.argv[1]) as f, storage.staged(sys.argv[1] + '/x') as p:\n"
        "    p.write_bytes(b'1'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)])
    assert len(list(tmp_path.iterdir())) == 2
    with storage.staged(str(tmp_path / "mine")) as mine:
        mine.write_bytes(b"alive")
        assert storage.sweep(str(tmp_path)) == 2
        assert mine.exists()
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_sweep_removes_what_a_zombie_left_and_what_bears_no_number_of_a_process(tmp_path: Path) -> None:
    script = (
        "import sys; from longtake.datasets import storage\n"
        "with storage.staged(sys.argv[1] + '/x') as p: p.write_bytes(b'1'); print(p.name, flush=True); input()"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout
        name = writer.stdout.readline().strip()
        (tmp_path / name.replace(f"@{writer.pid}~", f"@{10**30}~")).touch()
        assert storage.sweep(str(tmp_path)) == 1
        writer.kill()
        # ended, but not waited for
        os.waitid(os.P_PID, writer.pid, os.WEXITED | os.WNOWAIT)
        assert storage.sweep(str(tmp_path)) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_with_the_file_and_the_way_on() -> None:
    with (
        pytest.raises(Failure, match=r"/data/x\.tar: No space left.*free some space"),
        storage.failing_clearly("/data/x.tar"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_passing_faults_are_retried_and_final_ones_are_not() -> None:
    calls = []

    def flaky() -> int:
        calls.append(1)
        if len(calls) < 3:
            raise OSError("503 slow down")
        return 7

    assert storage.retrying("s3://b/x", flaky, first_wait=0.001) == 7
    with pytest.raises(Failure, match=r"s3://b/x.*gave up after 2"):
        storage.retrying("s3://b/x", lambda: (_ for _ in ()).throw(OSError("503")), attempts=2, first_wait=0.001)
    with pytest.raises(FileNotFoundError):
        storage.retrying("s3://b/x", lambda: Path("/nonexistent/file").read_bytes())


def test_an_unknown_protocol_is_a_user_error() -> None:
    with pytest.raises(UserError, match="nosuch"):
        storage.filesystem("nosuch://bucket/x")
