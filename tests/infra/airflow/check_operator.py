"""The operator's reactions to each answer of Ray; run by Airflow's own Python, without its servers."""

import asyncio
import json
import os
import sys
from types import SimpleNamespace
from typing import Any

import longtake_dag
import ray_operator
from airflow.sdk import AssetOrTimeSchedule, CronTriggerTimetable
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowNotFoundException,
    AirflowSkipException,
    AirflowTaskTimeout,
    DownstreamTasksSkipped,
    TaskDeferred,
)
from fake_ray import FakeRay

DEPLOY = {"env": ["LONGTAKE_CHECK", "NOT_SET"], "stop_seconds": 20.0}


def raised(kind: type[BaseException], action: Any, *arguments: Any) -> Any:
    try:
        action(*arguments)
    except kind as e:
        assert type(e) is kind, repr(e)
        return e
    raise AssertionError(f"no {kind.__name__}")


def context(todo: list[str] | None, pushed: dict[str, Any] | None = None) -> Any:
    resolved = None if todo is None else {"recipe": "s3://b/it's.yaml", "todo": todo}
    ti = SimpleNamespace(
        xcom_pull=lambda task_ids: resolved, xcom_push=lambda key, value: (pushed or {}).update(it=value)
    )
    return {"ti": ti, "dag": SimpleNamespace(dag_id="d"), "run_id": "r"}


def event(fake: FakeRay, trigger: Any) -> Any:
    """The last event of a trigger that went through the database."""
    kind, arguments = trigger.serialize()
    module, _, name = kind.rpartition(".")
    again = getattr(sys.modules[module], name)(**json.loads(json.dumps(arguments)))

    async def first() -> Any:
        return await anext(again.run())

    return asyncio.run(first()).payload


