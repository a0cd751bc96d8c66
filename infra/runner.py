"""Running a recipe's graph on this machine: one process a stage, finished stages reused, the report at the end."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtake.datasets import storage
from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.infra import graph, runs, stages
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs


@dataclass(frozen=True)
class Choice:
    """Which stages to run."""

    start: str | None = None  # run this one and all that hang on it, even if finished
    only: str | None = None
    force: bool = False


def plan(recipe: Recipe, nodes: list[Node], store: Runs, choice: Choice) -> dict[str, bool]:
    """For each stage that is to be considered: whether it runs (True) or its finished run is reused (False)."""
    for name in (choice.start, choice.only):
        if name is not None:
            graph.select(nodes, name, recipe)
    again = graph.downstream(nodes, choice.start) if choice.start else set()
    chosen = [n for n in nodes if choice.only in (None, n.name)]
    return {n.name: choice.force or n.name in again or finished(n, store) is None for n in chosen}


def finished(node: Node, store: Runs) -> runs.Run | None:
    """The finished run of a stage, if what it made is still all there."""
    done = store.finished(node.fingerprint)
    complete = getattr(stages.load(node.kind), "complete", None)
    return None if done and complete and not complete(done.uri) else done


def run(recipe: Recipe, choice: Choice, say: Callable[[str], None]) -> Path | None:
    """Run what is not finished; returns the report's path where one was made.

    Raises:
        UserError, Failure, Interrupted: of the first stage that did not end well, already said by its process.
    """
    nodes = graph.build(recipe)
    store = runs.connect(recipe)
    todo = plan(recipe, nodes, store, choice)
    whole = graph.whole_fingerprint([n for n in nodes if n.name in todo])
    report = Path(recipe.workspace) / "report.html" if storage.is_local(recipe.workspace) and not choice.only else None
    if not any(todo.values()) and report and report.exists() and store.finished(whole):
        for name in todo:
            say(f"{name}: reused")
        return report
    parent = store.open_parent(recipe, whole)
    resolved = storage.join(recipe.workspace, "recipes", f"{recipe.digest()[:12]}.yaml")
    storage.write(resolved, recipe.to_yaml().encode())
    try:
        for node in nodes:
            if node.name in todo:
                say(f"{node.name}: {'running' if todo[node.name] else 'reused'}")
                if todo[node.name]:
                    _run_process(resolved, node, parent, fresh=choice.force or choice.start is not None)
    except (UserError, Failure, Interrupted) as e:
        store.end(parent, "KILLED" if isinstance(e, Interrupted) else "FAILED", str(e))
        raise
    if choice.only is None:
        say("report: running")
        report = make_report(
            recipe, nodes, store, parent, reused={name for name, runs_now in todo.items() if not runs_now}
        )
    store.finish(parent, {"uri": str(report or recipe.workspace)})
    return report


class StageEnded(Failure):
    """A stage's process ended badly and has said why; `code` is its exit code."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"stage {name} ended with exit code {code}")
        self.code = code


def _run_process(recipe: str, node: Node, parent: str, fresh: bool) -> None:
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "stage", recipe, node.name, "--parent", parent]
    child = subprocess.Popen([*command, *(["--force"] if fresh else [])])
    previous = signal.signal(signal.SIGTERM, lambda *_: child.terminate())
    try:
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                # the terminal sent it to the stage too, which saves its state before it ends
                continue
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code in (130, 143):
        # its process has said so
        raise Interrupted
    if code:
        raise StageEnded(node.name, code)


def run_stage(recipe: Recipe, name: str, parent: str | None = None, fresh: bool = False) -> dict[str, Any]:
    """Run exactly one stage in this process, in its MLflow run; a finished one is not run again unless `fresh`.

    Raises:
        UserError: an input stage has no finished run; or the stage's own.
    """
    nodes = graph.build(recipe)
    node = graph.select(nodes, name, recipe)
    store = runs.connect(recipe)
    inputs = {}
    for field, value in node.inputs.items():
        inputs[field] = value
        if value in node.upstream:
            made = store.finished(graph.select(nodes, value, recipe).fingerprint)
            if made is None:
                raise UserError(
                    f"stage {name}: its input {value} has no finished run; run `longtake stage {recipe.path} {value}` first"
                )
            inputs[field] = made.uri
    done = finished(node, store)
    if done and not fresh:
        return {"uri": done.uri}
    run_id, output = store.open(node, parent, fresh)
    os.environ["MLFLOW_RUN_ID"] = run_id
    try:
        with storage.failing_clearly(output):
            result = stages.load(node.kind).run(node.config, inputs, output)
    except BaseException as e:
        stopped = isinstance(e, Interrupted | KeyboardInterrupt)
        store.end(run_id, "KILLED" if stopped else "FAILED", f"{type(e).__name__}: {e}")
        raise
    store.finish(run_id, result)
    return result


def make_report(recipe: Recipe, nodes: list[Node], store: Runs, parent: str, reused: set[str]) -> Path:
    """Write report.html and its pictures from what MLflow knows, and log both to the recipe's run."""
    from longtake.infra import report

    with tempfile.TemporaryDirectory() as scratch:
        found = []
        for node in nodes:
            if done := store.find(node.fingerprint):
                metrics, history = store.metrics(done.id)
                folder = Path(scratch) / node.name
                folder.mkdir()
                store.download(done.id, "heldout", folder)
                found.append(
                    report.StageRun(
                        node.name, node.kind, done.status, node.name in reused, done.seconds, done.id, done.uri,
                        metrics, history, store.params(done.id), folder,
                    )
                )  # fmt: skip
        made = {stages.load(s.kind).PRODUCES: s.uri for s in found if s.uri}
        local = Path(recipe.workspace) if storage.is_local(recipe.workspace) else Path(scratch) / "report"
        path = report.build(local, recipe.name, found, made.get("dataset"), made.get("view"), store.tracking_uri)
        store.client.log_artifact(parent, str(path))
        store.client.log_artifacts(parent, str(local / "pictures"), "pictures")
        if not storage.is_local(recipe.workspace):
            storage.write(storage.join(recipe.workspace, "report.html"), path.read_bytes())
    return path


def elapsed(start: float) -> str:
    minutes, seconds = divmod(round(time.time() - start), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
