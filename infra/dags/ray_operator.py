"""Airflow tasks that are Ray jobs. They wait in the triggerer, so that a week of training occupies no worker slot.

All components of Airflow import this file: put its folder on the PYTHONPATH of each (see README.md).
"""

import asyncio
import hashlib
import math
import os
import shlex
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray_jobs
from airflow.sdk import BaseHook, BaseOperator, Context
from airflow.sdk.exceptions import (
    AirflowException,
    AirflowFailException,
    AirflowNotFoundException,
    AirflowSkipException,
    AirflowTaskTimeout,
    DownstreamTasksSkipped,
)
from airflow.triggers.base import BaseTrigger, TriggerEvent
from ray_jobs import Ray, RayError

CONNECTION = "longtake_ray"
_WORKER_PATIENCE = 60.0  # seconds that a worker waits for Ray; the triggerer has more
# Airflow 3.3 takes a task for killed if it resumes before Airflow has noted the end of the process that deferred it. That
# takes [workers] min_heartbeat_interval (5 s) and a round of the scheduler.
_SETTLE = 10.0


def patience() -> float:
    """Seconds without an answer from Ray after which a task fails, to be retried later."""
    return float(os.environ.get("LONGTAKE_RAY_PATIENCE_SECONDS", "600"))


def of_environment() -> Ray | None:
    """The cluster of LONGTAKE_RAY_ADDRESS, with RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH; None if it is not set."""
    address = os.environ.get("LONGTAKE_RAY_ADDRESS")
    if not address:
        return None
    token = os.environ.get("RAY_AUTH_TOKEN", "")
    if not token and (path := os.environ.get("RAY_AUTH_TOKEN_PATH")):
        token = Path(path).read_text().strip()
    return Ray(address, token)


def of_connection(connection: Any) -> Ray:
    """The cluster of an Airflow connection: host, port, and its password as the token; `schema` may be https."""
    host = connection.host or ""
    address = host if "://" in host else f"{connection.schema or 'http'}://{host}"
    return Ray(f"{address}:{connection.port}" if connection.port else address, connection.password or "")


def job_name(dag: str, run: str, task: str) -> str:
    """The name of a task's jobs, the same in every try."""
    digest = hashlib.sha256("\n".join((dag, run, task)).encode()).hexdigest()
    return f"{dag}-{task}-{digest[:12]}"


class RayJobTrigger(BaseTrigger):
    """Waits for a job's end and copies its log into the task's. It can be restarted elsewhere without loss."""

    def __init__(self, job: str, timeout_seconds: float | None) -> None:
        super().__init__()
        self.job = job
        self.timeout_seconds = timeout_seconds

    def serialize(self) -> tuple[str, dict[str, Any]]:
        return "ray_operator.RayJobTrigger", {"job": self.job, "timeout_seconds": self.timeout_seconds}

    async def _ray(self) -> Ray:
        return of_environment() or of_connection(await BaseHook.aget_connection(CONNECTION))

    async def run(self) -> AsyncIterator[TriggerEvent]:
        start = time.monotonic()
        event = await self._wait_for_end()
        await asyncio.sleep(max(0.0, start + _SETTLE - time.monotonic()))
        yield TriggerEvent({"job": self.job} | event)

    async def _wait_for_end(self) -> dict[str, Any]:
        """The end of the job, as `status`, `why` and `timed_out`; or the `error` because of which it is not known."""
        ray = await self._ray()
        read, pause, stopping, answered = 0, 1.0, False, time.monotonic()
        while True:
            try:
                details = await asyncio.to_thread(ray_jobs.find, ray, self.job)
                if details is None:
                    return {"error": f"{ray.address}: Ray knows no such job: was the cluster started anew?"}
                ended = details["status"] in ray_jobs.ENDED
                read = await self._copy_log(ray, read, "\n" if ended else "")
                late = ray_jobs.seconds(details) > (self.timeout_seconds or math.inf)
                if ended:
                    return {"status": details["status"], "why": ray_jobs.ending(details)[:500], "timed_out": late}
                if late and not stopping:
                    await asyncio.to_thread(ray_jobs.stop, ray, self.job)
                    self.log.error("%s took more than %g s: told to stop", self.job, self.timeout_seconds)
                    stopping, pause = True, 1.0
                answered = time.monotonic()
            except RayError as e:
                if not e.passing or time.monotonic() - answered > patience():
                    return {"error": str(e)}
                self.log.warning("%s; asking again", e)
            await asyncio.sleep(pause)
            pause = ray_jobs.longer(pause)

    async def _copy_log(self, ray: Ray, read: int, end: str) -> int:
        """Copy the new lines of the log after `read` characters; returns the number of characters read."""
        try:
            log = await asyncio.to_thread(ray_jobs.logs, ray, self.job)
            lines, read = ray_jobs.news(log if log.endswith("\n") else log + end, read)
        except RayError as e:
            # the node with the log may be gone, though the job still runs or has ended
            lines = [f"(no log: {e})"]
        for line in lines:
            self.log.info("%s", line)
        return read

    async def on_kill(self) -> None:
        """Stop the job, since a user cleared or marked the task. A restart of the triggerer does not call this."""
        ray = await self._ray()
        await asyncio.to_thread(ray_jobs.patiently, lambda: ray_jobs.stop(ray, self.job), 20)
        self.log.info("%s: told to stop", self.job)


