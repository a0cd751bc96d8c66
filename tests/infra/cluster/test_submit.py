"""Recipes as jobs of a Ray cluster: what is sent, how often, what is said of it. The cluster is a stand-in."""

import io
import os
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import click
import pytest
import yaml
from click.testing import CliRunner, Result
from dashboard import TOKEN, Dashboard, node

from longtake.datasets.errors import Failure, UserError
from longtake.infra import graph, recipe
from longtake.infra.cli.submit import jobs_group, submit
from longtake.infra.cluster import jobs, wheel
from longtake.infra.cluster import submit as submission

STAGES = {
    "shards": {"kind": "shard", "sources": ["raw"], "run": {"cpus": 1}},
    "images": {
        "kind": "pretrain_vae",
        "phase": "image",
        "dataset": "shards",
        "model": {"preset": "pv_vae_tiny"},
        "sizes": [[64, 64]],
    },
}


@pytest.fixture
def ray(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    for name in [n for n in os.environ if n.startswith("RAY_")]:
        monkeypatch.delenv(name)
    served = Dashboard()
    yield served
    served.close()


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "raw").mkdir()
    (tmp_path / "raw" / "a.mp4").write_bytes(b"x")
    monkeypatch.chdir(tmp_path)
    return write(tmp_path)


def write(folder: Path, **more: Any) -> Path:
    content = {"name": "small", "workspace": str(folder / "ws"), "stages": STAGES} | more
    (folder / "my.yaml").write_text(yaml.safe_dump(content))
    return folder / "my.yaml"


def invoke(command: click.Command, *arguments: object) -> Result:
    return CliRunner().invoke(command, [str(a) for a in arguments])


def send(path: Path, served: Any, *more: str) -> Result:
    return invoke(submit, path, "--address", served.address, *more)


def ok(result: Result) -> Result:
    assert result.exit_code == 0, (result.output, result.exception)
    return result


def command(sent: dict[str, Any]) -> list[str]:
    """The arguments of `longtake` in a job's shell, with the recipe's path in the job's first folder."""
    # nothing of the folder that it begins in is needed afterwards
    script = 'python() { test "$PWD" = /tmp && printf "%s\\n" "$@"; }; ' + sent["entrypoint"].replace("exec ", "")
    said = subprocess.run(["sh", "-c", script], cwd="/", capture_output=True, text=True, check=True).stdout.splitlines()
    assert said[:3] == ["-P", "-m", "longtake.infra.cli"]
    return [word.removeprefix("//") for word in said[3:]]


def name_of(path: Path) -> str:
    return submission.work(graph.pin(recipe.load(str(path))), None).name


# the wheel


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return wheel.build(tmp_path_factory.mktemp("wheel"))


