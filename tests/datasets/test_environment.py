"""Environments as schedulers, shells and images leave them."""

import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from longtake.datasets import environment
from longtake.datasets.errors import UserError

NAMES = (
    *("WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_LOCALID", "OMP_NUM_THREADS"),
    *("RAY_ADDRESS", "RAY_TMPDIR", "TMPDIR"),
)


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in NAMES:
        # a value first, so that whatever the test leaves there is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(tempfile, "tempdir", None)


@pytest.mark.parametrize(
    ("variables", "seen", "local"),
    [
        ({}, (0, 1), None),
        ({"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}, (0, 1), "0"),
        ({"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "job-0", "MASTER_PORT": "2"}, (3, 4), "0"),
        ({"WORLD_SIZE": "4", "RANK": "3", "MASTER_ADDR": "n", "MASTER_PORT": "2", "SLURM_LOCALID": "1"}, (3, 4), "1"),
        ({"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "n", "MASTER_PORT": "2"}, (1, 2), "1"),
        ({"WORLD_SIZE": "", "RANK": "", "LOCAL_RANK": "", "OMP_NUM_THREADS": ""}, (0, 1), None),
    ],
)
def test_a_process_knows_its_place(
    variables: dict[str, str], seen: tuple[int, int], local: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    environment.tidy()
    assert environment.ranks() == seen and os.environ.get("LOCAL_RANK") == local


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"WORLD_SIZE": "2"}, "RANK is not set, but WORLD_SIZE=2"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "MASTER_ADDR is not set"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "n", "MASTER_PORT": "2"}, "RANK=2: is not one of the 2"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "n", "MASTER_PORT": "abc"}, "MASTER_PORT=abc: is no number"),
        ({"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "n", "MASTER_PORT": "65536"}, "MASTER_PORT=65536: is no port"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK=-1: is no rank"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE=two: is no number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE=0: is no number of processes"),
    ],
)
def test_half_a_place_is_one_line(variables: dict[str, str], says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=says):
        environment.ranks()


@pytest.mark.parametrize(("text", "count"), [(None, None), ("4", 4), ("4,2,1", 4), (" 8 , 2", 8)])
def test_threads_may_be_a_list_of_levels(text: str | None, count: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if text is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", text)
    assert environment.threads() == count


@pytest.mark.parametrize("text", ["many", "0", "-1"])
def test_what_is_no_number_of_threads_is_one_line(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", text)
    with pytest.raises(UserError, match=f"OMP_NUM_THREADS={text}: is no number of threads"):
        environment.threads()


def test_a_ray_cluster_that_is_gone_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}"):
            monkeypatch.setenv("RAY_ADDRESS", address)
            assert environment.ray_address() == address
    with pytest.raises(UserError, match=f"RAY_ADDRESS=ray://127.0.0.1:{port}: no Ray cluster answers .*unset"):
        environment.ray_address()
    for address in ("head", "http://head:8265", "head:port"):
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"RAY_ADDRESS={address}: is no address of a Ray cluster; give HOST:PORT"):
            environment.ray_address()


def test_a_long_temporary_folder_leaves_ray_a_short_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    long = tmp_path / "slurm_jobdir" / "1355700" / ("scratch" * 8)
    long.mkdir(parents=True)
    monkeypatch.setenv("TMPDIR", str(long))
    assert environment.ray_address() == "local" and os.environ["RAY_TMPDIR"] == "/tmp"
    assert "is too long for its sockets" in capsys.readouterr().err
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(UserError, match=r"RAY_TMPDIR=.* set RAY_TMPDIR to a shorter folder"):
        environment.ray_address()


def test_closed_standard_streams_cost_nothing(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("name: x\nworkspace: w\nstages: {a: {kind: curate, dataset: 's3://lake/clips'}}\n")
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "graph", str(recipe)]

    def close() -> None:
        for number in range(3):
            os.close(number)

    assert subprocess.run(command, preexec_fn=close, cwd=tmp_path).returncode == 0