class RayJob(BaseOperator):
    """A task that runs as a Ray job.

    Args:
        command: the third word is the recipe, which the resolved recipe of the run replaces.
        deploy: `env` and `stop_seconds` of the graph.
        asks: `resources` of the graph's stage.
    """

    def __init__(
        self,
        *,
        command: Sequence[str],
        deploy: Mapping[str, Any],
        asks: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> None:
        super().__init__(**more)
        self.command = list(command)
        self.deploy = dict(deploy)
        self.asks = dict(asks or {})
        self._started: str | None = None

    def ray(self) -> Ray:
        try:
            return of_environment() or of_connection(BaseHook.get_connection(CONNECTION))
        except AirflowNotFoundException:
            line = (
                f"where is Ray? Set LONGTAKE_RAY_ADDRESS for all parts of Airflow, or add the connection {CONNECTION}"
            )
            raise AirflowFailException(line) from None

    def words(self, context: Context) -> list[str]:
        """The command of this run.

        Raises:
            AirflowSkipException: the stage has finished already.
            AirflowFailException: the task `resolve` has not ended well.
        """
        resolved = context["ti"].xcom_pull(task_ids="resolve")
        if not resolved:
            raise AirflowFailException("the task resolve of this run has not ended well: clear that one first")
        if not resolved["todo"] or self.task_id not in [*resolved["todo"], "report"]:
            raise AirflowSkipException("nothing to do: already made")
        return [*self.command[:2], resolved["recipe"], *self.command[3:]]

    def execute(self, context: Context) -> None:
        self._wait_for_job(context)

    def _wait_for_job(self, context: Context) -> None:
        dag, run = context["dag"].dag_id, context["run_id"]
        env = {name: os.environ[name] for name in self.deploy["env"] if name in os.environ}
        # so that a job which stops with its state saved, as its node goes away, does not exit with 0
        env["LONGTAKE_STOPPED_CODE"] = "130"
        env["RAY_JOB_STOP_WAIT_TIME_S"] = str(max(1, round(self.deploy["stop_seconds"])))
        metadata = {"dag": dag, "run": run, "task": self.task_id}
        request = ray_jobs.request(shlex.join(self.words(context)), env, self.asks, metadata)
        ray, name = self.ray(), job_name(dag, run, self.task_id)
        try:
            self._started, attached = ray_jobs.patiently(
                lambda: ray_jobs.start(ray, name, request), min(patience(), _WORKER_PATIENCE)
            )
        except RayError as e:
            raise (AirflowException if e.passing else AirflowFailException)(str(e)) from None
        self.log.info("%s: %s", self._started, "it runs already: waiting for it" if attached else request["entrypoint"])
        seconds = self.execution_timeout.total_seconds() if self.execution_timeout else None
        trigger = RayJobTrigger(self._started, seconds)
        self.defer(trigger=trigger, method_name="ended", kwargs={"attached": attached})

    def ended(self, context: Context, event: Mapping[str, Any], attached: bool) -> Any:
        """Finish the task after its wait."""
        job = event["job"]
        if error := event.get("error"):
            raise AirflowException(f"{self.task_id}: job {job}: {error}")
        if event["status"] == "SUCCEEDED":
            return self.result(context, job)
        if event["timed_out"]:
            raise AirflowTaskTimeout(f"{self.task_id}: job {job} took more than {self.execution_timeout}: stopped")
        if event["status"] == "STOPPED":
            if attached:
                # this task attached to a job that was already being stopped for a cleared task
                return self._wait_for_job(context)
            raise AirflowFailException(f"{self.task_id}: job {job} was stopped; clear this task to go on")
        raise AirflowException(f"{self.task_id}: job {job}: {event['why']}")

    def result(self, context: Context, job: str) -> Any:
        """The task's result for other tasks: ids and URLs only."""
        return job

    def on_kill(self) -> None:
        if self._started:
            ray_jobs.stop(self.ray(), self._started)


class Resolve(RayJob):
    """Pins the sources of a run, and skips all stages that have finished. Its `command` ends before the URL."""

    def __init__(self, *, folder: str, stages: Sequence[str], **more: Any) -> None:
        super().__init__(**more)
        self.folder = folder
        self.stages = list(stages)

    def words(self, context: Context) -> list[str]:
        name = job_name(context["dag"].dag_id, context["run_id"], "run")
        return [*self.command, f"{self.folder}/{name}.yaml"]

    def result(self, context: Context, job: str) -> Any:
        ray = self.ray()
        try:
            output = ray_jobs.last_json(ray_jobs.patiently(lambda: ray_jobs.logs(ray, job), _WORKER_PATIENCE))
        except RayError as e:
            raise AirflowException(f"{self.task_id}: job {job}: {e}") from None
        workspace, todo = output["workspace"], output["todo"]
        if not output["recipe"].startswith(workspace):
            line = f"the graph's workspace is not the job's, {workspace}: write a whole path or URL in the recipe"
            raise AirflowFailException(f"{self.task_id}: job {job}: {line}")
        resolved = {"recipe": output["recipe"], "todo": todo}
        finished = [name for name in self.stages if name not in todo]
        for name in self.stages:
            self.log.info("%s: %s", name, "nothing to do: already made" if name in finished else "to do")
        if not finished:
            return resolved
        context["ti"].xcom_push(key="return_value", value=resolved)
        raise DownstreamTasksSkipped(tasks=finished if todo else [*finished, "report"])
