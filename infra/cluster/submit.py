"""Recipes as Ray jobs: the resources of a job, those of the cluster, and one job at a time for the same work.

A job gets the recipe with all defaults and digests written out, and a wheel of this code without dependencies, which are
in the image of the cluster's nodes.
"""

import math
import re
import shlex
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.datasets.errors import UserError
from longtake.datasets.stage import RUN
from longtake.infra import graph, stages
from longtake.infra.cluster import jobs, wheel
from longtake.infra.deploy import Deploy, Resources, environment
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.pipeline.cluster import TaskConfig
from longtake.training.config import TrainConfig

_FILE = "recipe.yaml"
_STARTING = "No available agent"  # the answer of a head that has just been started
_START_SECONDS = 60.0
_NOT_EQUAL = ("!", "in(")  # the beginnings of Ray's label selectors other than plain values


@dataclass(frozen=True)
class Work:
    """One stage or a whole graph, as a job."""

    name: str  # of the job; later tries end in -2, -3 ...
    fingerprint: str
    nodes: list[Node]
    arguments: list[str]  # of `longtake`
    resources: Resources


@dataclass(frozen=True)
class Submitted:
    """The result of a submission."""

    job: str
    how: str  # new, attached or done
    note: str = ""


def work(recipe: Recipe, stage: str | None) -> Work:
    """The job of one stage, or of all of them. Raises UserError if labels of stages contradict each other."""
    nodes = graph.build(recipe)
    if stage is None:
        fingerprint = graph.whole_fingerprint(nodes)
        parts, arguments = [recipe.name], ["run", _FILE]
        resources = _largest(recipe, [n.name for n in nodes])
    else:
        node = graph.select(nodes, stage, recipe)
        nodes, fingerprint = [node], node.fingerprint
        parts, arguments = [recipe.name, stage], ["stage", _FILE, stage]
        resources = recipe.deploy.of(stage)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", "-".join(["longtake", *parts, fingerprint[:12]]))
    return Work(name, fingerprint, nodes, arguments, resources)


def _largest(recipe: Recipe, names: Sequence[str]) -> Resources:
    """The resources of one process that runs all these stages, one after the other."""
    resources = {name: recipe.deploy.of(name) for name in names}
    labels: dict[str, str] = {}
    for name, request in resources.items():
        for label, value in request.labels.items():
            if labels.setdefault(label, value) != value:
                raise UserError(
                    f"{recipe.path}: deploy.resources.{name}.labels: {label}: {value} contradicts the {labels[label]} of"
                    " another stage; submit them one by one with --stage"
                )
    custom: dict[str, float] = {}
    for request in resources.values():
        custom |= {key: max(amount, custom.get(key, 0)) for key, amount in request.custom.items()}
    return Resources(
        cpus=max(r.cpus for r in resources.values()),
        gpus=max(r.gpus for r in resources.values()),
        memory_bytes=max(r.memory_bytes for r in resources.values()),
        custom=custom,
        labels=labels,
    )


# Resources that the cluster lacks: Ray would wait for them forever.


def lacking(
    nodes: Sequence[Node],
    deploy: Deploy,
    cluster: list[dict[str, float]],
    labels: list[dict[str, str]] | None = None,
    held: Resources | None = None,
) -> list[str]:
    """The resources that stages ask for and a cluster lacks, in lines `stage NAME: KEY: what it needs and what there is`.

    Args:
        cluster: resources of each node, as `cluster_nodes` gives them.
        labels: labels of the same nodes, as `cluster_labels` gives them; None: labels are not checked.
        held: what the job of these stages has for itself while each of them runs; None: of each what it asks for itself.
    """
    shortages = {n.name: _no_room(f"deploy.resources.{n.name}", deploy.of(n.name), cluster, labels) for n in nodes}
    if any(shortages.values()):
        # no job could hold that
        held = None
    if held and (line := _no_room("deploy.resources", held, cluster, labels)):
        return [f"{line}; the job of a whole recipe holds the most of all stages: submit them one by one with --stage"]
    for node in nodes:
        own = deploy.of(node.name)
        whose = (
            f"deploy.resources.{node.name}" if held in (None, own) else "the whole recipe (--stage submits one alone)"
        )
        reserved = _bundle(held or own)
        shortages[node.name] = (
            shortages[node.name]
            or _lacks_for_tasks(node, reserved, whose, cluster)
            or _lacks_for_ranks(node, reserved, cluster)
        )
    return [f"stage {name}: {shortage}" for name, shortage in shortages.items() if shortage]


