"""Recipes as Ray jobs: what a job asks for, whether the cluster has it, and one job at a time for the same work.

A job gets the recipe with all defaults and digests written out, and a wheel of this code without dependencies; those are
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
from longtake.infra import graph
from longtake.infra.cluster import jobs, wheel
from longtake.infra.cluster.jobs import cluster_labels, cluster_nodes
from longtake.infra.deploy import Deploy, Resources, environment
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.pipeline.cluster import TaskConfig
from longtake.training.config import TrainConfig

__all__ = ["cluster_labels", "cluster_nodes", "lacking", "submit"]

_FILE = "recipe.yaml"
_STARTING = "No available agent"  # what a head answers that has just been started
_START_SECONDS = 60.0
_NOT_EQUAL = ("!", "in(")  # how Ray's label selectors begin that are no plain values


@dataclass(frozen=True)
class Work:
    """One stage or a whole graph, as a job."""

    name: str  # of the job; those of later tries end in -2, -3 ...
    fingerprint: str
    nodes: list[Node]
    arguments: list[str]  # of `longtake`
    resources: Resources


@dataclass(frozen=True)
class Submitted:
    """What became of a submission."""

    job: str
    how: str  # new, attached or done
    said: str = ""


def work(recipe: Recipe, stage: str | None) -> Work:
    """What one stage, or all of them, is as a job. Raises UserError where labels of stages contradict each other."""
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
    """What one process needs that does the work of all these stages, one after the other."""
    all_of = {name: recipe.deploy.of(name) for name in names}
    labels: dict[str, str] = {}
    for name, asked in all_of.items():
        for label, value in asked.labels.items():
            if labels.setdefault(label, value) != value:
                raise UserError(
                    f"{recipe.path}: deploy.resources.{name}.labels: {label}: {value} contradicts the {labels[label]} of"
                    " another stage; submit them one by one with --stage"
                )
    custom: dict[str, float] = {}
    for asked in all_of.values():
        custom |= {key: max(amount, custom.get(key, 0)) for key, amount in asked.custom.items()}
    return Resources(
        cpus=max(r.cpus for r in all_of.values()),
        gpus=max(r.gpus for r in all_of.values()),
        memory_bytes=max(r.memory_bytes for r in all_of.values()),
        custom=custom,
        labels=labels,
    )


# What the cluster lacks: Ray would wait for it for ever.


def lacking(
    nodes: Sequence[Node], deploy: Deploy, cluster: list[dict[str, float]], labels: list[dict[str, str]] | None = None
) -> list[str]:
    """What stages ask for that a cluster does not have, a line each: `stage NAME: KEY: what it needs and what there is`.

    Args:
        cluster: resources of each node, as of `cluster_nodes`.
        labels: of the same nodes, as of `cluster_labels`; None leaves labels unchecked.
    """
    found = []
    for node in nodes:
        entry = _bundle(own := deploy.of(node.name))
        key = f"deploy.resources.{node.name}"
        wrong = _no_node_has(key, entry, cluster) or _no_node_is(f"{key}.labels", own.labels, labels)
        wrong = wrong or _tasks(node, entry, cluster) or _ranks(node, entry, cluster)
        if wrong:
            found.append(f"stage {node.name}: {wrong}")
    return found


def _bundle(asked: Any) -> dict[str, tuple[str, float]]:
    """Key in the config -> (Ray's name of the resource, amount)."""
    bundle = {"cpus": ("CPU", asked.cpus), "gpus": ("GPU", getattr(asked, "gpus", None) or 0)}
    bundle |= {"memory_bytes": ("memory", getattr(asked, "memory_bytes", 0))}
    bundle |= {f"custom.{name}": (name, amount) for name, amount in getattr(asked, "custom", {}).items()}
    return {key: (name, amount) for key, (name, amount) in bundle.items() if amount}


def _no_node_has(where: str, bundle: dict[str, tuple[str, float]], cluster: list[dict[str, float]]) -> str | None:
    if any(all(node.get(name, 0) >= amount for name, amount in bundle.values()) for node in cluster):
        return None
    for key, (name, amount) in bundle.items():
        most = max((node.get(name, 0) for node in cluster), default=0)
        if most < amount:
            return f"{where}.{key}: needs {amount:g} {name}, no node of the cluster has more than {most:g}"
    asked = ", ".join(f"{amount:g} {name}" for name, amount in bundle.values())
    return f"{where}: no single node of the cluster has all of {asked}" if bundle else None


def _no_node_is(where: str, asked: dict[str, str], labels: list[dict[str, str]] | None) -> str | None:
    plain = {name: value for name, value in asked.items() if not value.startswith(_NOT_EQUAL)}
    if labels is None or any(all(node.get(n) == value for n, value in plain.items()) for node in labels):
        return None
    return f"{where}: no node of the cluster is {', '.join(f'{name}: {value}' for name, value in plain.items())}"


def _tasks(node: Node, entry: dict[str, tuple[str, float]], cluster: list[dict[str, float]]) -> str | None:
    """Of a stage whose Ray tasks ask for resources of their own, beside those of its process."""
    task = getattr(node.config, RUN, None)
    if not isinstance(task, TaskConfig):
        return None
    bundle = _bundle(task)
    where = f"stages.{node.name}.{RUN}"
    if wrong := _no_node_has(where, bundle, cluster):
        return wrong
    held = dict(entry.values())
    for key, (name, amount) in bundle.items():
        both, total = amount + held.get(name, 0), sum(n.get(name, 0) for n in cluster)
        if both > total:
            return (
                f"{where}.{key}: a task and the process of deploy.resources.{node.name} need {both:g} {name} together,"
                f" the cluster has {total:g}"
            )
    return None


def _ranks(node: Node, entry: dict[str, tuple[str, float]], cluster: list[dict[str, float]]) -> str | None:
    """Of a stage that trains in processes of the cluster; they leave one CPU for what reads data, as at their start."""
    if not isinstance(node.config, TrainConfig) or node.config.run.launcher.by != "ray":
        return None
    how = node.config.run.launcher
    bundle = list(_bundle(how).values())
    held = dict(entry.values())
    held["CPU"] = held.get("CPU", 0) + 1
    room = sum(min(int(n.get(name, 0) / amount + 1e-6) for name, amount in bundle) for n in cluster)
    total = {name: sum(n.get(name, 0) for n in cluster) for name in ("CPU", "GPU")}
    if room >= how.processes and all(
        total[name] >= how.processes * amount + held.get(name, 0) for name, amount in bundle
    ):
        return None
    each = " and ".join(f"{amount:g} {name}" for name, amount in bundle)
    return (
        f"stages.{node.name}.run.launcher: {how.processes} processes of {each}, a spare CPU and what deploy.resources asks do"
        f" not fit: the cluster has {total['CPU']:g} CPU and {total['GPU']:g} GPU on {len(cluster)} nodes"
    )


# Sending it.


def submit(client: Any, recipe: Recipe, stage: str | None, force: bool = False, check: bool = True) -> Submitted:
    """Have the work done once: start a job, or name the one that does it now or has done it.

    Args:
        client: of `jobs.client`.
        force: start one even if it has been done, which does it anew.
        check: refuse what no node has room for.

    Raises:
        UserError: the cluster lacks something.
        Failure: Ray refuses the job.
    """
    todo = work(recipe, stage)
    before = jobs.tries(client, todo.name)
    if before and not before[-1].status.is_terminal():
        latest = before[-1]
        return Submitted(latest.submission_id, "attached", f"is {latest.status.value.lower()} already")
    if before and before[-1].status == "SUCCEEDED" and not force:
        return Submitted(before[-1].submission_id, "done", "has done this work already")
    if check:
        address = client.get_address()
        wrong = lacking(todo.nodes, recipe.deploy, cluster_nodes(address), cluster_labels(address))
        if wrong:
            more = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
            raise UserError(f"{wrong[0]}{more}; lower it, add nodes, or use --no-check where they come by themselves")
    job = f"{todo.name}-{_number(before[-1], todo.name) + 1}" if before else todo.name
    return _post(client, recipe, todo, job, force)


def _number(job: Any, name: str) -> int:
    return int(job.submission_id.removeprefix(name).lstrip("-") or 1)


def _post(client: Any, recipe: Recipe, todo: Work, job: str, force: bool) -> Submitted:
    asked = todo.resources
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
                "env_vars": _variables(recipe.deploy),
            },
            "metadata": {"recipe": recipe.name, "fingerprint": todo.fingerprint, "code": code.name},
            # with none of them it runs on the head
            "entrypoint_num_cpus": asked.cpus or None,
            "entrypoint_num_gpus": asked.gpus or None,
            "entrypoint_memory": asked.memory_bytes or None,
            "entrypoint_resources": asked.custom or None,
            "entrypoint_label_selector": asked.labels or None,
        }
        patience = time.monotonic() + _START_SECONDS
        with jobs.answered(client):
            while True:
                try:
                    client.submit_job(**request)
                    return Submitted(job, "new")
                except RuntimeError as e:
                    # of two at once one loses; Ray calls it an error of the server
                    if any(other.submission_id == job for other in jobs.ours(client)):
                        return Submitted(job, "attached", "was started by another submission at this moment")
                    if _STARTING not in str(e) or time.monotonic() > patience:
                        raise
                    time.sleep(1)


