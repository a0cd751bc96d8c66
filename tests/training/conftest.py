"""Shared by the tests of training: a process group of one, a small training, and processes that do it together."""

import gc
import json
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import small

from longtake.training import engines

SMALL = Path(small.__file__)


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with engines.process_group():
        # DeepSpeed collects all garbage whenever an engine is made, up to nine times: seconds each where as much is
        # loaded as in a session of tests. What is there already stays
        gc.collect()
        gc.freeze()
        yield
    gc.unfreeze()
    gc.collect()


class Ranks:
    """`world` processes in a group, which do jobs: for `small.work`, or what the text of a script does.

    A job is a line of JSON on the script's input; it answers with another.
    """

    def __init__(self, world: int, script: str = "") -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.processes = []
        self.errors = [tempfile.TemporaryFile("w+") for _ in range(world)]  # noqa: SIM115
        for rank in range(world):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "MASTER_PORT": port}
            environment = os.environ | {k: str(v) for k, v in place.items()}
            environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
            # -P keeps the script's own folder off sys.path, where its helpers are
            environment |= {"PYTHONPATH": str(SMALL.parent)}
            pipe = subprocess.PIPE
            command = [sys.executable, *(["-P", "-c", script] if script else [str(SMALL)])]
            self.processes.append(
                subprocess.Popen(command, env=environment, stdin=pipe, stdout=pipe, stderr=self.errors[rank], text=True)
            )

    def tell(self, folder: Path, options: dict[str, Any] | None = None, wait: float = 0.0, **changes: Any) -> None:
        self.send({"folder": str(folder), "changes": changes, "options": options, "wait": wait})

    def send(self, job: dict[str, Any]) -> None:
        for process in self.processes:
            assert process.stdin
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()

    def work(self, folder: Path, options: dict[str, Any] | None = None, **changes: Any) -> list[dict[str, Any]]:
        """What came of a job on each rank."""
        self.tell(folder, options, **changes)
        return self.answers()

    def answers(self) -> list[dict[str, Any]]:
        return [self.answer(rank) for rank in range(len(self.processes))]

    def answer(self, rank: int) -> dict[str, Any]:
        stdout = self.processes[rank].stdout
        assert stdout
        for line in stdout:
            if line.startswith("{"):
                return dict(json.loads(line))
        raise AssertionError(self.said(rank))

    def said(self, rank: int) -> str:
        self.errors[rank].seek(0)
        return self.errors[rank].read()

    def end(self) -> list[int]:
        """Their exit codes."""
        try:
            # all at once: rank 0 waits for the others
            for process in self.processes:
                if process.stdin:
                    process.stdin.close()
                    process.stdin = None
            for process in self.processes:
                process.communicate(timeout=120)
        finally:
            for process in self.processes:
                process.kill()
        return [process.returncode for process in self.processes]


@pytest.fixture(scope="module")
def pair() -> Iterator[Ranks]:
    """Two ranks that stay for a file's tests."""
    ranks = Ranks(2)
    yield ranks
    ranks.end()


def _started() -> Iterator[Callable[..., Ranks]]:
    started: list[Ranks] = []

    def start(world: int, script: str = "") -> Ranks:
        started.append(Ranks(world, script))
        return started[-1]

    yield start
    for each in started:
        for process in each.processes:
            process.kill()
            process.communicate()


@pytest.fixture
def ranks() -> Iterator[Callable[[int], Ranks]]:
    """Starts ranks for one test, which may do with them what it likes."""
    yield from _started()


@pytest.fixture(scope="module")
def module_ranks() -> Iterator[Callable[[int, str], Ranks]]:
    """Starts ranks that stay for a file's tests."""
    yield from _started()