def task_of(node: Node) -> TaskConfig | None:
    """What a Ray task of a stage asks for; None where it has none. Its `gpus` of None are 1 if the cluster has any."""
    module = stages.load(node.kind)
    task = module.task(node.config) if hasattr(module, "task") else getattr(node.config, RUN, None)
    return task if isinstance(task, TaskConfig) else None


Bundle = dict[str, tuple[str, float]]  # key in the config -> (Ray's name of the resource, amount)


def _bundle(config: Any) -> Bundle:
    bundle = {"cpus": ("CPU", config.cpus), "gpus": ("GPU", getattr(config, "gpus", None) or 0)}
    bundle |= {"memory_bytes": ("memory", getattr(config, "memory_bytes", 0))}
    bundle |= {f"custom.{name}": (name, amount) for name, amount in getattr(config, "custom", {}).items()}
    return {key: (name, amount) for key, (name, amount) in bundle.items() if amount}


def _no_room(
    where: str, asked: Resources, cluster: list[dict[str, float]], labels: list[dict[str, str]] | None
) -> str | None:
    return _no_node_has(where, _bundle(asked), cluster) or _no_node_is(f"{where}.labels", asked.labels, labels)


def _no_node_has(where: str, bundle: Bundle, cluster: list[dict[str, float]]) -> str | None:
    if any(all(node.get(name, 0) >= amount for name, amount in bundle.values()) for node in cluster):
        return None
    for key, (name, amount) in bundle.items():
        most = max((node.get(name, 0) for node in cluster), default=0)
        if most < amount:
            return f"{where}.{key}: needs {amount:g} {name}, no node of the cluster has more than {most:g}"
    amounts = ", ".join(f"{amount:g} {name}" for name, amount in bundle.values())
    return f"{where}: no single node of the cluster has all of {amounts}" if bundle else None


def _no_node_is(where: str, selectors: dict[str, str], labels: list[dict[str, str]] | None) -> str | None:
    values = {name: value for name, value in selectors.items() if not value.startswith(_NOT_EQUAL)}
    if labels is None or any(all(node.get(n) == value for n, value in values.items()) for node in labels):
        return None
    return f"{where}: no node of the cluster is {', '.join(f'{name}: {value}' for name, value in values.items())}"


def _lacks_for_tasks(node: Node, own: Bundle, whose: str, cluster: list[dict[str, float]]) -> str | None:
    """The resources that the Ray tasks of a stage lack, beside the process that has its own."""
    task = task_of(node)
    if task is None:
        return None
    bundle = _bundle(task)
    if getattr(task, "gpus", 0) is None and any(n.get("GPU") for n in cluster):
        bundle["gpus"] = ("GPU", 1.0)
    where = f"stages.{node.name}.{RUN}"
    if shortage := _no_node_has(where, bundle, cluster):
        return shortage
    reserved = dict(own.values())
    for key, (name, amount) in bundle.items():
        needed, total = amount + reserved.get(name, 0), sum(n.get(name, 0) for n in cluster)
        if needed > total:
            return (
                f"{where}.{key}: a task and the process of {whose} need {needed:g} {name} together,"
                f" the cluster has {total:g}"
            )
    return None


def _lacks_for_ranks(node: Node, own: Bundle, cluster: list[dict[str, float]]) -> str | None:
    """The resources that the ranks of a stage lack. One CPU is left for reading data, as when they start."""
    if not isinstance(node.config, TrainConfig) or node.config.run.launcher.by != "ray":
        return None
    launcher = node.config.run.launcher
    ranks, amounts = launcher.processes, list(_bundle(launcher).values())
    reserved = dict(own.values())
    reserved["CPU"] = reserved.get("CPU", 0) + 1
    room = sum(min(int(n.get(name, 0) / amount + 1e-6) for name, amount in amounts) for n in cluster)
    total = {name: sum(n.get(name, 0) for n in cluster) for name in ("CPU", "GPU")}
    if room >= ranks and all(total[name] >= ranks * amount + reserved.get(name, 0) for name, amount in amounts):
        return None
    each = " and ".join(f"{amount:g} {name}" for name, amount in amounts)
    return (
        f"stages.{node.name}.run.launcher: {ranks} processes of {each}, a spare CPU and what deploy.resources asks do"
        f" not fit: the cluster has {total['CPU']:g} CPU and {total['GPU']:g} GPU on {len(cluster)} nodes"
    )


