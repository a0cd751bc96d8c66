"""Faults around a run: a store that is down or fresh, and two equal runs at once."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from flat import nested

from longtake.datasets.verify import verify

COMMAND = [sys.executable, "-P", "-m", "longtake.infra.cli"]


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(**more: str) -> dict[str, str]:
    """The environment of a fresh shell, without other tests' variables for Ray and MLflow."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return clean | {"OMP_NUM_THREADS": "1"} | more


def longtake(*arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*COMMAND, *arguments], env=environment(**more), capture_output=True, text=True, timeout=300)


def recipe(folder: Path, stages: dict[str, Any], name: str = "faults") -> str:
    path = folder / "r.yaml"
    path.write_text(yaml.safe_dump({"name": name, "workspace": str(folder / "ws"), "stages": stages}))
    return str(path)


def shards(footage: Path) -> dict[str, Any]:
    clip = {"short_side": 32, "fps": 12, "max_seconds": 3}
    return {"kind": "shard", "sources": [str(footage)], "clip": clip, "val_fraction": 0.3, "group_sources": 2}


def at_once(count: int, script: str, *arguments: str) -> list[tuple[int, str]]:
    """Start `count` processes that all begin at the same moment; returns their exit codes and what they said."""
    begin = f"import time; time.sleep(max(0, {time.time() + 6} - time.time()))\n"
    # imports cost seconds of their own: they come before the moment
    command = [sys.executable, "-P", "-c", f"import mlflow, longtake.infra.runs\n{begin}{script}", *arguments]
    children = [
        subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for _ in range(count)
    ]
    return [(child.wait(timeout=200), child.stdout.read() if child.stdout else "") for child in children]


@pytest.mark.parametrize("command", [["run"], ["status"], ["stage", "view"]])
def test_mlflow_that_is_down_at_the_start_is_one_line_and_nothing_is_begun(
    footage: Path, tmp_path: Path, command: Sequence[str]
) -> None:
    path = recipe(tmp_path, {"shards": shards(footage), "view": {"kind": "curate", "dataset": "shards"}})
    uri = f"http://127.0.0.1:{free_port()}"
    done = longtake(command[0], path, *command[1:], MLFLOW_TRACKING_URI=uri, MLFLOW_HTTP_REQUEST_MAX_RETRIES="0")
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and uri in errors[0], done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert not list((tmp_path / "ws").rglob("*.tar"))


@pytest.mark.slow
def test_four_processes_at_once_open_a_fresh_store_and_share_one_experiment(tmp_path: Path) -> None:
    """Without a lock their schemas meet: "duplicate column name", "table already exists"."""
    path = recipe(tmp_path, {"view": {"kind": "curate", "dataset": "s3://nowhere/dataset"}})
    script = (
        "import sys\nfrom longtake.infra import recipe, runs\n"
        "print('experiment', runs.connect(recipe.load(sys.argv[1])).experiment)"
    )
    ended = at_once(4, script, path)
    assert [code for code, _ in ended] == [0] * 4, ended
    assert len({said.split("experiment ")[1] for _, said in ended}) == 1, ended


@pytest.mark.soak
def test_two_runs_of_one_recipe_at_once_make_one_model_and_no_half_of_it(dataset: str, tmp_path: Path) -> None:
    """That two make one dataset is shown in tests/pipeline/test_chaos_s3.py."""
    made = tmp_path / "dataset"
    shutil.copytree(dataset, made)
    training = {
        "kind": "pretrain_vae", "phase": "image", "dataset": str(made), "view": "view", "name": "twice",
        "model": {"preset": "pv_vae_tiny"}, "sizes": [[32, 32]], "frames": 1, "lambda_gan": 0, "steps": 40, "batch": 2,
        "checkpoint_every": 20, "sample_every": 0, "workers": 0, "eval_clips": 1, "ema_half_lives": [],
    }  # fmt: skip
    view = {"kind": "curate", "dataset": str(made), "rules": {}}
    path = recipe(tmp_path, {"view": view, "vae": nested(training)})
    both = [
        subprocess.Popen(
            [*COMMAND, "run", path],
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        for _ in range(2)
    ]
    try:
        ended = [(child.communicate(timeout=250)[0], child.returncode) for child in both]
    finally:
        for child in both:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
    for said, code in ended:
        told = [line for line in said.splitlines() if line.startswith("error: ")]
        # the loser of a training is told who trains
        assert code == 0 or (code == 2 and len(told) == 1 and "is training here already" in told[0]), said
        assert "Traceback" not in said, said
    assert any(code == 0 for _, code in ended), ended

    again = longtake("run", path)
    assert again.returncode == 0 and again.stdout.count(": reused") == 2, again.stdout + again.stderr
    assert not list(verify(str(made)))
    script = "import mlflow; print(len(mlflow.MlflowClient().search_model_versions(\"name = 'twice'\")))"
    store = environment(MLFLOW_TRACKING_URI=f"sqlite:///{tmp_path}/ws/mlflow.db")
    counted = subprocess.run([sys.executable, "-P", "-c", script], env=store, capture_output=True, text=True)
    assert counted.stdout.strip() == "1", counted.stdout + counted.stderr