def test_the_wheel_needs_nothing_from_the_network_and_goes_before_what_is_installed(code: Path, tmp_path: Path) -> None:
    install = [sys.executable, "-m", "pip", "install", "--no-index", "--disable-pip-version-check", "--target"]
    done = subprocess.run([*install, str(tmp_path), str(code)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    script = (
        "import importlib.metadata as m, longtake.infra.cluster.wheel as w, longtake.training.config as c\n"
        "from longtake.infra.recipe import builtin\n"
        "print(w.__file__); print(c.__file__); print(m.version('longtake')); print(m.requires('longtake')); print(builtin())"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-P", "-c", script], env=environment, capture_output=True, text=True)
    own, config, version, requires, recipes = done.stdout.splitlines()
    assert own.startswith(str(tmp_path)) and config.startswith(str(tmp_path)), done.stderr
    assert f"longtake-{version}-py3-none-any.whl" == code.name and requires == "None" and "quickstart" in recipes
    assert (tmp_path / "bin" / "longtake").exists()
    assert (tmp_path / "longtake" / "infra" / "report" / "page.html").exists()
    assert (tmp_path / "longtake" / "infra" / "Dockerfile").exists()


def test_the_same_code_makes_the_same_bytes_and_other_code_another_name(
    code: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import longtake.pipeline

    again = wheel.build(tmp_path)
    assert again.name == code.name and again.read_bytes() == code.read_bytes()
    with zipfile.ZipFile(again) as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
    edited = tmp_path / "pipeline"
    edited.mkdir()
    (edited / "__init__.py").write_text("edited = True\n")
    monkeypatch.setattr(longtake.pipeline, "__path__", [str(edited)])
    assert wheel.build(tmp_path).name != code.name


# what is sent


def test_a_job_gets_the_recipe_the_code_its_resources_and_the_variables_it_may_have(
    ray: Any, path: Path, code: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.nodes = [node(CPU=4.0, GPU=2.0, memory=8e9, fast=2.0)]
    asked = {
        "shards": {"cpus": 2, "custom": {"fast": 1}, "labels": {"zone": "eu"}},
        "images": {"cpus": 1, "gpus": 1, "memory_bytes": 10**9},
    }
    path = write(
        path.parent, deploy={"env": ["MLFLOW_TRACKING_URI", "MY_KEY"], "resources": asked, "stop_seconds": 7.5}
    )
    monkeypatch.setenv("MY_KEY", "swordfish")
    monkeypatch.setenv("OTHER_KEY", "hushhush")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    result = ok(send(path, ray))
    (sent,) = ray.posted
    loaded = graph.pin(recipe.load(str(path)))
    whole = graph.whole_fingerprint(graph.build(loaded))
    assert sent["submission_id"] == f"longtake-small-{whole[:12]}"
    assert command(sent) == ["run", "recipe.yaml"]
    assert {k: v for k, v in sent.items() if k.startswith("entrypoint_")} == {
        "entrypoint_num_cpus": 2,
        "entrypoint_num_gpus": 1,
        "entrypoint_memory": 10**9,
        "entrypoint_resources": {"fast": 1},
        "entrypoint_label_selector": {"zone": "eu"},
    }
    variables = sent["runtime_env"]["env_vars"]
    assert variables["MY_KEY"] == "swordfish" and variables["MLFLOW_TRACKING_URI"] == "http://mlflow:5000"
    assert variables["RAY_JOB_STOP_WAIT_TIME_S"] == "8" and "OTHER_KEY" not in variables
    assert sent["metadata"]["fingerprint"] == whole
    assert "swordfish" not in result.output + str(sent["metadata"]) + sent["entrypoint"]
    assert sent["runtime_env"]["py_modules"] == [f"gcs://{code.name}"] and ray.packages[code.name] == code.read_bytes()
    folder = sent["runtime_env"]["working_dir"].removeprefix("gcs://")
    with zipfile.ZipFile(io.BytesIO(ray.packages[folder])) as archive:
        assert archive.namelist() == ["recipe.yaml"]
        (path.parent / "sent.yaml").write_bytes(archive.read("recipe.yaml"))
    there = graph.pin(recipe.load(str(path.parent / "sent.yaml")))
    assert graph.whole_fingerprint(graph.build(there)) == whole


def test_a_stage_that_asks_for_nothing_runs_on_the_head_as_a_job_of_its_own(ray: Any, path: Path) -> None:
    result = ok(send(path, ray, "--stage", "shards", "--set", "stages.shards.group_sources=7", "--detach"))
    (sent,) = ray.posted
    assert command(sent) == ["stage", "recipe.yaml", "shards"]
    assert re.fullmatch(r"longtake-small-shards-[0-9a-f]{12}", sent["submission_id"])
    assert not [key for key in sent if key.startswith("entrypoint_")]
    assert result.stdout == sent["submission_id"] + "\n"
    assert f"longtake jobs stop {sent['submission_id']} --address {ray.address}" in result.stderr


def test_labels_that_contradict_each_other_ask_for_jobs_of_their_own(ray: Any, path: Path) -> None:
    zones = {"shards": {"labels": {"zone": "eu"}}, "images": {"labels": {"zone": "us"}}}
    path = write(path.parent, deploy={"resources": zones})
    with pytest.raises(UserError, match=r"deploy\.resources\.images\.labels: zone: us contradicts.*--stage"):
        raise send(path, ray).exception or AssertionError
    assert not ray.posted
    ok(send(path, ray, "--stage", "shards"))


# one job for the same work


@pytest.mark.parametrize("status", ["PENDING", "RUNNING"])
def test_a_second_submission_attaches_to_the_job_that_runs(ray: Any, path: Path, status: str) -> None:
    ray.job(name_of(path), status)
    result = ok(send(path, ray, "--detach"))
    assert not ray.posted and f"is {status.lower()} already; attached to it" in result.stderr


def test_work_that_is_done_is_done_again_only_by_force(ray: Any, path: Path) -> None:
    ray.job(name_of(path), "SUCCEEDED", driver_exit_code=0)
    assert "nothing to do" in ok(send(path, ray)).stderr and not ray.posted
    ok(send(path, ray, "--force"))
    assert ray.posted[0]["submission_id"] == name_of(path) + "-2"
    assert command(ray.posted[0]) == ["run", "recipe.yaml", "--force"]


def test_after_a_failure_or_a_stop_another_try_is_made_and_the_latest_one_counts(ray: Any, path: Path) -> None:
    name = name_of(path)
    for number in range(2, 11):
        ray.job(f"{name}-{number}", "STOPPED")
    ray.job(name, "SUCCEEDED", driver_exit_code=0)
    ray.job(f"{name}0-11", "RUNNING")
    ray.job("raysubmit_abc", "RUNNING")
    ok(send(path, ray))
    assert [sent["submission_id"] for sent in ray.posted] == [f"{name}-11"]


def test_of_two_submissions_at_once_the_one_that_loses_attaches(ray: Any, path: Path) -> None:
    ray.lose_race = {"status": "RUNNING"}
    result = ok(send(path, ray, "--detach"))
    assert "started by another submission at this moment; attached to it" in result.stderr


def test_a_head_that_has_just_been_started_is_asked_again(ray: Any, path: Path) -> None:
    ray.starting = 2
    ok(send(path, ray))
    assert len(ray.posted) == 1


# the log and the end


def test_a_log_comes_once_and_whole_however_often_the_connection_breaks(ray: Any) -> None:
    ray.job("longtake-a", "SUCCEEDED", driver_exit_code=0)
    ray.logs["longtake-a"] = "".join(f"line {n}\n" for n in range(30))
    ray.cuts = [100, 57, 0, 150]
    result = ok(invoke(jobs_group, "logs", "longtake-a", "--address", ray.address, "--follow"))
    assert result.stdout == ray.logs["longtake-a"] and ray.connections == 5
    assert ok(invoke(jobs_group, "logs", "longtake-a", "--address", ray.address)).stdout == ray.logs["longtake-a"]


def test_a_connection_that_died_in_silence_does_not_hide_the_end(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_QUIET_SECONDS", 0.1)
    ray.job("longtake-a", "SUCCEEDED", driver_exit_code=0)
    ray.logs["longtake-a"] = "all\n"
    ray.endless = True
    assert ok(invoke(jobs_group, "logs", "longtake-a", "--address", ray.address, "--follow")).stdout == "all\n"


def test_a_dashboard_that_stays_away_is_said_with_the_job_that_may_still_run(
    ray: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "_ATTEMPTS", 3)
    ray.job("longtake-a", "RUNNING")
    client = jobs.client(ray.address)
    ray.close()
    with pytest.raises(Failure, match="lost the log of job longtake-a, which may still run") as error:
        jobs.follow(client, "longtake-a", print)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("status", "driver", "code", "said"),
    [
        ("SUCCEEDED", 0, 0, ""),
        ("FAILED", 1, 1, "ended with exit code 1"),
        ("FAILED", 2, 2, "ended with exit code 2"),
        ("FAILED", 130, 130, "ended with exit code 130"),
        ("FAILED", -9, 137, "ended with exit code 137"),
        ("STOPPED", None, 130, "was stopped"),
        ("FAILED", None, 1, "did not start: no room, it seems"),
    ],
)
def test_the_exit_code_is_the_jobs(ray: Any, path: Path, status: str, driver: int, code: int, said: str) -> None:
    ray.lose_race = {"status": status, "driver_exit_code": driver, "message": "no room,\nit seems"}
    result = send(path, ray)
    assert result.exit_code == code and said in result.stderr


def test_ctrl_c_leaves_the_job_running_and_says_how_to_come_back(ray: Any, path: Path) -> None:
    ray.job(name_of(path), "RUNNING")
    ray.logs[name_of(path)] = "begun\n"
    ray.endless = True

    def press() -> None:
        # once the log is being read, however long it takes until then
        while not ray.connections:
            time.sleep(0.05)
        time.sleep(0.5)
        os.kill(os.getpid(), signal.SIGINT)

    # a shell's background job ignores SIGINT, and pytest as one with it
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=press, daemon=True).start()
    try:
        result = send(path, ray)
    finally:
        signal.signal(signal.SIGINT, before)
    assert result.exit_code == 130 and result.stdout == "begun\n"
    assert f"goes on; watch it: longtake jobs logs {name_of(path)}" in result.stderr
    assert ray.jobs[name_of(path)]["status"] == "RUNNING"


def test_jobs_are_listed_and_stopped(ray: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray.job("raysubmit_abc", "RUNNING")
    ray.job("longtake-a", "FAILED", driver_exit_code=2, runtime_env={"env_vars": {"MY_KEY": "swordfish"}})
    ray.job("longtake-b", "RUNNING")
    monkeypatch.setenv("RAY_ADDRESS", ray.address + "/")
    lines = ok(invoke(jobs_group, "list")).stdout.splitlines()
    assert [line.split()[:2] for line in lines] == [["longtake-b", "RUNNING"], ["longtake-a", "FAILED"]]
    assert lines[1].endswith("exit 2") and "swordfish" not in "".join(lines)
    assert ok(invoke(jobs_group, "stop", "longtake-b", "--wait")).stdout == "longtake-b: stopped\n"
    assert ok(invoke(jobs_group, "stop", "longtake-a")).stdout == "longtake-a: failed\n"
    with pytest.raises(UserError, match=r"has no job longtake-c; `longtake jobs list`"):
        raise invoke(jobs_group, "logs", "longtake-c").exception or AssertionError


# what is refused before anything is sent


def refused(path: Path, served: Any, *more: str) -> str:
    error = send(path, served, *more).exception
    assert isinstance(error, UserError | Failure) and "\n" not in str(error)
    assert not served.posted
    return str(error)


def test_a_token_comes_from_a_variable_or_a_file_and_a_wrong_one_is_said_in_one_line(
    ray: Any, path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ray.token = TOKEN
    assert "needs a token; set RAY_AUTH_TOKEN" in refused(path, ray)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0123456789abcdef")
    said = refused(path, ray)
    assert "refuses the token" in said and "0123456789abcdef" not in said
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    first = ok(send(path, ray))
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / "token").write_text(TOKEN + "\n")
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "token"))
    second = ok(send(path, ray, "--force"))
    assert TOKEN not in first.output + second.output and TOKEN not in str(ray.posted)
    ray.posted.clear()
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "absent"))
    assert "absent: cannot be read (No such file or directory)" in refused(path, ray, "--force")


def test_an_address_where_no_ray_answers_is_said_in_one_line(
    ray: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"<html>a shop</html>")

        def log_message(self, *_: Any) -> None:
            pass

    shop = HTTPServer(("127.0.0.1", 0), Other)
    threading.Thread(target=shop.serve_forever, daemon=True).start()

    class At:
        posted: tuple[()] = ()
        address = f"http://127.0.0.1:{shop.server_port}"

    # Ray itself would go to the cluster that these name
    monkeypatch.setenv("RAY_ADDRESS", ray.address)
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", ray.address)
    assert "answers, but is no Ray dashboard" in refused(path, At)
    shop.shutdown()
    shop.server_close()
    assert "no Ray dashboard answers" in refused(path, At)
    At.address = "ray://127.0.0.1:10001"
    assert "is no dashboard's address; write http://HEAD:8265" in refused(path, At)


def test_the_address_that_is_given_wins_over_rays_variables(
    ray: Any, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "http://127.0.0.1:1")
    monkeypatch.setenv("RAY_API_SERVER_ADDRESS", "http://127.0.0.1:1")
    ok(send(path, ray))
    assert ray.posted and os.environ["RAY_ADDRESS"] == "http://127.0.0.1:1"


def test_without_an_address_it_asks_which_cluster(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_API_SERVER_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:6379")
    with pytest.raises(UserError, match="which cluster"):
        raise invoke(submit, path).exception or AssertionError


def test_another_minor_version_of_ray_is_refused(ray: Any, path: Path) -> None:
    ray.version = "2.59.3"
    assert "runs Ray 2.59.3, here is Ray 2.60.0" in refused(path, ray)
    ray.version = "2.60.9"
    ok(send(path, ray))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"deploy.resources.images": {"gpus": 2}},
            r"stage images: deploy\.resources\.images\.gpus: needs 2 GPU, no node of the cluster has more than 1",
        ),
        (
            {"deploy.resources.shards": {"cpus": 9}},
            r"stage shards: deploy\.resources\.shards\.cpus: needs 9 CPU.*than 4",
        ),
        ({"deploy.resources.shards": {"memory_bytes": 10**12}}, r"memory_bytes: needs 1e\+12 memory"),
        ({"deploy.resources.shards": {"custom": {"fast": 1}}}, r"custom\.fast: needs 1 fast, no node .* more than 0"),
        ({"deploy.resources.shards": {"cpus": 3, "gpus": 1}}, r"no single node of the cluster has all of 3 CPU, 1 GPU"),
        (
            {"deploy.resources.shards": {"labels": {"zone": "us"}}},
            r"shards\.labels: no node of the cluster is zone: us",
        ),
        ({"stages.shards.run.cpus": 5}, r"stage shards: stages\.shards\.run\.cpus: needs 5 CPU"),
        (
            {"stages.shards.run.cpus": 4, "deploy.resources.shards": {"cpus": 3}},
            r"run\.cpus: a task and the process of deploy\.resources\.shards need 7 CPU together, the cluster has 6",
        ),
        (
            {"stages.images.run.launcher": {"by": "ray", "processes": 3, "gpus": 1}},
            r"stage images: stages\.images\.run\.launcher: 3 processes of 1 CPU and 1 GPU.*has 6 CPU and 1 GPU on 2 nodes",
        ),
        (
            {"stages.images.run.launcher": {"by": "ray", "processes": 6}},
            r"images\.run\.launcher: 6 processes of 1 CPU, a spare CPU",
        ),
    ],
)
def test_what_the_cluster_lacks_is_said_with_stage_key_need_and_stock(
    ray: Any, path: Path, settings: dict[str, Any], said: str
) -> None:
    ray.nodes = [node(CPU=4.0, memory=8e9), node(CPU=2.0, GPU=1.0, memory=8e9)]
    ray.nodes.append(node(CPU=64.0, GPU=8.0, fast=1.0) | {"state": "DEAD"})
    settings = {"stages.images.batch": 6, **settings}
    more = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    assert re.search(said, refused(path, ray, *more))
    ok(send(path, ray, *more, "--no-check"))


