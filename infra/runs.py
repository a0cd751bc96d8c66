"""The runs of stages in MLflow, the only run database: its place, finished runs, one run a stage."""

import json
import logging
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown, shown_within
from longtake.infra import sqlite_store
from longtake.infra.graph import Node, digest_with
from longtake.infra.recipe import Recipe
from longtake.training.config import TrainConfig
from longtake.training.registry.store import everything

_FINGERPRINT, _STAGE, _KIND, _OUTPUT, _URI, _ERROR = (
    f"longtake.{t}" for t in ("fingerprint", "stage", "kind", "output", "uri", "error")
)
RESUMED = "longtake.resumed"  # tag: when a run was last resumed, in milliseconds
_PARENT = "mlflow.parentRunId"
_MAX_CHARACTERS = 500  # of a parameter or tag


@dataclass(frozen=True)
class Run:
    """A stage's MLflow run."""

    id: str
    status: str  # RUNNING, FINISHED, FAILED or KILLED
    output: str  # the folder of the stage's work
    uri: str  # the stage's product; empty until it has finished
    seconds: float
    error: str


@dataclass(frozen=True)
class Runs:
    """The runs of an MLflow experiment."""

    client: Any
    experiment: str
    tracking_uri: str
    workspace: str

    def find(self, fingerprint: str) -> Run | None:
        """The finished run of a fingerprint, else the latest one, which can be resumed."""
        if run := sqlite_store.finished(self.tracking_uri, self.experiment, _FINGERPRINT, fingerprint):
            return _run(run.id, "FINISHED", run.start, run.end, run.tags, self.workspace)
        condition = f"tags.`{_FINGERPRINT}` = '{fingerprint}'"
        runs = self.client.search_runs([self.experiment], condition, order_by=["start_time DESC"])
        finished = [r for r in runs if r.info.status == "FINISHED"]
        if not runs:
            return None
        run, info = (finished or runs)[0], (finished or runs)[0].info
        return _run(info.run_id, info.status, info.start_time, info.end_time, run.data.tags, self.workspace)

    def finished(self, fingerprint: str) -> Run | None:
        run = self.find(fingerprint)
        return run if run and run.status == "FINISHED" else None

    def loss(self, model: str) -> str:
        """A sentence where a model's version, or its files on this machine's disks, are gone; else empty."""
        from longtake.training.registry import store as model_store

        if sqlite_store.has_model(self.tracking_uri, model):
            return ""
        client_of(self.tracking_uri)  # quiet from here on
        return model_store.missing(model)

    def was_deleted(self, fingerprint: str) -> bool:
        """Whether somebody has deleted a finished run of a fingerprint."""
        from mlflow.entities import ViewType

        condition = f"tags.`{_FINGERPRINT}` = '{fingerprint}' and attributes.status = 'FINISHED'"
        return bool(self.client.search_runs([self.experiment], condition, ViewType.DELETED_ONLY, max_results=1))

    def output_of(self, node: Node) -> str:
        """The output that a stage has worked in, or will."""
        run = self.find(node.fingerprint)
        return run.output if run else self._begun(node)

    def _begun(self, node: Node) -> str:
        """The output that a stage without a run works in: that of a training which it goes on with, else its own.

        It goes on with the latest run that trained the same, under whatever name and with whatever `MAY_CHANGE` settings, if
        possible with its own; not where one has finished with more steps.
        """
        same, beyond = self._trained(node)
        return next((output for output in same if output not in beyond), node.output)

    def _trained(self, node: Node) -> tuple[list[str], set[str]]:
        """Outputs of this workspace in which the same training has worked, and those where one has finished with more steps."""
        if not isinstance(node.config, TrainConfig):
            return [], set()
        condition = f"tags.`{_STAGE}` = '{node.name}' and tags.`{_KIND}` = '{node.kind}'"
        past = everything(self.client.search_runs, [self.experiment], condition, order_by=["start_time DESC"])
        digests = {run.info.run_id: digest_with(node, run.data.params) for run in past}
        same, beyond = list[str](), set[str]()
        for each in sorted(past, key=lambda run: digests[run.info.run_id] != node.digest):
            info, data = each.info, each.data
            run = _run(info.run_id, info.status, info.start_time, info.end_time, data.tags, self.workspace)
            if not run.output.startswith(f"{self.workspace}/"):
                continue
            if run.output.rpartition("/")[2].partition("-")[0] in digests.values():
                same.append(run.output)
            if run.status == "FINISHED" and int(data.params.get("steps", 0)) > node.config.steps:
                beyond.add(run.output)
        return same, beyond

    def open(self, node: Node, parent: str | None, fresh: bool = False) -> tuple[str, str]:
        """(run id, output) to work in: an unfinished run of the same fingerprint is resumed, unless `fresh`.

        A fresh run gets an output of its own, so that it starts from nothing and changes no earlier output; so does one with
        fewer steps than a training in its output has finished. A line says where it goes on in an output that is not its own.
        """
        run = None if fresh else self.find(node.fingerprint)
        # the output of a finished run is repaired in place
        output = node.output if fresh else run.output if run else self._begun(node)
        anew = fresh or output in self._trained(node)[1]
        if run and run.status != "FINISHED" and not anew:
            self.client.update_run(run.id, status="RUNNING")
            self.client.set_tag(run.id, _OUTPUT, output)
            self.client.set_tag(run.id, RESUMED, int(time.time() * 1000))
            return run.id, output
        tags = {"mlflow.runName": node.name, _FINGERPRINT: node.fingerprint, _STAGE: node.name, _KIND: node.kind}
        if anew:
            output = f"{node.output}-{secrets.token_hex(4)}"
        elif not run and output != node.output:
            print(f"{node.name}: goes on in {shown(output)}; --force begins anew", flush=True)
        tags |= {_OUTPUT: output} | ({_PARENT: parent} if parent else {})
        run_id = self.client.create_run(self.experiment, tags=tags).info.run_id
        for key, value in params_of(node.config.model_dump(mode="json")).items():
            self.client.log_param(run_id, key, value)
        return run_id, output

    def finish(self, run_id: str, result: Mapping[str, Any]) -> None:
        now = int(time.time() * 1000)
        for name, value in result.get("metrics", {}).items():
            self.client.log_metric(run_id, name, value, timestamp=now)
        self.log_json(run_id, "result.json", dict(result))
        self.client.set_tag(run_id, _URI, result["uri"])
        self.client.set_terminated(run_id, "FINISHED")

    def end(self, run_id: str, status: str, error: str) -> None:
        """Record how a run failed. If the store cannot record it, that is printed, so that the error itself still shows."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.set_tag(run_id, _ERROR, shown(error)[:_MAX_CHARACTERS])
            self.client.set_terminated(run_id, status)
        except MlflowException as e:
            reason = str(e).splitlines()[0]
            print(f"tracking: could not note that run {run_id} ended as {status} ({reason})", file=sys.stderr)

    def log_json(self, run_id: str, name: str, content: Any) -> None:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / name
            path.write_text(json.dumps(shown_within(content), indent=2, sort_keys=True, default=str))
            self.client.log_artifact(run_id, str(path))

    def open_parent(self, recipe: Recipe, fingerprint: str) -> str:
        """The run of the whole recipe; an unfinished one is resumed."""
        run = self.find(fingerprint)
        if run and run.status != "FINISHED":
            self.client.update_run(run.id, status="RUNNING")
            return run.id
        tags = {"mlflow.runName": recipe.name, _FINGERPRINT: fingerprint, _KIND: "recipe"}
        run_id = self.client.create_run(self.experiment, tags=tags).info.run_id
        self.client.log_text(run_id, shown(recipe.to_yaml()), "recipe.yaml")
        return run_id

    def metrics(self, run_id: str) -> tuple[dict[str, float], dict[str, list[tuple[int, float]]]]:
        """(last values, histories of the metrics with more than one step)."""
        last = dict(self.client.get_run(run_id).data.metrics)
        history = {}
        for name in last:
            points = [(m.step, m.value) for m in self.client.get_metric_history(run_id, name)]
            if len(points) > 1:
                # a resumed run may log a step twice: the later value counts
                history[name] = sorted(dict(points).items())
        return last, history

    def params(self, run_id: str) -> dict[str, str]:
        return dict(self.client.get_run(run_id).data.params)

    def download(self, run_id: str, name: str, folder: Path) -> Path | None:
        """Download a folder of artifacts; None if the run has none of this name."""
        if not any(a.path == name for a in self.client.list_artifacts(run_id)):
            return None
        return Path(self.client.download_artifacts(run_id, name, str(folder)))


def connect(recipe: Recipe) -> Runs:
    """Open the store: MLFLOW_TRACKING_URI if set, else sqlite and artifacts inside the workspace.

    Records of a workspace that was moved are updated; an experiment that was deleted is restored.

    Raises:
        UserError: no store can be reached or made.
        Failure: the disk is full or closed, or another program has locked the store.
    """
    uri = os.environ.get("MLFLOW_TRACKING_URI") or _sqlite_uri(recipe)
    os.environ |= {"MLFLOW_TRACKING_URI": uri, "MLFLOW_EXPERIMENT_NAME": recipe.name}
    with sqlite_store.opened_alone(uri):
        if known := sqlite_store.experiment(uri, recipe.name):
            sqlite_store.update_places(uri, recipe.workspace, known.artifacts)
            return Runs(_LateClient(uri), known.id, uri, recipe.workspace)
    from mlflow.exceptions import MlflowException

    try:
        with sqlite_store.opened_alone(uri):
            client = client_of(uri)
            # the first question makes the store create its tables
            experiment = client.get_experiment_by_name(recipe.name)
            if experiment is not None:
                sqlite_store.update_places(uri, recipe.workspace, experiment.artifact_location)
        if experiment is not None and experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
            print(f"MLflow: the experiment {recipe.name} was deleted; it is restored with its runs", file=sys.stderr)
        if experiment is None:
            # a server has a place of its own for artifacts
            location = None if uri.startswith("http") else storage.join(recipe.workspace, "artifacts")
            try:
                return Runs(client, client.create_experiment(recipe.name, location), uri, recipe.workspace)
            except MlflowException as e:
                # another process may just have made it
                experiment = client.get_experiment_by_name(recipe.name)
                if e.error_code != "RESOURCE_ALREADY_EXISTS" or experiment is None:
                    raise
        return Runs(client, experiment.experiment_id, uri, recipe.workspace)
    except MlflowException as e:
        message, where = shown(str(e).splitlines()[0]), shown(uri)
        if "readonly" in message or "disk" in message:
            raise Failure(f"{where}: {message}; free some space or choose another workspace") from e
        raise UserError(f"MLFLOW_TRACKING_URI={where}: {message}") from e


def _sqlite_uri(recipe: Recipe) -> str:
    """The URI of the store inside the workspace; creates the folder."""
    if not storage.is_local(recipe.workspace):
        raise UserError(
            f"{recipe.path}: workspace {recipe.workspace} is remote: set MLFLOW_TRACKING_URI to an MLflow server"
        )
    if match := re.search(r"[?%\x00-\x1f\ud800-\udfff]", recipe.workspace):
        raise UserError(
            f"{recipe.path}: workspace {recipe.workspace!a}: has {match[0]!a} in its path, where no sqlite store can lie;"
            " choose another path, or set MLFLOW_TRACKING_URI to a store elsewhere"
        )
    with storage.failing_clearly(recipe.workspace):
        Path(recipe.workspace).mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{recipe.workspace}/mlflow.db"


def client_of(uri: str) -> Any:
    """MLflow's client of a store, quiet and with few retries."""
    os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    from mlflow import MlflowClient, set_tracking_uri

    # it logs a stack trace for each error that it raises
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    set_tracking_uri(uri)
    return MlflowClient(uri)


class _LateClient:
    """MLflow's client of a store, made when it is first asked: MLflow takes a second to import."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    @cached_property
    def _client(self) -> Any:
        return client_of(self._uri)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._client, name)


def _run(run_id: str, status: str, start: int, end: int | None, tags: Mapping[str, str], workspace: str) -> Run:
    # MLflow keeps the end and the error of a run that was stopped and goes on
    ended = status != "RUNNING"
    seconds = (((end if ended else None) or time.time() * 1000) - start) / 1000
    output = tags.get(_OUTPUT, "")
    # an output is WORKSPACE/STAGE/DIGEST, and the workspace may have been moved since
    old_workspace = output.rsplit("/", 2)[0]
    output, uri = (storage.placed(url, old_workspace, workspace) for url in (output, tags.get(_URI, "")))
    return Run(run_id, status, output, uri, seconds, tags.get(_ERROR, "") if ended else "")


def params_of(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """The MLflow parameters of a config: `{"run.workers": "8"}`."""
    params: dict[str, str] = {}
    for key, value in config.items():
        text = shown(str(value))[:_MAX_CHARACTERS]
        params |= params_of(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": text}
    return params
