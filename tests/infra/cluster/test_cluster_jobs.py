"""A recipe submitted to a Ray cluster of three nodes that loses one, is stopped, and continues. Other tests check the requests."""

import contextlib
import hashlib
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import psutil
import pytest
import yaml
from click.testing import CliRunner, Result

from longtake.datasets import index, schema
from longtake.datasets.errors import UserError
from longtake.infra import graph, recipe
from longtake.infra.cli.submit import jobs_group, submit
from longtake.infra.footage import write_video
from longtake.pipeline import retry
from longtake.pipeline.commit import make_group
from longtake.pipeline.stages import shard

pytestmark = pytest.mark.slow

# a head without CPUs and two nodes with one each; ends when its standard input does
CLUSTER = """
import json, sys
from ray.cluster_utils import Cluster
small = {"object_store_memory": 100 << 20}
head = {"num_cpus": 0, "include_dashboard": True, "dashboard_port": int(sys.argv[1])}
# its usual port may be that of another cluster on this machine
head["dashboard_agent_listen_port"] = int(sys.argv[2])
cluster = Cluster(initialize_head=True, head_node_args=head | small)
nodes = [cluster.add_node(num_cpus=1, include_dashboard=False, **small) for _ in range(2)]
print(json.dumps([node.all_processes["raylet"][0].process.pid for node in nodes]), flush=True)
sys.stdin.read()
cluster.shutdown()
"""
SUBMIT = "import sys; from longtake.infra.cli.submit import submit; submit(sys.argv[1:])"
VIDEOS, STEPS = 12, 300


class Cluster(NamedTuple):
    address: str
    raylets: list[int]
    environment: dict[str, str]


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # a short name: Ray puts sockets below, whose paths may have 107 characters
    scratch, mark = Path(tempfile.mkdtemp(prefix="lt")), secrets.token_hex(8)
    with socket.socket() as one, socket.socket() as other:
        one.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, agent = one.getsockname()[1], other.getsockname()[1]
    checks = {"period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3", "initial_delay_ms": "1000"}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    environment |= {f"RAY_health_check_{name}": value for name, value in checks.items()}
    environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
    environment |= {"TMPDIR": str(scratch), "RAY_TMPDIR": str(scratch), "TEST_MARK": mark, "OMP_NUM_THREADS": "1"}
    # where a job's `python` and `pip` are found
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    with (scratch / "stderr").open("wb") as stderr:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", CLUSTER, str(port), str(agent)],
            env=environment,
            cwd=scratch,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            start_new_session=True,
        )
    try:
        assert process.stdin and process.stdout
        said = process.stdout.readline()
        assert said, (scratch / "stderr").read_text()[-3000:]
        yield Cluster(f"http://127.0.0.1:{port}", json.loads(said), environment)
        process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=30)
    finally:
        for left in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if left.environ().get("TEST_MARK") == mark:
                    left.kill()
        process.wait()
        shutil.rmtree(scratch, ignore_errors=True)