def test_what_fits_is_not_refused(ray: Any, path: Path) -> None:
    ray.nodes = [node(CPU=4.0, memory=8e9), node(CPU=2.0, GPU=1.0, memory=8e9)]
    settings = ["deploy.resources.shards={cpus: 2}", "stages.shards.run.cpus=2", "stages.images.batch=3"]
    settings += ["stages.images.run.launcher={by: ray, processes: 3}", "deploy.resources.images={gpus: 1, cpus: 1}"]
    ok(send(path, ray, *[word for s in settings for word in ("--set", s)]))
    assert jobs.cluster_nodes(ray.address)[1] == {"CPU": 2.0, "GPU": 1.0, "memory": 8e9}


def test_a_whole_recipe_needs_a_node_for_the_most_of_all_its_stages_and_room_for_tasks_beside_that(
    ray: Any, path: Path
) -> None:
    ray.nodes = [node(CPU=4.0, memory=8e9), node(CPU=2.0, GPU=1.0, memory=8e9)]
    one_by_one = ["--set", "deploy.resources={shards: {cpus: 4}, images: {gpus: 1}}"]
    said = refused(path, ray, *one_by_one)
    assert "deploy.resources: no single node of the cluster has all of 4 CPU, 1 GPU" in said and "--stage" in said
    for stage in STAGES:
        ok(send(path, ray, *one_by_one, "--stage", stage))
    # null is a GPU where there is one, and `images` has it
    ray.posted.clear()
    latents = {"kind": "cache_latents", "dataset": "shards", "encoder": "images"}
    scores = {"kind": "score", "dataset": "shards", "scorers": {"light": {}}}
    resources = {"images": {"gpus": 1}}
    path = write(path.parent, stages=STAGES | {"scores": scores}, deploy={"resources": resources})
    ok(send(path, ray))
    ray.posted.clear()
    path = write(path.parent, stages=STAGES | {"latents": latents}, deploy={"resources": resources})
    assert "stages.latents.run.gpus: a task and the process of the whole recipe" in (said := refused(path, ray))
    assert "need 2 GPU together, the cluster has 1" in said
    ok(send(path, ray, "--stage", "latents"))
