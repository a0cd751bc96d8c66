"""What a run would cost, before it is run: clips, bytes, hours and money by stage, from rates that were measured.

Clips, bytes and CPU time of `shard` come from a sample of the recipe's own sources, which this machine cuts for some
seconds; all else from runs with the same settings in MLflow, or from a trial of the whole recipe on the sample. Where
nothing was measured the answer is that it is not known. What it gives up: hours are those of the machines that the rates
were measured on, and what a filter of another footage would drop is not foreseen.
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longtake.datasets import index, storage
from longtake.datasets.masking import shown_within
from longtake.datasets.stage import RUN, cost
from longtake.infra import graph, runner, runs, yaml_text
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs
from longtake.infra.upkeep import debris
from longtake.infra.upkeep.look import FRAMES, Range, Source, listed, look, ratio
from longtake.training.config import TrainConfig

SAMPLE = 5  # sources that are looked into
TRIAL_STEPS = 5


@dataclass(frozen=True)
class Stage:
    """What a stage would cost; None is not known."""

    name: str
    kind: str
    todo: bool
    how: str  # what the figures rest on
    sources: int | None = None
    source_bytes: int | None = None
    clips: Range | None = None
    bytes: Range | None = None
    wall_hours: Range | None = None
    cpu_hours: Range | None = None
    gpu_hours: Range | None = None


def estimate(
    recipe: Recipe, nodes: list[Node], store: Runs, trial_seconds: float = 0, sample: int = SAMPLE
) -> dict[str, Any]:
    """Plain data: `stages` (see Stage), their `total`, `disk`, `unknown` (a line each).

    Args:
        trial_seconds: for how long at most to run the recipe on the sample, where no run tells; 0 does not.
        sample: how many sources to look into.

    Raises:
        UserError: there are no sources.
    """
    stages: dict[str, Stage] = {}
    looked: list[Source] = []
    for node in nodes:
        if node.kind == "shard":
            stages[node.name], some = _shard(node, store, sample)
            looked += some
    clips = {name: stage.clips for name, stage in stages.items()}
    measured = [_measured(recipe, nodes, store, clips)]
    todo = {node.name: runner.finished(node, store) is None for node in nodes}
    said = ""
    if trial_seconds and any(todo[n.name] and n.name not in stages and n.name not in measured[0] for n in nodes):
        tried, said = _trial(recipe, looked, trial_seconds, clips)
        measured.append(tried)
    for node in nodes:
        if node.name not in stages:
            told = next((m[node.name] for m in measured if node.name in m), None)
            stages[node.name] = told or Stage(
                node.name, node.kind, True, "not known: no run with these settings was measured"
            )
        if not todo[node.name]:
            nothing = Stage(node.name, node.kind, False, "has finished, would be reused", clips=stages[node.name].clips)
            stages[node.name] = nothing
    ordered = [stages[node.name] for node in nodes]
    total = {key: _sum(getattr(s, key) for s in ordered) for key in ("bytes", "wall_hours", "cpu_hours", "gpu_hours")}
    unknown = [f"{s.name}: {s.how}" for s in ordered if s.todo and s.cpu_hours is None and s.gpu_hours is None]
    known = [s for s in ordered if s.todo and (s.cpu_hours or s.gpu_hours)]
    unknown += [f"{s.name}: the bytes that it writes" for s in known if s.bytes is None and s.kind != "curate"]
    unknown += [said] if said else []
    return {
        "recipe": recipe.name,
        "sources": [asdict(source) for source in looked],
        "stages": [_plain(stage) for stage in ordered],
        "total": {key: value and value._asdict() for key, value in total.items()},
        "disk": _disk(recipe, total["bytes"]),
        "unknown": unknown,
    }


def money(estimated: Mapping[str, Any], cpu_hour: float, gpu_hour: float) -> Range | None:
    """What the known hours cost; None where none is known."""
    parts = [(estimated["total"]["cpu_hours"], cpu_hour), (estimated["total"]["gpu_hours"], gpu_hour)]
    known = [Range(**hours).times(price) for hours, price in parts if hours]
    return _sum(known)


def _sum(ranges: Iterable[Range | None]) -> Range | None:
    known = [r for r in ranges if r is not None]
    return Range(*(sum(values) for values in zip(*known, strict=True))) if known else None


def _plain(stage: Stage) -> dict[str, Any]:
    return {k: v._asdict() if isinstance(v, Range) else v for k, v in vars(stage).items()}


def _disk(recipe: Recipe, needed: Range | None) -> dict[str, Any]:
    free = None
    if storage.is_local(recipe.workspace):
        there = Path(recipe.workspace)
        while not there.exists():
            there = there.parent
        free = shutil.disk_usage(there).free
    enough = None if needed is None or free is None else needed.high < free
    return {"needed": needed and needed._asdict(), "free": free, "enough": enough}


# Sources, looked into here.


def _shard(node: Node, store: Runs, sample: int) -> tuple[Stage, list[Source]]:
    count, total, chosen = listed(node.config.sources, sample)  # type: ignore[attr-defined]
    done = len(index.read_sources(node.output)) if storage.exists(storage.join(node.output, "dataset.json")) else 0
    left = max(0, count - done) / count
    looked = [look(uri, size, node.config) for uri, size in chosen]
    readable = [source for source in looked if source is not None]
    if not sum(source.bytes for source in readable):
        how = f"not known: none of {len(chosen)} sampled sources could be looked into"
        return Stage(node.name, node.kind, True, how, count, total), []
    every = len(readable) == count

    def whole(field: str) -> Range:
        return ratio([(getattr(s, field), s.bytes) for s in readable], every).times(total)

    how = f"{len(readable)} of {count} sources, {FRAMES} frames of each, cut on this machine"
    if done:
        how += f"; {done} sources are in the dataset already"
    hours = whole("cpu_seconds").times(left / 3600)
    made = whole("made_bytes").times(left)
    return Stage(node.name, node.kind, True, how, count, total, whole("clips"), made, None, hours, None), readable


# Rates of runs.


def _measured(recipe: Recipe, nodes: list[Node], store: Runs, clips: Mapping[str, Range | None]) -> dict[str, Stage]:
    """Of stages with whose settings a run has been measured."""
    count = _sum(clips.values())
    found = {}
    for node in nodes:
        alike = [r for r in _runs(store, node.kind) if _same(r.data.params, node)]
        stage = _trained(node, store, alike) if isinstance(node.config, TrainConfig) else None
        if stage is None and alike and node.kind in ("curate", "cache_latents"):
            stage = _passed(node, alike, count)
        if stage:
            found[node.name] = stage
    return found


def _runs(store: Runs, kind: str) -> list[Any]:
    """The latest runs of a kind of stage in this experiment."""
    condition = f"tags.`longtake.kind` = '{kind}'"
    return list(store.client.search_runs([store.experiment], condition, max_results=50, order_by=["start_time DESC"]))


def _same(params: Mapping[str, str], node: Node) -> bool:
    """Whether a run had the settings that decide what a step or a clip costs."""
    mine = runs.params_of(cost(node.config))
    costly = {name.split(".")[0] for name in mine} - {RUN}
    theirs = {name for name in params if name.split(".")[0] in costly}
    return all(params.get(name) == mine.get(name) for name in theirs | mine.keys())


def _trained(node: Node, store: Runs, alike: list[Any]) -> Stage | None:
    config: Any = node.config
    points = []
    gpus = False
    for run in alike:
        history = store.client.get_metric_history(run.info.run_id, "seconds_per_step")
        # the first one counts what is compiled and loaded once
        values = [m.value for m in sorted(history, key=lambda m: m.step)]
        points += values[1:] or values
        gpus = gpus or any(name.startswith("system/gpu_") for name in run.data.metrics)
    if not points:
        return None
    points.sort()
    each = Range(statistics.median(points), points[len(points) // 20], points[-1 - len(points) // 20])
    wall = each.times(config.steps / 3600)
    cpus = wall.times(config.run.launcher.processes * config.run.launcher.cpus)
    # a process has a GPU to itself unless the launcher shares them out
    shares = config.run.launcher.gpus or float(gpus)
    on = wall.times(config.run.launcher.processes * shares) if shares else None
    how = f"{len(points)} measurements of a step in {len(alike)} runs with these settings; {config.run.launcher.cpus:g} CPUs a process"
    return Stage(
        node.name,
        node.kind,
        True,
        how,
        bytes=_checkpoints(config, alike),
        wall_hours=wall,
        cpu_hours=cpus,
        gpu_hours=on,
    )


def _checkpoints(config: Any, alike: list[Any]) -> Range | None:
    """As many as are kept, each as large as those that runs have left."""
    sizes = []
    for run in alike:
        folder = Path(config.run.checkpoints or storage.join(run.data.tags.get("longtake.output", ""), "checkpoints"))
        sizes += [float(debris.size(str(path))) for path in folder.glob("step-*")] if folder.is_dir() else []
    kept = config.run.keep_checkpoints + (config.steps // config.run.keep_every if config.run.keep_every else 0)
    return Range(statistics.mean(sizes), min(sizes), max(sizes)).times(kept) if sizes else None


def _passed(node: Node, alike: list[Any], clips: Range | None) -> Stage | None:
    """A stage that passes over all clips: hours and bytes by the clip."""
    config: Any = node.config
    done = [r for r in alike if r.info.status == "FINISHED"]
    numbers = [r.data.metrics.get("clips") or r.data.metrics.get("clips_kept") for r in done]
    rows = [(r, n) for r, n in zip(done, numbers, strict=True) if n]
    if not rows or clips is None:
        return None
    seconds = ratio([((r.info.end_time - r.info.start_time) / 1000, n) for r, n in rows])
    wall = _product(seconds, clips).times(1 / 3600)
    workers = getattr(getattr(config, RUN, None), "workers", None) or 1
    task = getattr(config, RUN, None)
    made = ratio([(r.data.metrics["bytes"], n) for r, n in rows]) if node.kind == "cache_latents" else None
    gpus = (getattr(task, "gpus", None) or 0) * workers
    return Stage(
        node.name, node.kind, True,
        f"{len(rows)} runs with these settings, by the clip; {workers} workers of {task.cpus if task else 1:g} CPUs",
        clips=clips, bytes=made and _product(made, clips), wall_hours=wall,
        cpu_hours=wall.times(workers * (task.cpus if task else 1)), gpu_hours=wall.times(gpus) if gpus else None,
    )  # fmt: skip


def _product(one: Range, two: Range) -> Range:
    return Range(one.value * two.value, one.low * two.low, one.high * two.high)


def _trial(
    recipe: Recipe, looked: list[Source], seconds: float, clips: Mapping[str, Range | None]
) -> tuple[dict[str, Stage], str]:
    """Run the recipe on the sampled sources with few steps, in a folder of its own; what was measured, and what stopped it."""
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "trial.yaml"
        path.write_text(yaml_text.dump(_tiny(recipe, [s.uri for s in looked], str(Path(folder) / "ws"))))
        clean = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
        command = [sys.executable, "-P", "-m", "longtake.infra.cli", "run", str(path)]
        said = ""
        with (Path(folder) / "said").open("w+") as out:
            child = subprocess.Popen(command, env=clean, stdout=out, stderr=out, start_new_session=True)
            try:
                child.wait(timeout=seconds)
            except subprocess.TimeoutExpired:
                said = f"the trial did not end within {seconds:g} s"
                _stop(child)
            out.seek(0)
            lines = [line for line in out.read().splitlines() if line.startswith("error: ")]
        if child.returncode and not said:
            said = f"the trial ended early: {lines[-1].removeprefix('error: ') if lines else f'exit code {child.returncode}'}"
        from longtake.infra import recipe as recipes

        before = {name: os.environ.pop(name, None) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")}
        try:
            small = recipes.load(str(path))
            measured = _measured(small, graph.build(small), runs.connect(small), clips)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
        real: dict[str, Any] = dict(recipe.stages.items())
        return {name: _scaled(stage, real[name], small.stages[name]) for name, stage in measured.items()}, said


def _stop(child: "subprocess.Popen[bytes]") -> None:
    import signal

    for how, patience in ((signal.SIGTERM, 30), (signal.SIGKILL, 30)):
        try:
            os.killpg(child.pid, how)
            child.wait(timeout=patience)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _tiny(recipe: Recipe, uris: list[str], workspace: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml_text.parse(recipe.to_yaml(), recipe.path)
    content |= {"name": "trial", "workspace": workspace, "outside": {}}
    trained = {name for name, config in recipe.stages.items() if isinstance(config, TrainConfig)}
    for name, stage in content["stages"].items():
        if stage["kind"] == "shard":
            # both splits shall have something
            stage |= {"sources": uris, "val_fraction": 0.5, "group_sources": 1}
        elif name in trained:
            stage |= {"steps": min(stage["steps"], TRIAL_STEPS)}
            stage[RUN] |= {"log_every": 1, "checkpoint_every": TRIAL_STEPS, "checkpoints": None, "upload": None}
            stage[RUN] |= {"sample_every": 0, "launcher": {"by": "process"}}
            stage |= {count: 1 for count in ("eval_clips", "eval_videos") if count in stage}
    return content


def _scaled(stage: Stage, real: Any, small: Any) -> Stage:
    """From the trial's steps to the recipe's."""
    times = real.steps / small.steps if isinstance(real, TrainConfig) else 1.0
    hours = {k: v and v.times(times) for k, v in vars(stage).items() if k.endswith("_hours")}
    return replace(stage, how=f"a trial on the sample, here, by one process: {stage.how}", **hours)


def as_json(estimated: Mapping[str, Any]) -> str:
    return json.dumps(shown_within(estimated), indent=2)
