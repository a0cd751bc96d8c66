"""The set-ups of infra/README.md, as they are pasted: each starts, does its work, and stops."""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import yaml
from flat import nested

from longtake.datasets import storage

README = Path(__file__).resolve().parents[2] / "infra" / "README.md"
PROGRAMS = str(Path(sys.executable).parent)

WORK = """
import sys, tempfile
from pathlib import Path
import mlflow, torch
from longtake.infra import recipe, runs
from longtake.training import registry
from longtake.training.registry import disk, promotion
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset

store = runs.connect(recipe.load(sys.argv[1]))
run = store.client.create_run(store.experiment, tags={"longtake.fingerprint": "f", "longtake.output": "o"})
store.client.log_metric(run.info.run_id, "loss", 0.5, step=3)
torch.manual_seed(0)
model = PVVAE(config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8))
folder = Path(tempfile.mkdtemp()) / "model"
disk.save(folder, "pv_vae", model.config.model_dump(mode="json"), model.state_dict(), {"lineage": {"inputs": {}}})
uri = registry.register(folder, "tiny", run.info.run_id)
store.finish(run.info.run_id, {"uri": uri, "metrics": {"psnr": 20.0}})
promotion.promote(uri)
found = store.finished("f")
loaded = registry.load("models:/tiny@champion")
same = all(torch.equal(a, loaded.state_dict()[name]) for name, a in model.state_dict().items())
print("did", found.uri, store.metrics(run.info.run_id)[0]["loss"], same)
print("at", run.info.artifact_uri.split(":")[0])
"""


def blocks(heading: str) -> list[str]:
    section = README.read_text().split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return re.findall(r"```bash\n(.*?)```", section, re.DOTALL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def environment(folder: Path, **more: str) -> dict[str, str]:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "PG"))}
    path = {"PATH": f"{PROGRAMS}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1", "LONGTAKE_CACHE": str(folder / "cache")}
    return clean | path | {"FOLDER": str(folder), "WORKERS": "1"} | more


def paste(block: str, env: dict[str, str]) -> str:
    # into files: what runs on in the background would keep a pipe open
    with tempfile.TemporaryFile("w+") as out:
        done = subprocess.run(["bash", "-euo", "pipefail", "-c", block], env=env, stdout=out, stderr=out, timeout=150)
        out.seek(0)
        said = out.read()
    logs = "\n".join(p.read_text(errors="replace")[-3000:] for p in Path(env["FOLDER"]).glob("*.log"))
    assert done.returncode == 0, said + logs
    return said


