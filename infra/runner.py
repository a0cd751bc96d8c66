"""Run a recipe's graph on this machine: one process a stage, finished stages reused, the report at the end."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from longtake.datasets import storage
from longtake.datasets.errors import Busy, Failure, Interrupted, UserError
from longtake.datasets.masking import shown
from longtake.infra import graph, runs, stages
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs
from longtake.training.config import TrainConfig

_STOPPED = 130  # exit code of a stage that was stopped after saving its state
_HEAD = 4096  # characters of a report that have its mark


@dataclass(frozen=True)
class Choice:
    """The choice of stages to run."""

    start: str | None = None  # run this one and all that depend on it, even if finished
    only: str | None = None
    force: bool = False


def plan(recipe: Recipe, nodes: list[Node], store: Runs, choice: Choice) -> dict[str, bool]:
    """For each chosen stage, whether it runs (True) or its finished run is reused (False).

    A finished stage whose product is gone is reported in a line.
    """
    for name in (choice.start, choice.only):
        if name is not None:
            graph.select(nodes, name, recipe)
    forced = graph.downstream(nodes, choice.start) if choice.start else set()
    chosen = [n for n in nodes if choice.only in (None, n.name)]
    todo = {}
    for node in chosen:
        run, loss = _finished_or_lost(node, store)
        todo[node.name] = choice.force or node.name in forced or run is None
        if loss:
            print(f"{node.name}: {shown(loss)}; it is made again from what there is", file=sys.stderr)
    return todo


def check_observers(nodes: Sequence[Node]) -> None:
    """Raise UserError where a stage names a GPU for its observer that is not here, before hours of other stages."""
    for node in nodes:
        if isinstance(node.config, TrainConfig) and node.config.run.observer not in (None, "cpu"):
            from longtake.training import observer

            try:
                observer.check_device(node.config)
            except UserError as e:
                raise UserError(f"stage {node.name}: {e}") from e


def finished(node: Node, store: Runs) -> runs.Run | None:
    """The finished run of a stage, if its product still exists."""
    return _finished_or_lost(node, store)[0]


def _finished_or_lost(node: Node, store: Runs) -> tuple[runs.Run | None, str]:
    """The finished run; or None, and what of it is gone (empty if it never finished)."""
    run = store.finished(node.fingerprint)
    if run is None:
        return None, "its run in MLflow was deleted" if store.was_deleted(node.fingerprint) else ""
    stage = stages.load(node.kind)
    if hasattr(stage, "complete") and not stage.complete(run.uri):
        return None, f"{run.uri} is not whole"
    # a gate that let nothing through has no model
    if stage.PRODUCES == "model" and run.uri and (loss := store.loss(run.uri)):
        return None, loss
    return run, ""


def run(recipe: Recipe, choice: Choice, say: Callable[[str], None]) -> Path | None:
    """Run the stages that have not finished; returns the path of the report if one was made.

    Raises:
        UserError, Failure, Interrupted: the first stage that failed, or was stopped. Its process has printed the error.
    """
    nodes = graph.build(recipe)
    store = runs.connect(recipe)
    todo = plan(recipe, nodes, store, choice)
    check_observers([node for node in nodes if todo.get(node.name)])

    # nothing to do, and the report shows exactly these runs
    whole = graph.whole_fingerprint([n for n in nodes if n.name in todo])
    report = Path(recipe.workspace) / "report.html" if storage.is_local(recipe.workspace) and not choice.only else None
    if not any(todo.values()) and report and store.finished(whole) and _shows(report, _mark(nodes, store)):
        for name in todo:
            say(f"{name}: reused")
        return report

    # every process of the run reads the same resolved recipe
    parent = store.open_parent(recipe, whole)
    resolved = storage.join(recipe.workspace, "recipes", f"{recipe.digest()[:12]}.yaml")
    storage.write(resolved, recipe.to_yaml().encode())
    try:
        for node in nodes:
            if node.name in todo:
                say(f"{node.name}: {'running' if todo[node.name] else 'reused'}")
                if todo[node.name]:
                    _run_process(resolved, node, parent, fresh=choice.force or choice.start is not None)
                    # whether its product is whole is asked at the next start: another driver may add to it by now
                    if store.finished(node.fingerprint) is None:
                        raise Failure(f"stage {node.name}: has no finished run; run the same command again")
    except (UserError, Failure, Interrupted) as e:
        store.end(parent, "KILLED" if isinstance(e, Interrupted) else "FAILED", str(e))
        raise

    if choice.only is None:
        say("report: running")
        report = make_report(recipe, nodes, store, parent, reused={name for name, needed in todo.items() if not needed})
    store.finish(parent, {"uri": str(report or recipe.workspace)})
    return report


class StageEnded(Failure):
    """A stage's process failed and has printed its error; `code` is its exit code."""

    def __init__(self, name: str, code: int) -> None:
        super().__init__(f"stage {name} ended with exit code {code}")
        self.code = code