def check(fake: FakeRay) -> None:
    task = ray_operator.RayJob(
        task_id="vae", command=["longtake", "stage", "x", "vae"], deploy=DEPLOY, asks={"gpus": 1, "cpus": 0}
    )
    assert "already made" in str(raised(AirflowSkipException, task.execute, context(["view"])))
    assert "clear that one first" in str(raised(AirflowFailException, task.execute, context(None)))
    assert not fake.jobs
    report = ray_operator.RayJob(task_id="report", command=["longtake", "report", "x"], deploy=DEPLOY)
    raised(AirflowSkipException, report.execute, context([]))
    assert not fake.jobs
    raised(TaskDeferred, report.execute, context(["vae"]))
    fake.jobs.clear()
    first = raised(TaskDeferred, task.execute, context(["vae"]))
    (job,) = fake.jobs
    assert first.trigger.job == job and first.kwargs == {"attached": False}
    body = fake.requests[-1][2]
    assert body["entrypoint"] == "longtake stage 's3://b/it'\"'\"'s.yaml' vae" and body["entrypoint_num_gpus"] == 1
    variables = {"LONGTAKE_CHECK": "yes", "LONGTAKE_STOPPED_CODE": "130", "RAY_JOB_STOP_WAIT_TIME_S": "20"}
    assert body["runtime_env"] == {"env_vars": variables}
    assert raised(TaskDeferred, task.execute, context(["vae"])).kwargs == {"attached": True} and [*fake.jobs] == [job]

    for fault in ("drop", "503"):
        fake.faults = [fault] * 2
        fake.jobs[job] |= {"status": "SUCCEEDED"}
        assert event(fake, first.trigger)["status"] == "SUCCEEDED"
    fake.faults = ["drop"] * 1000
    assert "no answer" in event(fake, first.trigger)["error"]
    fake.faults = ["401"]
    assert "refuses the token" in event(fake, first.trigger)["error"]
    assert task.ended(context(["vae"]), {"job": job, "status": "SUCCEEDED"}, False) == job

    fake.jobs[job] |= {"status": "FAILED", "driver_exit_code": 3, "message": "x\nerror: all is lost\ny"}
    found = event(fake, first.trigger)
    assert str(raised(AirflowException, task.ended, {}, found, False)) == f"vae: job {job}: exit code 3: all is lost"
    second = raised(TaskDeferred, task.execute, context(["vae"]))
    assert second.trigger.job == f"{job}-2" and not second.kwargs["attached"]

    fake.jobs[f"{job}-2"]["status"] = "STOPPED"
    found = event(fake, second.trigger)
    assert "clear this task" in str(raised(AirflowFailException, task.ended, context(["vae"]), found, False))
    assert raised(TaskDeferred, task.ended, context(["vae"]), found, True).trigger.job == f"{job}-3"

    fake.jobs[f"{job}-3"]["start_time"] -= 60_000
    late = ray_operator.RayJobTrigger(f"{job}-3", 50)
    found = event(fake, late)
    assert found["timed_out"] and fake.jobs[f"{job}-3"]["status"] == "STOPPED"
    raised(AirflowTaskTimeout, task.ended, {}, found, False)
    raised(TaskDeferred, task.execute, context(["vae"]))
    asyncio.run(ray_operator.RayJobTrigger(f"{job}-4", None).on_kill())
    assert fake.jobs[f"{job}-4"]["status"] == "STOPPED"
    raised(TaskDeferred, task.execute, context(["vae"]))
    task.on_kill()
    assert fake.jobs[f"{job}-5"]["status"] == "STOPPED"
    fake.jobs.clear()
    assert "no such job" in event(fake, late)["error"]

    resolve = ray_operator.Resolve(
        task_id="resolve",
        command=["longtake", "resolve", "x", "--to"],
        folder="/w/recipes",
        stages=["a", "b"],
        deploy=DEPLOY,
    )
    started = raised(TaskDeferred, resolve.execute, context(None)).trigger.job
    (to,) = [body["entrypoint"] for _, _, body in fake.requests[-1:]]
    assert to.startswith("longtake resolve x --to /w/recipes/d-run-") and to.endswith(".yaml")
    for todo, skipped in ((["b"], ["a"]), ([], ["a", "b", "report"])):
        fake.log = f"noise\n{json.dumps({'recipe': '/w/u', 'workspace': '/w', 'todo': todo})}\n"
        pushed: dict[str, Any] = {"it": None}
        skip = raised(DownstreamTasksSkipped, resolve.result, context(None, pushed), started)
        assert skip.tasks == skipped and pushed["it"] == {"recipe": "/w/u", "todo": todo}
    fake.log = json.dumps({"recipe": "/w/u", "workspace": "/w", "todo": ["a", "b"]})
    assert resolve.result(context(None), started) == {"recipe": "/w/u", "todo": ["a", "b"]}
    # a job that finds another workspace than the graph's would leave its recipe where no other looks
    fake.log = json.dumps({"recipe": "/w/u", "workspace": "/tmp/ray/w", "todo": []})
    assert "is not the job's" in str(raised(AirflowFailException, resolve.result, context(None), started))

    assert longtake_dag.schedule({"cron": None, "assets": []}) is None
    assert isinstance(longtake_dag.schedule({"cron": "0 3 * * *", "assets": []}), CronTriggerTimetable)
    assert len(longtake_dag.schedule({"cron": None, "assets": ["s3://b/raw", "x"]}).objects) == 2
    assert isinstance(longtake_dag.schedule({"cron": "0 3 * * *", "assets": ["s3://b/raw"]}), AssetOrTimeSchedule)

    del os.environ["LONGTAKE_RAY_ADDRESS"]

    def unknown(_: str) -> Any:
        raise AirflowNotFoundException

    ray_operator.BaseHook.get_connection = unknown
    assert "Set LONGTAKE_RAY_ADDRESS" in str(raised(AirflowFailException, task.execute, context(["vae"])))


if __name__ == "__main__":
    server = FakeRay()
    os.environ |= {
        "LONGTAKE_RAY_ADDRESS": server.address, "RAY_AUTH_TOKEN": server.token, "LONGTAKE_RAY_PATIENCE_SECONDS": "2",
        "LONGTAKE_CHECK": "yes",
    }  # fmt: skip
    ray_operator._SETTLE = 0.0
    check(server)
    print("operator: well")