# Submission.


def submit(client: Any, recipe: Recipe, stage: str | None, force: bool = False, check: bool = True) -> Submitted:
    """Get the work done once: start a job, or name the job that is doing it or has done it.

    Args:
        client: from `jobs.client`.
        force: start a job even if the work has been done, and do it again.
        check: refuse work that no node has room for.

    Raises:
        UserError: the cluster lacks something.
        Failure: Ray refuses the job.
    """
    todo = work(recipe, stage)
    tries = jobs.tries(client, todo.name)
    latest = tries[-1] if tries else None
    if latest and not latest.status.is_terminal():
        return Submitted(latest.submission_id, "attached", f"is {latest.status.value.lower()} already")
    if latest and latest.status == "SUCCEEDED" and not force:
        return Submitted(latest.submission_id, "done", "has done this work already")
    if check:
        address = client.get_address()
        cluster, labels = jobs.cluster_nodes(address), jobs.cluster_labels(address)
        shortages = lacking(todo.nodes, recipe.deploy, cluster, labels, todo.resources)
        if shortages:
            more = f" (and {len(shortages) - 1} more)" if len(shortages) > 1 else ""
            raise UserError(
                f"{shortages[0]}{more}; lower it, add nodes, or use --no-check where they come by themselves"
            )
    number = int(latest.submission_id.removeprefix(todo.name).lstrip("-") or 1) + 1 if latest else 1
    return _post(client, recipe, todo, f"{todo.name}-{number}" if latest else todo.name, force)


def _post(client: Any, recipe: Recipe, todo: Work, job: str, force: bool) -> Submitted:
    resources = todo.resources
    with tempfile.TemporaryDirectory() as scratch:
        # on the workers' sys.path: nothing in it may have a package's name
        folder = Path(scratch) / "recipe"
        folder.mkdir()
        (folder / _FILE).write_text(recipe.to_yaml())
        code = wheel.build(Path(scratch))
        request = {
            "submission_id": job,
            "entrypoint": _command([*todo.arguments, *(["--force"] if force else [])]),
            "runtime_env": {
                "working_dir": str(folder),
                "py_modules": [str(code)],
                "env_vars": environment(recipe.deploy) | stop_variables(recipe.deploy),
            },
            "metadata": {"recipe": recipe.name, "fingerprint": todo.fingerprint, "code": code.name},
            # with all None, the job runs on the head
            "entrypoint_num_cpus": resources.cpus or None,
            "entrypoint_num_gpus": resources.gpus or None,
            "entrypoint_memory": resources.memory_bytes or None,
            "entrypoint_resources": resources.custom or None,
            "entrypoint_label_selector": resources.labels or None,
        }
        deadline = time.monotonic() + _START_SECONDS
        with jobs.answered(client):
            while True:
                try:
                    client.submit_job(**request)
                    return Submitted(job, "new")
                except RuntimeError as e:
                    # if two submit at once, one fails with what Ray calls an error of the server
                    if any(other.submission_id == job for other in jobs.ours(client)):
                        return Submitted(job, "attached", "was started by another submission at this moment")
                    if _STARTING not in str(e) or time.monotonic() > deadline:
                        raise
                    time.sleep(1)


def _command(arguments: Sequence[str]) -> str:
    """The shell's line. It leaves the job's working folder, which Ray may replace while the process runs."""
    words = " ".join('"$recipe"' if word == _FILE else shlex.quote(word) for word in arguments)
    return f'recipe="$PWD/{_FILE}"; cd /tmp; exec python -P -m longtake.infra.cli {words}'


def stop_variables(deploy: Deploy) -> dict[str, str]:
    """A job's variables for its stop: the seconds that it may take, and an exit code that is not 0."""
    return {
        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(deploy.stop_seconds)),
        "LONGTAKE_STOPPED_CODE": str(jobs.STOPPED),
    }


def watch(client: Any, job: str, write: Callable[[str], Any]) -> tuple[int, str]:
    """Follow a job to its end; returns its exit code and a line about its end. Raises as `jobs.follow`."""
    details = jobs.follow(client, job, write)
    code = jobs.exit_code(details)
    if code is None:
        reason = " ".join((details.message or "no reason given").split())
        return 1, f"job {job} did not start: {reason[-600:]}"
    if details.status == "STOPPED":
        return code, f"job {job} was stopped"
    return code, f"job {job} ended with exit code {code}"
