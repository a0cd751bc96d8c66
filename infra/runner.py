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
from typing import Any, NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.datasets.masking import shown
from longtake.infra import graph, runs, stages
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs
from longtake.training.config import TrainConfig


@dataclass(frozen=True)
class Choice:
    """Which stages to run."""

    start: str | None = None  # run this one and all that hang on it, even if finished
    only: str | None = None
    force: bool = False


def plan(recipe: Recipe, nodes: list[Node], store: Runs, choice: Choice) -> dict[str, bool]:
    """For each stage that is to be considered: whether it runs (True) or its finished run is reused (False).

    What a finished stage has made and is not there any more is said in a line.
    """
    for name in (choice.start, choice.only):
        if name is not None:
            graph.select(nodes, name, recipe)
    again = graph.downstream(nodes, choice.start) if choice.start else set()
    chosen = [n for n in nodes if choice.only in (None, n.name)]
    todo = {}
    for node in chosen:
        run, gone = _finished(node, store)
        todo[node.name] = choice.force or node.name in again or run is None
        if gone:
            print(f"{node.name}: {shown(gone)}; it is made again from what there is", file=sys.stderr)
    return todo


def finished(node: Node, store: Runs) -> runs.Run | None:
    """The finished run of a stage, if what it made is still all there."""
    return _finished(node, store)[0]


def _finished(node: Node, store: Runs) -> tuple[runs.Run | None, str]:
    """The finished run, or None and what of it is gone, empty where it never was."""
    from longtake.training.registry import store as model_store

    done = store.finished(node.fingerprint)
    if done is None:
        return None, "its run in MLflow was deleted" if store.was_deleted(node.fingerprint) else ""
    stage = stages.load(node.kind)
    if hasattr(stage, "complete") and not stage.complete(done.uri):
        return None, f"{done.uri} is not whole"
    # a gate that let nothing through has made none
    if stage.PRODUCES == "model" and done.uri and (gone := model_store.missing(done.uri)):
        return None, gone
    return done, ""


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
                    if todo[node.name] and finished(node, store) is None:
                        # it was told to stop, saved, and ended well
                        raise Interrupted
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
    stopping = False

    def stop(*_: Any) -> None:
        nonlocal stopping
        stopping = True
        child.terminate()

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        while True:
            try:
                code = child.wait()
                break
            except KeyboardInterrupt:
                # the terminal sent it to the stage too, which saves its state before it ends
                stopping = True
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code in (130, 143) or (stopping and code == 0):
        # its process has said so
        raise Interrupted
    if code < 0:
        # it had no time to say why
        why = ", perhaps for want of memory: lower its `batch` or `workers`" if -code == signal.SIGKILL else ""
        raise Failure(
            f"stage {node.name}: its process was killed by signal {-code}{why}; run the same command again:"
            " it goes on from what is saved"
        )
    if code:
        raise StageEnded(node.name, code)


class _Start(NamedTuple):
    """What every process of a stage needs to know before it runs."""

    inputs: dict[str, str]
    done: str  # what a finished run has made, where it is to be reused
    run_id: str = ""
    output: str = ""


def run_stage(recipe: Recipe, name: str, parent: str | None = None, fresh: bool = False) -> dict[str, Any]:
    """Run exactly one stage in this process, in its MLflow run; a finished one is not run again unless `fresh`.

    Where torchrun or the like has started several of this process, the first of them opens and ends the run; the others
    only train with it, and return nothing.

    Raises:
        UserError: an input stage has no finished run; several processes for a stage that does not train; its own.
    """
    from longtake.training import launch

    nodes = graph.build(recipe)
    node = graph.select(nodes, name, recipe)
    stage = stages.load(node.kind)
    store: Runs | None = None
    start: _Start | None = None

    def begin() -> _Start:
        nonlocal store
        store = runs.connect(recipe)
        return _begin(recipe, nodes, node, store, parent, fresh)

    try:
        with launch.together() as rank:
            if launch.launched() and not issubclass(stage.Config, TrainConfig):
                raise UserError(
                    f"stage {name}: {node.kind} does not train, it runs in one process: start it without torchrun or deepspeed"
                )
            start = _Start(*launch.share(begin))
            if not start.run_id:
                return {"uri": start.done} if rank == 0 else {}
            os.environ |= {"MLFLOW_RUN_ID": start.run_id, "LONGTAKE_RECIPE": recipe.digest()}
            for text in graph.warnings(node) if rank == 0 else ():
                print(f"warning: {text}", file=sys.stderr)
            with storage.failing_clearly(start.output):
                result: dict[str, Any] = stage.run(node.config, start.inputs, start.output)
    except BaseException as e:
        if store and start:
            stopped = isinstance(e, Interrupted | KeyboardInterrupt | SystemExit)
            store.end(start.run_id, "KILLED" if stopped else "FAILED", f"{type(e).__name__}: {e}")
        raise
    if store:
        store.finish(start.run_id, result)
        return result
    return {}


def _begin(recipe: Recipe, nodes: list[Node], node: Node, store: Runs, parent: str | None, fresh: bool) -> _Start:
    """Find the inputs, and open a run unless a finished one is to be reused."""
    inputs = {}
    for field, value in node.inputs.items():
        inputs[field] = value
        if value in node.upstream:
            made = store.finished(graph.select(nodes, value, recipe).fingerprint)
            if made is None:
                raise UserError(
                    f"stage {node.name}: its input {value} has no finished run; run `longtake stage {recipe.path} {value}` first"
                )
            if not made.uri:
                raise UserError(
                    f"stage {node.name}: its input {value} let no model through, and there is no champion yet;"
                    f" the gate's verdict is in MLflow's run {made.id}"
                )
            inputs[field] = made.uri
    done = finished(node, store)
    if done and not fresh:
        return _Start(inputs, done.uri)
    return _Start(inputs, "", *store.open(node, parent, fresh))


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