def _run_process(recipe: str, node: Node, parent: str, fresh: bool) -> None:
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "stage", recipe, node.name, "--parent", parent]
    # 0 then means that it has finished: an earlier run of the stage is no sign of that
    stopped = {"LONGTAKE_STOPPED_CODE": str(_STOPPED)}
    child = subprocess.Popen([*command, *(["--force"] if fresh else [])], env=os.environ | stopped)
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
                # the terminal sent it to the stage too, which saves its state before it exits
                stopping = True
    finally:
        signal.signal(signal.SIGTERM, previous)
    if code in (_STOPPED, 143) or (stopping and code == 0):
        # its process has printed that it was stopped
        raise Interrupted
    if code < 0:
        # it had no time to print an error
        guess = ", perhaps for want of memory: lower its `batch` or `workers`" if -code == signal.SIGKILL else ""
        raise Failure(
            f"stage {node.name}: its process was killed by signal {-code}{guess}; run the same command again:"
            " it goes on from what is saved"
        )
    if code:
        raise StageEnded(node.name, code)


class _Start(NamedTuple):
    """The facts that every process of a stage needs before it runs."""

    inputs: dict[str, str]
    product: str  # URI of a finished run's product, which is reused; empty if the stage runs
    run_id: str = ""
    output: str = ""
    found_running: bool = False  # the run, which another process may be at


def run_stage(recipe: Recipe, name: str, parent: str | None = None, fresh: bool = False) -> dict[str, Any]:
    """Run exactly one stage in this process, in its MLflow run; a finished one is not run again unless `fresh`.

    If a launcher such as torchrun has started several processes, rank 0 opens and ends the run. The others only train with
    it and return {}.

    Raises:
        UserError: an input stage has no finished run; several processes for a stage that does not train; the stage's own.
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
                return {"uri": start.product} if rank == 0 else {}
            os.environ |= {"MLFLOW_RUN_ID": start.run_id, "LONGTAKE_RECIPE": recipe.digest()}
            for text in graph.warnings(node) if rank == 0 else ():
                print(f"warning: {text}", file=sys.stderr)
            with storage.failing_clearly(start.output):
                result: dict[str, Any] = stage.run(node.config, start.inputs, start.output)
    except BaseException as e:
        # a run that another process is at is that one's to end
        if store and start and not (start.found_running and isinstance(e, Busy)):
            stopped = isinstance(e, Interrupted | KeyboardInterrupt | SystemExit)
            # an interrupt says nothing itself
            why = f"{type(e).__name__}: {e}" if str(e) or not stopped else "stopped by a signal"
            store.end(start.run_id, "KILLED" if stopped else "FAILED", why)
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
            run = store.finished(graph.select(nodes, value, recipe).fingerprint)
            if run is None:
                raise UserError(
                    f"stage {node.name}: its input {value} has no finished run; run `longtake stage {recipe.path} {value}` first"
                )
            if not run.uri:
                raise UserError(
                    f"stage {node.name}: its input {value} let no model through, and there is no champion yet;"
                    f" the gate's verdict is in MLflow's run {run.id}"
                )
            inputs[field] = run.uri
    reusable = finished(node, store)
    if reusable and not fresh:
        return _Start(inputs, reusable.uri)
    found = None if fresh else store.find(node.fingerprint)
    running = found is not None and found.status == "RUNNING"
    return _Start(inputs, "", *store.open(node, parent, fresh), running)


def _mark(nodes: list[Node], store: Runs) -> str:
    """The mark of a report that shows the finished runs of these stages."""
    finished = [(node.name, run.id) for node in nodes if (run := store.finished(node.fingerprint))]
    return hashlib.sha256(json.dumps(finished).encode()).hexdigest()


def _shows(report: Path, mark: str) -> bool:
    """Whether a report has this mark in its head."""
    if not report.exists():
        return False
    with report.open(errors="replace") as page:
        return mark in page.read(_HEAD)


def make_report(recipe: Recipe, nodes: list[Node], store: Runs, parent: str, reused: set[str]) -> Path:
    """Write report.html and its pictures from the runs in MLflow, and log both to the recipe's run."""
    from longtake.infra import report

    # before the runs are read: one that ends meanwhile makes another report
    mark = _mark(nodes, store)
    with tempfile.TemporaryDirectory() as scratch:
        stage_runs = []
        for node in nodes:
            if run := store.find(node.fingerprint):
                metrics, history = store.metrics(run.id)
                folder = Path(scratch) / node.name
                folder.mkdir()
                for part in ("heldout", "evaluation"):
                    store.download(run.id, part, folder)
                stage_runs.append(
                    report.StageRun(
                        node.name, node.kind, run.status, node.name in reused, run.seconds, run.id, run.uri,
                        metrics, history, store.params(run.id), folder,
                    )
                )  # fmt: skip
        uris = {stages.load(s.kind).PRODUCES: s.uri for s in stage_runs if s.uri}
        view = uris.get("view")
        # of several datasets the one whose clips the view keeps
        dataset = view.rpartition("/views/")[0] if view else uris.get("dataset")
        local = Path(recipe.workspace) if storage.is_local(recipe.workspace) else Path(scratch) / "report"
        path = report.build(local, recipe.name, stage_runs, dataset, view, store.tracking_uri, mark)
        store.client.log_artifact(parent, str(path))
        store.client.log_artifacts(parent, str(local / "pictures"), "pictures")
        if not storage.is_local(recipe.workspace):
            storage.write(storage.join(recipe.workspace, "report.html"), path.read_bytes())
    return path


def elapsed(start: float) -> str:
    minutes, seconds = divmod(round(time.time() - start), 60)
    return f"{minutes} min {seconds} s" if minutes else f"{seconds} s"
