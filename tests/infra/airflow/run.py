"""`make airflow-test`: a real Airflow runs the DAGs on a real Ray. Some minutes; nothing is left behind."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from servers import BIN, DAGS, TOKEN, VENV, Airflow, Wire, clean_env, make_venv, processes, ray_head, remove, until

LIMIT_SECONDS = 900
RECIPE = """
name: small
workspace: {workspace}
stages:
  shards:
    kind: shard
    sources: [{videos}]
    clip: {{short_side: 32, fps: 12, max_seconds: 3}}
    val_fraction: 0.2
    group_sources: 2
  view:
    kind: curate
    dataset: shards
deploy:
  # the run of the last such hour is made up for, at once
  schedule: {{cron: "0 {hour} * * *"}}
  retries: 1
"""
# a recipe whose one stage waits for a file, so that things can be done to it meanwhile
WAIT = """
import json, pathlib, signal, sys, time
folder = pathlib.Path(__file__).parent
name = sys.argv[1]
if name == "resolve":
    print(json.dumps({"recipe": sys.argv[-1], "workspace": sys.argv[-1][:2], "todo": ["hold"]}))
    sys.exit()
def note(what):
    with (folder / "notes").open("a") as f:
        print(what, file=f)
def stop(*_):
    note("told to stop")
    sys.exit(130)
signal.signal(signal.SIGTERM, stop)
note("started")
print("holding on", flush=True)
while not (folder / "go").exists():
    time.sleep(0.2)