@pytest.fixture
def token(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [n for n in os.environ if n.startswith(("RAY_", "MLFLOW_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("RAY_AUTH_TOKEN", cluster.environment["RAY_AUTH_TOKEN"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The quickstart's first stages and its first model, for tiny videos."""
    folder = tmp_path_factory.mktemp("submitted")
    (folder / "raw").mkdir()
    rng = np.random.default_rng(0)
    for n in range(VIDEOS):
        picture = rng.integers(40, 200, (48, 64, 3), dtype=np.uint8)
        write_video(folder / "raw" / f"{n}.mp4", (np.roll(picture, t, 1) for t in range(20)), 20)
    clip = {"short_side": 32, "fps": 10, "max_seconds": 1}
    model = {"preset": "pv_vae_tiny"}
    stages = {
        "shards": {
            "kind": "shard",
            "sources": [str(folder / "raw")],
            "clip": clip,
            "val_fraction": 0.2,
            "group_sources": 1,
        },
        "view": {"kind": "curate", "dataset": "shards"},
        "images": {"kind": "pretrain_vae", "phase": "image", "dataset": "shards", "view": "view", "model": model}
        | {
            "sizes": [[32, 32]],
            "steps": STEPS,
            "batch": 4,
            "run": {"checkpoint_every": 20},
            "lambda_gan": 0,
            "ema_half_lives": [20],
        },
    }
    content = {"name": "small", "workspace": str(folder / "ws"), "stages": stages, "deploy": {"stop_seconds": 60}}
    (folder / "small.yaml").write_text(yaml.safe_dump(content))
    return folder / "small.yaml"


def invoke(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def ok(result: Result) -> Result:
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def wait_until(done: Callable[[], bool], process: subprocess.Popen[str], log: Path) -> None:
    deadline = time.time() + 150
    while not done():
        assert process.poll() is None and time.time() < deadline, log.read_text()
        time.sleep(0.05)


def committed(output: str) -> int:
    return sum(len(index.shard_names(output, split)) for split in schema.SPLITS)


def hashes(folder: str) -> dict[str, str]:
    files = (p for p in Path(folder).rglob("*") if p.is_file() and "views" not in p.parts)
    return {str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def made_alone(config: Any, output: str) -> dict[str, str]:
    """The hashes of the dataset that this process makes group by group: no Ray, no kills."""
    shard.describe(config, output)
    for group in shard.plan(output, config.sources, config.val_fraction, config.group_bytes, config.group_sources):
        assert not make_group(group, shard.sources_of(output, group), output, config.cut)["error"]
    retry.record(output)
    return hashes(output)


@pytest.mark.soak
def test_a_job_outlives_a_node_is_one_however_often_submitted_and_goes_on_after_a_stop(
    cluster: Cluster, token: None, path: Path, tmp_path: Path
) -> None:
    nodes = graph.build(graph.pin(recipe.load(str(path))))
    output, at = nodes[0].output, ("--address", cluster.address)
    with (tmp_path / "log").open("w") as log:
        first = subprocess.Popen(
            [sys.executable, "-P", "-c", SUBMIT, str(path), *at],
            env=cluster.environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
        )
    try:
        undisturbed = made_alone(nodes[0].config, str(tmp_path / "alone"))
        wait_until(lambda: committed(output) >= 2, first, tmp_path / "log")
        # the node at work with all that runs on it, at once
        raylet = max((psutil.Process(n) for n in cluster.raylets), key=lambda p: len(p.children(recursive=True)))
        gone = [raylet, *raylet.children(recursive=True)]
        assert any("ray::" in " ".join(p.cmdline()) for p in gone)
        for process in gone:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        assert committed(output) < VIDEOS

        again = ok(invoke(submit, path, *at, "--detach"))
        job = again.stdout.strip()
        assert f"job {job} is running already; attached to it" in again.stderr

        wait_until(lambda: "train: " in (tmp_path / "log").read_text(), first, tmp_path / "log")
        assert hashes(output) == undisturbed
        assert ok(invoke(jobs_group, "stop", job, *at, "--wait")).stdout == f"{job}: stopped\n"
        assert first.wait(timeout=60) == 130
        said = (tmp_path / "log").read_text()
        assert "state saved" in said and f"job {job} was stopped" in said
    finally:
        first.kill()
        first.wait()

    resumed = ok(invoke(submit, path, *at))
    assert f"job {job}-2 is submitted" in resumed.stderr
    assert "shards: reused" in resumed.stdout and "view: reused" in resumed.stdout
    step = int(said.rpartition("stopped at step ")[2].partition(",")[0])
    assert step > 0 and f"| {step}/{STEPS} " in resumed.stdout
    assert "images: models:/pv-vae/1" in resumed.stdout
    listed = ok(invoke(jobs_group, "list", *at)).stdout.splitlines()
    assert [line.split()[:2] for line in listed] == [[f"{job}-2", "SUCCEEDED"], [job, "STOPPED"]]
    assert "nothing to do" in ok(invoke(submit, path, *at)).stderr
    assert hashes(output) == undisturbed


def test_a_wrong_token_and_gpus_that_the_cluster_lacks_are_said_before_anything_is_sent(
    cluster: Cluster, token: None, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*more: str) -> str:
        error = invoke(submit, path, "--address", cluster.address, "--set", "name=other", *more).exception
        assert isinstance(error, UserError) and "\n" not in str(error)
        return str(error)

    wanted = refused("--set", "deploy.resources.images={gpus: 1}")
    assert "stage images: deploy.resources.images.gpus: needs 1 GPU, no node of the cluster has more than 0" in wanted
    wanted = refused("--set", "stages.images.run.launcher={by: ray, gpus: 1}")
    assert "stages.images.run.launcher: 1 processes of 1 CPU and 1 GPU" in wanted
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    assert "needs a token" in refused()
    monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
    assert "refuses the token" in refused() and "f" * 64 not in refused()
