"""Ray jobs over plain HTTP, as the DAG starts and watches them, and the graph that it is built from.

With a real Airflow: `make airflow-test` (tests/infra/airflow).
"""

import ast
import importlib.util
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from longtake.infra import graph as graphs
from longtake.infra import recipe as recipes

ROOT = Path(__file__).resolve().parents[2]
DAGS = ROOT / "infra" / "dags"


def by_path(path: Path) -> ModuleType:
    """A module that lies in no package."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module
    spec.loader.exec_module(module)
    return module


ray_jobs = by_path(DAGS / "ray_jobs.py")
FakeRay = by_path(Path(__file__).parent / "airflow" / "fake_ray.py").FakeRay
REQUEST = ray_jobs.request("longtake stage recipe.yaml vae", {})


def client(fake: Any) -> Any:
    return ray_jobs.Ray(fake.address, fake.token)


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(ray_jobs, "_FIRST_PAUSE", 0.01)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    it = FakeRay()
    yield it
    it.server.shutdown()
    it.server.server_close()


def test_a_job_that_runs_is_attached_to_and_an_ended_one_is_followed_by_the_next(fake: Any) -> None:
    ray = client(fake)
    assert ray_jobs.start(ray, "vae", REQUEST) == ("vae", False)
    assert ray_jobs.start(ray, "vae", REQUEST) == ("vae", True)
    for number, status in enumerate(ray_jobs.ENDED, start=2):
        fake.jobs[f"vae-{number - 1}" if number > 2 else "vae"]["status"] = status
        assert ray_jobs.start(ray, "vae", REQUEST) == (f"vae-{number}", False)
    assert [body["submission_id"] for method, _, body in fake.requests if method == "POST"] == [*fake.jobs]


@pytest.mark.parametrize("fault", ["drop", "500", "502", "503", "429", "lose the answer"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_whatever_breaks_when_a_job_is_started_there_is_one_job(fake: Any, fault: str, at: int) -> None:
    fake.faults = [""] * at + [fault]
    started = ray_jobs.patiently(lambda: ray_jobs.start(client(fake), "vae", REQUEST), 10)
    assert started.job == "vae" and [*fake.jobs] == ["vae"]


def test_who_loses_the_race_for_a_name_attaches(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    ray, real = client(fake), ray_jobs.find
    seen: list[Any] = []

    def late(*args: Any) -> Any:
        # another one starts it right after we have looked
        seen.append(real(*args))
        fake.jobs.setdefault("vae", {"status": "PENDING"})
        return seen[-1]

    monkeypatch.setattr(ray_jobs, "find", late)
    assert ray_jobs.start(ray, "vae", REQUEST) == ("vae", True)
    assert seen[0] is None


def test_patience_ends_and_says_who_did_not_answer(fake: Any) -> None:
    fake.faults = ["drop"] * 1000
    with pytest.raises(ray_jobs.RayError, match=rf"127\.0\.0\.1:{fake.port}: no answer") as raised:
        ray_jobs.patiently(lambda: ray_jobs.find(client(fake), "vae"), 0.2)
    assert raised.value.passing and len(fake.requests) > 2


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("401", "refuses the token: set RAY_AUTH_TOKEN"),
        ("403", "refuses the token"),
        ("404", "HTTP 404: something went wrong"),
        ("redirect", "HTTP 302"),
        ("html", "is no JSON: this is not Ray's dashboard"),
    ],
)
def test_what_no_second_try_mends_is_said_at_once_in_one_line(fake: Any, fault: str, says: str) -> None:
    fake.faults = [fault] * 10
    with pytest.raises(ray_jobs.RayError, match=says) as raised:
        ray_jobs.patiently(lambda: ray_jobs.start(client(fake), "vae", REQUEST), 10)
    assert not raised.value.passing and len(fake.requests) == 1 and "\n" not in str(raised.value)


def test_a_redirect_does_not_get_the_token(fake: Any) -> None:
    fake.faults = ["redirect"]
    with pytest.raises(ray_jobs.RayError):
        ray_jobs.find(client(fake), "vae")
    assert [path for _, path, _ in fake.requests] == ["/api/jobs/vae"]


def test_the_token_is_in_no_error_and_no_repr(fake: Any) -> None:
    ray = ray_jobs.Ray(fake.address, "a-wrong-token")
    with pytest.raises(ray_jobs.RayError) as raised:
        ray_jobs.find(ray, "vae")
    assert "a-wrong-token" not in str(raised.value) + repr(ray)


def test_a_local_file_is_no_address() -> None:
    with pytest.raises(ray_jobs.RayError, match="must begin with http"):
        ray_jobs.find(ray_jobs.Ray("file:///etc/passwd"), "vae")


def test_a_name_is_quoted_in_the_url(fake: Any) -> None:
    assert ray_jobs.find(client(fake), "a/b?c") is None
    assert fake.requests[0][1] == "/api/jobs/a%2Fb%3Fc"


def test_only_resources_that_are_asked_for_are_in_a_request() -> None:
    none = {"cpus": 0, "gpus": 0, "memory_bytes": 0, "custom": {}, "labels": {}}
    assert set(ray_jobs.request("x", {"A": "b"}, none)) == {"entrypoint", "runtime_env", "metadata"}
    asked = {"cpus": 4, "gpus": 1, "memory_bytes": 5, "custom": {"a100": 1}, "labels": {"zone": "eu"}}
    assert ray_jobs.request("x", {"A": "b"}, asked) == {
        "entrypoint": "x", "runtime_env": {"env_vars": {"A": "b"}}, "metadata": {},
        "entrypoint_num_cpus": 4, "entrypoint_num_gpus": 1, "entrypoint_memory": 5,
        "entrypoint_resources": {"a100": 1}, "entrypoint_label_selector": {"zone": "eu"},
    }  # fmt: skip


@given(st.lists(st.text("ab\r é", max_size=8), max_size=20), st.data())
def test_every_line_of_a_log_is_shown_once_however_it_comes_in(lines: list[str], data: st.DataObject) -> None:
    log = "".join(f"{line}\n" for line in lines)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(log)), max_size=5)))
    shown, seen = [], 0
    for cut in [*cuts, len(log)]:
        new, seen = ray_jobs.news(log[:cut], seen)
        shown += new
    assert shown == [line.rstrip("\r").split("\r")[-1] for line in lines]


def test_of_a_long_log_the_last_lines_are_shown() -> None:
    lines, seen = ray_jobs.news("".join(f"{n}\n" for n in range(1000)), 0)
    assert len(lines) == 201 and lines[0] == "(800 lines are left out)" and lines[-1] == "999"
    assert ray_jobs.news("".join(f"{n}\n" for n in range(1000)), seen)[0] == []


def test_an_end_is_said_with_its_exit_code_and_its_own_error() -> None:
    message = "Job entrypoint command failed with exit code 2, last available logs:\nstart\nerror: no such file\nbye"
    assert (
        ray_jobs.ending({"status": "FAILED", "driver_exit_code": 2, "message": message}) == "exit code 2: no such file"
    )
    gone = {"status": "FAILED", "driver_exit_code": None, "message": "The head node died"}
    assert ray_jobs.ending(gone) == "failed: The head node died"


def test_the_time_of_a_job_is_counted_from_its_submission_to_its_end() -> None:
    assert ray_jobs.seconds({"start_time": 1000 * (time.time() - 50)}) == pytest.approx(50, abs=5)
    assert ray_jobs.seconds({"start_time": 2000, "end_time": 9000}) == 7


def test_the_last_line_of_json_is_what_a_job_says() -> None:
    assert ray_jobs.last_json('{"a": 1}\n{"recipe": "x", "todo": []}\n{broken\nbye\n') == {"recipe": "x", "todo": []}
    with pytest.raises(ray_jobs.RayError, match="no line of JSON"):
        ray_jobs.last_json("nothing\n")


def test_the_dags_need_airflow_and_nothing_else() -> None:
    files = sorted(DAGS.glob("*.py"))
    assert len(files) == 3
    own = {path.stem for path in files}
    for path in files:
        names = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
        airflow = set() if path.stem == "ray_jobs" else {"airflow"}
        assert names <= sys.stdlib_module_names | own | airflow, f"{path.name}: {names}"


@pytest.mark.parametrize("name", recipes.builtin())
def test_the_graph_of_every_recipe_has_what_the_dag_reads(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("VIDEOS", "WORKSPACE", "CHECKPOINTS", "VAE", "WAN"):
        monkeypatch.setenv(variable, f"/nowhere/{variable.lower()}")
    loaded = recipes.load(name)
    graph = json.loads(json.dumps(graphs.describe(loaded, graphs.build(loaded))))
    assert graph["resolve"] == ["longtake", "resolve", name, "--to"]
    assert set(graph["deploy"]) >= {"env", "schedule", "retries", "stop_seconds"}
    assert set(graph["deploy"]["schedule"]) == {"cron", "assets"}
    names = [stage["name"] for stage in graph["stages"]]
    # tasks of the DAG's own
    assert not {"resolve", "report"} & set(names)
    for stage in graph["stages"]:
        # the third word of a command is the recipe: the resolved one comes there
        assert stage["command"][2] == graph["report"][2] == graph["path"] == name
        assert stage["timeout_seconds"] > 0 and set(stage["upstream"]) <= set(names)
        assert set(stage["resources"]) == {"cpus", "gpus", "memory_bytes", "custom", "labels"}
    assert sorted(graph["edges"]) == sorted([up, s["name"]] for s in graph["stages"] for up in s["upstream"])


@pytest.mark.slow
def test_a_real_ray_starts_attaches_stops_and_refuses(tmp_path: Path) -> None:
    servers = by_path(ROOT / "tests" / "infra" / "airflow" / "servers.py")
    with servers.processes(tmp_path) as them, servers.ray_head(them) as address:
        ray = ray_jobs.Ray(address, servers.TOKEN)
        with pytest.raises(ray_jobs.RayError, match="refuses the token"):
            ray_jobs.find(ray_jobs.Ray(address, "wrong"), "any")
        assert ray_jobs.find(ray, "any") is None
        sleeping = ray_jobs.request("echo $LIGHT; sleep 60", {"LIGHT": "on", "RAY_JOB_STOP_WAIT_TIME_S": "5"})
        assert ray_jobs.start(ray, "job", sleeping) == ("job", False)
        assert ray_jobs.start(ray, "job", sleeping) == ("job", True)
        with pytest.raises(ray_jobs.RayError, match=r"HTTP 500.*already exists") as raised:
            ray_jobs.call(ray, "POST", "/api/jobs/", {**sleeping, "submission_id": "job"})
        assert raised.value.passing
        servers.until("its log", 60, lambda: "on\n" in ray_jobs.logs(ray, "job"))
        found = ray_jobs.find(ray, "job")
        assert found and abs(found["start_time"] / 1000 - time.time()) < 120
        ray_jobs.stop(ray, "job")
        servers.until("its end", 30, lambda: ray_jobs.find(ray, "job")["status"] == "STOPPED")
        failing = ray_jobs.request("echo 'error: all is lost'; exit 3", {})
        assert ray_jobs.start(ray, "job", failing) == ("job-2", False)
        ended = servers.until("its end", 60, lambda: (j := ray_jobs.find(ray, "job-2"))["status"] == "FAILED" and j)
        assert ray_jobs.ending(ended) == "exit code 3: all is lost"