def _command(arguments: Sequence[str]) -> str:
    """The shell's line. Ray may write the job's working folder anew while a process is in it, which then is nowhere."""
    given = " ".join('"$recipe"' if word == _FILE else shlex.quote(word) for word in arguments)
    return f'recipe="$PWD/{_FILE}"; cd /tmp; exec python -P -m longtake.infra.cli {given}'


def _variables(deploy: Deploy) -> dict[str, str]:
    """Of the job: the allow-listed ones, and how long it may take to stop."""
    return environment(deploy) | stopping(deploy)


def stopping(deploy: Deploy) -> dict[str, str]:
    """Variables of a job that say how long it may take to stop, and that it has not done its work then."""
    return {
        "RAY_JOB_STOP_WAIT_TIME_S": str(math.ceil(deploy.stop_seconds)),
        "LONGTAKE_STOPPED_CODE": str(jobs.STOPPED),
    }


def watch(client: Any, job: str, write: Callable[[str], Any]) -> tuple[int, str]:
    """Follow a job to its end; returns its exit code and a line about how it ended. Raises as `jobs.follow` does."""
    ended = jobs.follow(client, job, write)
    code = jobs.exit_code(ended)
    if code is None:
        reason = " ".join((ended.message or "no reason given").split())
        return 1, f"job {job} did not start: {reason[-600:]}"
    if ended.status == "STOPPED":
        return code, f"job {job} was stopped"
    return code, f"job {job} ended with exit code {code}"