note("ended")
"""


def longtake(*words: str) -> str:
    done = subprocess.run(
        [str(BIN / "longtake"), *words], env=clean_env(OMP_NUM_THREADS="1"), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def waiting(folder: Path, timeout: float, retries: int) -> dict[str, Any]:
    """The graph of the recipe that waits."""
    folder.mkdir()
    (folder / "wait.py").write_text(WAIT)
    word = [str(BIN / "python"), str(folder / "wait.py")]
    stage = {
        "name": "hold", "kind": "hold", "inputs": {}, "upstream": [], "fingerprint": "", "output": "",
        "command": [*word, "recipe", "hold"], "resources": {"cpus": 1}, "timeout_seconds": timeout,
    }  # fmt: skip
    return {
        "recipe": folder.name, "path": "recipe", "workspace": str(folder), "fingerprint": "", "stages": [stage], "edges": [],
        "resolve": [*word, "resolve"], "report": ["true", "report", "recipe"],
        "deploy": {"env": [], "image": None, "schedule": {"cron": None, "assets": []}, "retries": retries, "stop_seconds": 20},
    }  # fmt: skip


def unpause(airflow: Airflow, dag: str) -> None:
    airflow.api("PATCH", f"/{dag}", {"is_paused": False})


def tars(workspace: Path) -> dict[str, float]:
    return {str(p): p.stat().st_mtime for p in workspace.glob("shards/*/*/*.tar")}


def sources(workspace: Path) -> int:
    """Videos that the dataset gives an account of."""
    script = (
        "import sys\nfrom longtake.pipeline import plan\n"
        "print(sum(len(plan.sources_of(sys.argv[1], group)) for group in plan.groups(sys.argv[1])))"
    )
    (dataset,) = workspace.glob("shards/*")
    done = subprocess.run([str(BIN / "python"), "-P", "-c", script, str(dataset)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def the_operator_does_the_right_thing_with_each_answer(airflow: Airflow, **_: Any) -> None:
    here = Path(__file__).parent
    env = airflow.env | {"PYTHONPATH": f"{DAGS}:{here}", "LONGTAKE_GRAPHS": str(here)}
    command = [str(VENV / "bin" / "python"), str(here / "check_operator.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr


def the_dags_are_the_graphs(airflow: Airflow, graph: dict[str, Any], **_: Any) -> None:
    def parsed() -> Any:
        errors = airflow.call("GET", "/api/v2/importErrors")["import_errors"]
        assert not errors, errors
        return airflow.api("GET", "/small")

    until("the DAG", 120, parsed)
    tasks = airflow.api("GET", "/small/tasks")["tasks"]
    edges = {(t["task_id"], down) for t in tasks for down in t["downstream_task_ids"]}
    named = {(a, b) for a, b in graph["edges"]}
    assert named <= edges and edges - named == {("resolve", "shards"), ("view", "report")}, edges
    assert {t["task_id"] for t in tasks} == {"resolve", "shards", "view", "report"}


def a_scheduled_run_goes_end_to_end(airflow: Airflow, workspace: Path, wire: Wire, **_: Any) -> None:
    unpause(airflow, "small")
    runs = until("the scheduled run", 180, lambda: airflow.api("GET", "/small/dagRuns")["dag_runs"])
    assert [run["run_type"] for run in runs] == ["scheduled"], runs
    ended = airflow.ended("small", runs[0]["dag_run_id"], 240)
    assert ended["state"] == "success", airflow.log("shards")[-4000:]
    assert set(airflow.states("small", runs[0]["dag_run_id"]).values()) == {"success"}
    assert tars(workspace) and (workspace / "report.html").exists() and sources(workspace) == 6
    assert [job.split("-")[1] for job in wire.posted] == ["resolve", "shards", "view", "report"], wire.posted
    assert "shards: " in airflow.log("shards"), "the job's log is in the task's"


def a_run_without_new_data_does_nothing_within_a_minute(
    airflow: Airflow, workspace: Path, wire: Wire, **_: Any
) -> None:
    before, jobs = tars(workspace), len(wire.posted)
    for run in ("idle-1", "idle-2"):
        airflow.trigger("small", run)
    runs = [airflow.ended("small", run, 180) for run in ("idle-1", "idle-2")]
    for run in runs:
        assert run["state"] == "success"
        assert airflow.states("small", run["dag_run_id"]) == {
            "resolve": "success", "shards": "skipped", "view": "skipped", "report": "skipped",
        }  # fmt: skip
        took = datetime.fromisoformat(run["end_date"]) - datetime.fromisoformat(run["start_date"])
        print(f"  a run without new data took {took.total_seconds():.0f} s")
        assert took < timedelta(minutes=1)
    first, second = sorted(runs, key=lambda r: r["start_date"])
    assert first["end_date"] <= second["start_date"], "one after the other"
    assert tars(workspace) == before and len(wire.posted) == jobs + 2
    assert "shards: nothing to do: already made" in airflow.log("resolve")


def five_new_videos_are_the_only_ones_sharded(airflow: Airflow, workspace: Path, videos: Path, **_: Any) -> None:
    before = tars(workspace)
    longtake("footage", str(videos.parent / "more"), "--count", "5", "--seconds", "4", "--seed", "7")
    for path in (videos.parent / "more").glob("*.mp4"):
        path.rename(videos / f"new-{path.name}")
    airflow.trigger("small", "five")
    assert airflow.ended("small", "five", 240)["state"] == "success", airflow.log("shards")[-4000:]
    after = tars(workspace)
    assert before.items() <= after.items() and len(after) > len(before)
    assert sources(workspace) == 11


def _hold(airflow: Airflow, folder: Path, run: str, dag: str = "hold") -> Callable[[], list[str]]:
    """Start a run of the recipe that waits, and wait for its task to wait."""
    for name in ("notes", "go"):
        (folder / name).unlink(missing_ok=True)
    airflow.trigger(dag, run)

    def notes() -> list[str]:
        return (folder / "notes").read_text().split("\n")[:-1] if (folder / "notes").exists() else []

    until("the job", 90, notes)
    until("the wait", 60, lambda: airflow.task(dag, run, "hold")["state"] == "deferred")
    return notes


def a_killed_triggerer_and_a_retry_attach_again(airflow: Airflow, holding: Path, wire: Wire, **_: Any) -> None:
    unpause(airflow, "hold")
    jobs = len(wire.posted)
    notes = _hold(airflow, holding, "attach")
    airflow.them.kill("triggerer")
    airflow.part("triggerer")
    wire.cut = True
    until("the retry", 180, lambda: airflow.task("hold", "attach", "hold")["state"] == "up_for_retry")
    wire.cut = False
    until("the second try", 180, lambda: airflow.task("hold", "attach", "hold")["state"] == "deferred")
    (holding / "go").touch()
    assert airflow.ended("hold", "attach", 120)["state"] == "success", airflow.log("hold")[-4000:]
    assert notes() == ["started", "ended"] and airflow.task("hold", "attach", "hold")["try_number"] == 2
    assert [job.split("-")[1] for job in wire.posted[jobs:]] == ["resolve", "hold", "report"], wire.posted[jobs:]
    assert "it runs already: waiting for it" in airflow.log("hold")


def a_cleared_task_stops_its_job_and_starts_the_next(airflow: Airflow, holding: Path, wire: Wire, **_: Any) -> None:
    notes = _hold(airflow, holding, "cleared")
    body = {
        "dry_run": False,
        "task_ids": ["hold"],
        "dag_run_id": "cleared",
        "only_failed": False,
        "only_running": False,
    }
    airflow.api("POST", "/hold/clearTaskInstances", body)
    until("the next job", 150, lambda: notes() == ["started", "told to stop", "started"])
    (holding / "go").touch()
    assert airflow.ended("hold", "cleared", 120)["state"] == "success", airflow.log("hold")[-4000:]
    assert wire.posted[-2].endswith("-2"), wire.posted[-3:]


def a_task_that_takes_too_long_is_stopped(airflow: Airflow, late: Path, **_: Any) -> None:
    unpause(airflow, "late")
    notes = _hold(airflow, late, "late", "late")
    assert airflow.ended("late", "late", 120)["state"] == "failed"
    assert notes() == ["started", "told to stop"]
    assert "took more than 8 s: told to stop" in airflow.log("hold")


def no_token_is_written_anywhere(airflow: Airflow, **_: Any) -> None:
    home = Path(airflow.env["AIRFLOW_HOME"])
    found = [
        str(p)
        for p in [*home.rglob("*"), *home.parent.glob("*.log")]
        if p.is_file() and TOKEN.encode() in p.read_bytes()
    ]
    assert not found, found


SCENES = (
    the_dags_are_the_graphs,
    the_operator_does_the_right_thing_with_each_answer,
    a_scheduled_run_goes_end_to_end,
    a_run_without_new_data_does_nothing_within_a_minute,
    five_new_videos_are_the_only_ones_sharded,
    a_killed_triggerer_and_a_retry_attach_again,
    a_cleared_task_stops_its_job_and_starts_the_next,
    a_task_that_takes_too_long_is_stopped,
    no_token_is_written_anywhere,
)


def main() -> None:
    def too_long(*_: Any) -> None:
        raise TimeoutError(f"not done within {LIMIT_SECONDS} s")

    signal.signal(signal.SIGALRM, too_long)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    make_venv()
    signal.alarm(LIMIT_SECONDS)
    begin = time.monotonic()
    folder = Path(tempfile.mkdtemp(prefix="airflow-test-"))
    kept = bool(os.environ.get("LONGTAKE_KEEP"))
    try:
        videos, workspace, graphs = folder / "videos", folder / "workspace", folder / "graphs"
        graphs.mkdir()
        longtake("footage", str(videos), "--count", "6", "--seconds", "4")
        (folder / "waits").mkdir()
        holding, late = folder / "waits" / "hold", folder / "waits" / "late"
        for path, graph in ((holding, waiting(holding, 600, 1)), (late, waiting(late, 8, 0))):
            (graphs / f"{path.name}.json").write_text(json.dumps(graph))
        with processes(folder) as them, ray_head(them) as head:
            wire = Wire(head)
            airflow = Airflow(them, folder / "airflow", graphs, wire.address)
            airflow.start()
            recipe = folder / "small.yaml"
            hour = (datetime.now(UTC) - timedelta(hours=12)).hour
            recipe.write_text(RECIPE.format(workspace=workspace, videos=videos, hour=hour))
            (graphs / "small.json").write_text(longtake("graph", str(recipe), "--json"))
            things = {
                "airflow": airflow, "wire": wire, "workspace": workspace, "videos": videos, "holding": holding, "late": late,
                "graph": json.loads((graphs / "small.json").read_text()),
            }  # fmt: skip
            print(f"started in {time.monotonic() - begin:.0f} s", flush=True)
            # the first words of the command choose scenes: `run.py retry cleared`
            chosen = [
                s for s in SCENES if s is SCENES[0] or not sys.argv[1:] or any(w in s.__name__ for w in sys.argv[1:])
            ]
            for scene in chosen:
                start = time.monotonic()
                scene(**things)
                print(f"{scene.__name__.replace('_', ' ')}: {time.monotonic() - start:.0f} s", flush=True)
        print(f"all well in {time.monotonic() - begin:.0f} s")
    except BaseException:
        print(f"what happened is in {folder}", file=sys.stderr)
        kept = True
        raise
    finally:
        if not kept:
            remove(folder)


if __name__ == "__main__":
    main()