def work(env: dict[str, str], exported: str, folder: Path) -> str:
    """Log, register, promote and load through the server that `exported` names."""
    uri = exported.split("MLFLOW_TRACKING_URI=")[1].strip()
    recipe = folder / "r.yaml"
    view = "{kind: curate, dataset: 's3://nowhere/dataset'}"
    recipe.write_text(f"name: servers\nworkspace: {folder}/ws\nstages: {{view: {view}}}\n")
    # as somebody does who trains: without the credentials of the store
    mine = {k: v for k, v in env.items() if not k.startswith("AWS_")} | {"MLFLOW_TRACKING_URI": uri}
    done = subprocess.run(
        [sys.executable, "-P", "-c", WORK, str(recipe)], env=mine, capture_output=True, text=True, timeout=150
    )
    assert done.returncode == 0 and "did models:/tiny/1 0.5 True" in done.stdout, done.stdout + done.stderr
    assert "at mlflow-artifacts" in done.stdout, "artifacts go through the server"
    asked = subprocess.run(
        ["curl", "--silent", "--output", "/dev/null", "--write-out", "%{http_code}", "--header", "Host: evil.example",
         f"{uri}/api/2.0/mlflow/experiments/search?max_results=1"], env=mine, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert asked.stdout == "403", "another host's name is turned away"
    return uri


def gone(uri: str) -> bool:
    host, port = uri.rpartition("//")[2].split(":")
    deadline = time.time() + 60
    while time.time() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex((host, int(port))):
                return True
        time.sleep(0.5)
    return False


@pytest.fixture
def folder() -> Iterator[Path]:
    """One that other users may enter, with a short name: PostgreSQL is another user's, and Ray puts sockets below."""
    path = Path(tempfile.mkdtemp(prefix="lts"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path, ignore_errors=True)


def test_each_setup_can_be_stopped_and_binds_to_this_machine_alone() -> None:
    for heading in ("MLflow on sqlite", "MLflow on PostgreSQL, artifacts on S3", "A Ray cluster"):
        start, stop = blocks(heading)
        assert "127.0.0.1" in start and "0.0.0.0" not in start and "kill" in stop
        assert start.splitlines()[0].count(":-") or start.splitlines()[1].count(":-"), "what may be chosen comes first"


@pytest.mark.soak
def test_a_training_outlives_the_sqlite_server_and_its_metrics_arrive_when_that_is_back(
    folder: Path, dataset: str
) -> None:
    start, stop = blocks("MLflow on sqlite")
    env = environment(folder, PORT=str(free_port()))
    steps = 400
    training = {
        "kind": "pretrain_vae", "phase": "image", "dataset": dataset, "name": "outlives", "steps": steps, "batch": 2,
        "model": {"preset": "pv_vae_tiny"}, "sizes": [[32, 32]], "frames": 1, "lambda_gan": 0, "log_every": 1,
        "checkpoint_every": 20, "sample_every": 0, "workers": 0, "eval_clips": 1, "ema_half_lives": [],
    }  # fmt: skip
    recipe = folder / "train.yaml"
    recipe.write_text(
        yaml.safe_dump({"name": "t", "workspace": str(folder / "ws"), "stages": {"vae": nested(training)}})
    )
    try:
        uri = work(env, paste(start, env), folder)
        mine = env | {"MLFLOW_TRACKING_URI": uri}
        with (folder / "training.txt").open("w+") as out:
            command = [sys.executable, "-P", "-m", "longtake.infra.cli", "stage", str(recipe), "vae"]
            child = subprocess.Popen(command, env=mine, stdout=out, stderr=out, start_new_session=True)
            try:
                reached(folder, child, 20)
                server = psutil.Process(int((folder / "server.pid").read_text()))
                for process in [*server.children(recursive=True), server]:
                    process.kill()
                assert gone(uri)
                # that it is down is said as soon as the next metrics are sent
                here, log = latest(folder), folder / "training.txt"
                while "tracking:" not in log.read_text():
                    assert child.poll() is None, log.read_text()[-3000:]
                    time.sleep(0.05)
                reached(folder, child, here + 20)
                paste(start, env)
                assert child.wait(timeout=150) == 0, (folder / "training.txt").read_text()[-3000:]
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
        script = (
            "import mlflow\nc = mlflow.MlflowClient()\n[r] = c.search_runs([c.get_experiment_by_name('t').experiment_id])\n"
            "print(r.info.status, sorted({m.step for m in c.get_metric_history(r.info.run_id, 'loss')}) == "
            f"list(range(1, {steps + 1})))"
        )
        found = subprocess.run([sys.executable, "-P", "-c", script], env=mine, capture_output=True, text=True)
        assert found.stdout.split() == ["FINISHED", "True"], found.stdout + found.stderr
    finally:
        paste(stop, env)
    assert gone(uri)
    assert (folder / "mlflow.db").exists() and list((folder / "artifacts").rglob("model.safetensors"))


def latest(folder: Path) -> int:
    """The step of the training's last checkpoint."""
    steps = [int(path.name.removeprefix("step-")) for path in folder.glob("ws/vae/*/checkpoints/step-*")]
    return max(steps, default=0)


def reached(folder: Path, child: "subprocess.Popen[bytes]", step: int) -> None:
    deadline = time.time() + 120
    while latest(folder) < step:
        assert child.poll() is None and time.time() < deadline, (folder / "training.txt").read_text()[-3000:]
        time.sleep(0.05)


@pytest.mark.slow
def test_mlflow_on_postgresql_and_s3_takes_runs_and_models_and_stops(
    folder: Path, s3_variables: dict[str, str]
) -> None:
    if not list(Path("/usr/lib/postgresql").glob("*/bin/initdb")):
        pytest.fail("PostgreSQL is not installed: apt-get install postgresql")
    start, stop = blocks("MLflow on PostgreSQL, artifacts on S3")
    env = environment(folder, **s3_variables, BUCKET="runs")
    env |= {"PORT": str(free_port()), "DATABASE_PORT": str(free_port())}
    fs = storage.filesystem("s3://runs")[0]
    fs.mkdir("runs")
    try:
        uri = work(env, paste(start, env), folder)
    finally:
        paste(stop, env)
    assert gone(uri) and gone(f"//127.0.0.1:{env['DATABASE_PORT']}")
    fs.invalidate_cache()
    assert any(key.endswith("model.safetensors") for key in fs.find("runs"))
    password = (folder / "password").read_text().strip()
    assert (folder / "password").stat().st_mode & 0o077 == 0
    assert not any(password in path.read_text(errors="replace") for path in folder.glob("*.log"))


@pytest.mark.slow
def test_a_ray_cluster_of_three_nodes_asks_for_its_token_and_stops(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from longtake.infra.cluster import jobs

    start, stop = blocks("A Ray cluster")
    env = environment(
        folder,
        RAY_PORT=str(free_port()),
        DASHBOARD_PORT=str(free_port()),
        AGENT_PORT=str(free_port()),
        CPUS="1",
        SCRATCH=str(folder / "r"),
    )
    address = f"http://127.0.0.1:{env['DASHBOARD_PORT']}"
    try:
        paste(start, env)
        for name in [n for n in os.environ if n.startswith("RAY_")]:
            monkeypatch.delenv(name)
        monkeypatch.setenv("RAY_AUTH_MODE", "token")
        monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(folder / "token"))
        deadline = time.time() + 90
        while len(found := jobs.cluster_nodes(address)) < 3 and time.time() < deadline:
            time.sleep(1)
        assert [node["CPU"] for node in found] == [1.0] * 3
        assert (folder / "token").stat().st_mode & 0o077 == 0
        monkeypatch.setenv("RAY_AUTH_TOKEN", "f" * 64)
        with pytest.raises(ValueError, match="token"):
            jobs.cluster_nodes(address)
    finally:
        paste(stop, env)
    assert gone(address) and gone(f"//127.0.0.1:{env['RAY_PORT']}")
