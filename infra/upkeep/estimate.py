"""An estimate of what a run would cost: clips, bytes, hours and money by stage, from measured rates.

Clips, bytes and CPU time of `shard` come from a sample of the recipe's own sources, which this machine cuts for some
seconds. All else comes from runs with the same settings in MLflow, or from a trial of the whole recipe on the sample.
What nothing measured is reported as not known; a trial leaves out the stages that would write to a dataset that is there
already. Given up: hours are those of the machines that the rates were measured on,
and nothing predicts what a filter would drop of other footage.
"""

import contextlib
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from longtake.datasets import compact, index, schema, storage
from longtake.datasets.errors import UserError
from longtake.datasets.stage import RUN, cost
from longtake.infra import graph, runner, runs, yaml_text
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs
from longtake.infra.upkeep import debris
from longtake.infra.upkeep.machine import existing_parent
from longtake.infra.upkeep.sources import FRAMES, Range, SampledSource, draw, measure, ratio
from longtake.training.config import TrainConfig

SAMPLE = 5  # sources
TRIAL_STEPS = 5
# stages that write something for each clip
_WRITERS = ("score", "cluster", "cache_text", "cache_audio", "cache_latents", "cache_tokens")
_PASSES = ("curate", "caption", *_WRITERS)  # stages whose time goes by the clip
_OWN_SHARDS = ("encoded_shards", "made_shards", "captioned_shards")  # metrics of theirs: what a run has not found done


@dataclass(frozen=True)
class Stage:
    """The costs of a stage; None where they are not known."""

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
    """The estimate as plain data: `sources`, `stages` (see Stage), their `total`, `disk`, `unknown` (a line each).

    `to_try` names the stages that a trial may yet measure.

    Args:
        trial_seconds: the most time to run the recipe on the sample for, if a stage has no measured run; 0: no trial.
        sample: number of sources to measure.

    Raises:
        UserError: there are no sources.
    """
    stages: dict[str, Stage] = {}
    sources: list[SampledSource] = []

    # from the sources, from earlier runs, from a trial
    for node in nodes:
        if node.kind == "shard":
            stages[node.name], sampled = _shard(node, store, sample)
            sources += sampled
    clips = {name: stage.clips for name, stage in stages.items()} | _clips_there(nodes)
    measured = _from_runs(recipe, nodes, store, clips)
    todo = {node.name: runner.finished(node, store) is None for node in nodes}
    trial_error = ""
    untried = _untried(nodes)
    settled = stages.keys() | measured.keys() | untried
    if trial_seconds and any(todo[node.name] and node.name not in settled for node in nodes):
        tried, trial_error = _trial(recipe, sources, store, trial_seconds, clips, untried)
        measured = tried | measured

    # what has finished costs nothing
    for node in nodes:
        if node.name not in stages:
            how = "not known: no run with these settings was measured"
            if node.name in untried:
                how += ", and a trial would write to a dataset that is there already; a first run measures it"
            there = clips.get(node.inputs.get("dataset", ""))
            stages[node.name] = measured.get(node.name, Stage(node.name, node.kind, True, how, clips=there))
        if not todo[node.name]:
            clips_of = stages[node.name].clips
            stages[node.name] = Stage(node.name, node.kind, False, "has finished, would be reused", clips=clips_of)

    # sums, and what is missing in them
    ordered = [stages[node.name] for node in nodes]
    to_try = [s.name for s in ordered if s.todo and s.how.startswith("not known") and s.name not in untried]
    total = {key: _sum(getattr(s, key) for s in ordered) for key in ("bytes", "wall_hours", "cpu_hours", "gpu_hours")}
    unknown = [f"{s.name}: {s.how}" for s in ordered if s.todo and s.cpu_hours is None and s.gpu_hours is None]
    known = [s for s in ordered if s.todo and (s.cpu_hours or s.gpu_hours)]
    unknown += [f"{s.name}: the bytes that it writes" for s in known if s.bytes is None and s.kind != "curate"]
    unknown += [trial_error] if trial_error else []
    return {
        "recipe": recipe.name,
        "sources": [asdict(source) for source in sources],
        "stages": [_as_dict(stage) for stage in ordered],
        "total": {key: value and value._asdict() for key, value in total.items()},
        "disk": _disk(recipe, total["bytes"]),
        "unknown": unknown,
        "to_try": to_try,
    }


def money(estimated: Mapping[str, Any], cpu_hour: float, gpu_hour: float) -> Range | None:
    """The price of the known hours; None if none is known."""
    parts = [(estimated["total"]["cpu_hours"], cpu_hour), (estimated["total"]["gpu_hours"], gpu_hour)]
    known = [Range(**hours).times(price) for hours, price in parts if hours]
    return _sum(known)


def _sum(ranges: Iterable[Range | None]) -> Range | None:
    known = [r for r in ranges if r is not None]
    return Range(*(sum(values) for values in zip(*known, strict=True))) if known else None


def _as_dict(stage: Stage) -> dict[str, Any]:
    return {k: v._asdict() if isinstance(v, Range) else v for k, v in vars(stage).items()}


def _disk(recipe: Recipe, needed: Range | None) -> dict[str, Any]:
    free = None
    if storage.is_local(recipe.workspace):
        free = shutil.disk_usage(existing_parent(Path(recipe.workspace))).free
    enough = None if needed is None or free is None else needed.high < free
    return {"needed": needed and needed._asdict(), "free": free, "enough": enough}


def _clips_there(nodes: Sequence[Node]) -> dict[str, Range]:
    """The clips of each dataset that stages pass over and no stage makes, by its URL."""
    names = {node.name for node in nodes}
    urls = {node.inputs["dataset"] for node in nodes if node.kind in _PASSES and "dataset" in node.inputs} - names
    counts = {
        url: float(sum(compact.open_split(url, split)[0].counts.sum() for split in schema.SPLITS)) for url in urls
    }
    return {url: Range(count, count, count) for url, count in counts.items()}


def _untried(nodes: Sequence[Node]) -> set[str]:
    """Stages that would write beside a dataset that no stage makes, and all that stand on them: a trial leaves them out."""
    names, untried = {node.name for node in nodes}, set[str]()
    for node in nodes:
        writes = node.kind in _PASSES and node.inputs.get("dataset", node.name) not in names
        if writes or untried.intersection(node.upstream):
            untried.add(node.name)
    return untried


# Rates of sources.


def _shard(node: Node, store: Runs, sample: int) -> tuple[Stage, list[SampledSource]]:
    there = storage.exists(storage.join(node.output, "dataset.json"))
    known = index.read_sources(node.output)["uri"] if there else None
    count, total, finished, drawn = draw(node.config.sources, sample, known)  # type: ignore[attr-defined]
    share = (count - finished) / count  # of the sources, still to do
    measured = [measure(uri, size, node.config) for uri, size in drawn]
    readable = [source for source in measured if source is not None]
    if not sum(source.bytes for source in readable):
        how = f"not known: none of {len(drawn)} sampled sources could be looked into"
        return Stage(node.name, node.kind, True, how, count, total), []
    every = len(readable) == count

    def of_all(field: str) -> Range:
        return ratio([(getattr(s, field), s.bytes) for s in readable], every).times(total)

    how = f"{len(readable)} of {count} sources, {FRAMES} frames of each, cut on this machine"
    if finished:
        how += f"; {finished} sources are in the dataset already"
    hours = of_all("cpu_seconds").times(share / 3600)
    written = of_all("made_bytes").times(share)
    return Stage(node.name, node.kind, True, how, count, total, of_all("clips"), written, None, hours, None), readable


# Rates of runs.


def _from_runs(recipe: Recipe, nodes: list[Node], store: Runs, clips: Mapping[str, Range | None]) -> dict[str, Stage]:
    """The costs of the stages that runs with the same settings were measured for."""
    every = _sum(clips.values())
    stages = {}
    for node in nodes:
        alike = [r for r in _runs(store, node.kind) if _costs_the_same(r.data.params, node)]
        stage = _training(node, store, alike) if isinstance(node.config, TrainConfig) else None
        if stage is None and alike and node.kind in _PASSES:
            stage = _pass_over_clips(node, alike, clips.get(node.inputs.get("dataset", ""), every))
        if stage:
            stages[node.name] = stage
    return stages


def _runs(store: Runs, kind: str) -> list[Any]:
    """The latest runs of a kind of stage in this experiment."""
    condition = f"tags.`longtake.kind` = '{kind}'"
    return list(store.client.search_runs([store.experiment], condition, max_results=50, order_by=["start_time DESC"]))


def _costs_the_same(params: Mapping[str, str], node: Node) -> bool:
    """Whether a run had the same settings, of those that decide what a step or a clip costs."""
    mine = runs.params_of(cost(node.config))
    costly = {name.split(".")[0] for name in mine} - {RUN}
    theirs = {name for name in params if name.split(".")[0] in costly}
    return all(params.get(name) == mine.get(name) for name in theirs | mine.keys())


def _training(node: Node, store: Runs, alike: list[Any]) -> Stage | None:
    """The costs of a stage that trains, by the optimizer step; None if no step was measured."""
    config: Any = node.config
    launcher = config.run.launcher
    seconds = []
    has_gpu = False
    for run in alike:
        history = store.client.get_metric_history(run.info.run_id, "seconds_per_step")
        # the first value includes compiling and loading
        values = [m.value for m in sorted(history, key=lambda m: m.step)]
        seconds += values[1:] or values
        has_gpu = has_gpu or any(name.startswith("system/gpu_") for name in run.data.metrics)
    if not seconds:
        return None
    seconds.sort()
    a_step = Range(statistics.median(seconds), seconds[len(seconds) // 20], seconds[-1 - len(seconds) // 20])
    wall = a_step.times(config.steps / 3600)
    # a process has a GPU to itself unless the launcher shares them out
    gpus = launcher.processes * (launcher.gpus or float(has_gpu))
    return Stage(
        node.name, node.kind, True,
        f"{len(seconds)} measurements of a step in {len(alike)} runs with these settings; {launcher.cpus:g} CPUs a process",
        bytes=_checkpoints(config, alike), wall_hours=wall, cpu_hours=wall.times(launcher.processes * launcher.cpus),
        gpu_hours=wall.times(gpus) if gpus else None,
    )  # fmt: skip


def _checkpoints(config: Any, alike: list[Any]) -> Range | None:
    """Bytes of the checkpoints that are kept, each as large as those of earlier runs; None if there are none."""
    from longtake.training.checkpoint import former_place, place_of

    folders = set()
    for output in filter(None, (run.data.tags.get("longtake.output") for run in alike)):
        # a remote workspace and no folder: none has run
        with contextlib.suppress(UserError):
            folders |= {place(config.run, output).folder for place in (place_of, former_place)}
    sizes = [float(debris.size(str(path))) for folder in folders for path in folder.glob("step-*")]
    return Range(statistics.mean(sizes), min(sizes), max(sizes)).times(_kept(config)) if sizes else None


def _kept(config: Any) -> int:
    """The number of checkpoints that a training leaves."""
    run = config.run
    return int(run.keep_checkpoints + (config.steps // run.keep_every if run.keep_every else 0))


def _pass_over_clips(node: Node, alike: list[Any], clips: Range | None) -> Stage | None:
    """The costs of a stage that passes over all clips, by the clip; None if no run has finished, or no clips are known."""
    finished = [(r, r.data.metrics) for r in alike if r.info.status == "FINISHED"]
    # a run that found most of its work done took the time of the rest
    timed = [(r, n) for r, metrics in finished if (n := _own_clips_of(metrics))]
    if not timed or clips is None:
        return None
    seconds = ratio([(_seconds(r), n) for r, n in timed])
    wall = _product(seconds, clips).times(1 / 3600)
    written = [(r.data.metrics["bytes"], _clips_of(r.data.metrics)) for r, _ in timed if node.kind in _WRITERS]
    bytes_ = ratio(written) if written else None
    task = getattr(node.config, RUN, None)
    workers = getattr(task, "workers", None) or 1
    cpus, gpus = task.cpus if task else 1, (getattr(task, "gpus", None) or 0) * workers
    return Stage(
        node.name, node.kind, True,
        f"{len(timed)} runs with these settings, by the clip; {workers} workers of {cpus:g} CPUs",
        clips=clips, bytes=bytes_ and _product(bytes_, clips), wall_hours=wall,
        cpu_hours=wall.times(workers * cpus), gpu_hours=wall.times(gpus) if gpus else None,
    )  # fmt: skip


def _clips_of(metrics: Mapping[str, float]) -> float:
    return metrics.get("clips") or metrics.get("clips_kept") or 0.0


def _own_clips_of(metrics: Mapping[str, float]) -> float:
    """The clips that a run has worked on, without those that it found done."""
    if "scored_clips" in metrics:
        return metrics["scored_clips"]
    shards = [metrics[name] for name in _OWN_SHARDS if name in metrics]
    share = sum(shards) / metrics["shards"] if shards and metrics.get("shards") else 1.0
    return _clips_of(metrics) * share


def _seconds(run: Any) -> float:
    """How long a run took for that: a stopped one since it went on."""
    return (run.info.end_time - int(run.data.tags.get(runs.RESUMED, run.info.start_time))) / 1000


def _product(one: Range, two: Range) -> Range:
    return Range(one.value * two.value, one.low * two.low, one.high * two.high)


# Rates of a trial.


def _trial(
    recipe: Recipe,
    sources: list[SampledSource],
    store: Runs,
    seconds: float,
    clips: Mapping[str, Range | None],
    untried: Set[str],
) -> tuple[dict[str, Stage], str]:
    """Run the recipe on the sampled sources with few steps, in a folder of its own; its rates, and why it ended early.

    Without the stages of `untried`.
    """
    from longtake.infra import recipe as recipes

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        path = Path(folder) / "trial.yaml"
        content = _shortened(recipe, [source.uri for source in sources], str(Path(folder) / "ws"))
        for name in untried:
            del content["stages"][name]
        path.write_text(yaml_text.dump(content))
        error = _run_within(path, seconds)

        # the trial's own store of runs, not the one that the environment names
        before = {name: os.environ.pop(name, None) for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME")}
        try:
            short = recipes.load(str(path))
            measured = _from_runs(short, graph.build(short), runs.connect(short), clips)
        finally:
            for name, value in before.items():
                os.environ.pop(name, None)
                if value is not None:
                    os.environ[name] = value
            # MLflow remembers the trial's store, which is about to go
            runs.client_of(store.tracking_uri)
        return {k: _scaled(stage, recipe.stages[k], short.stages[k]) for k, stage in measured.items()}, error


def _run_within(recipe: Path, seconds: float) -> str:
    """Run a recipe, but for `seconds` at most; returns the error, empty if it has finished."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MLFLOW_", "RAY_"))}
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "run", str(recipe)]
    with recipe.with_name("output").open("w+") as out:
        child = subprocess.Popen(command, env=environment, stdout=out, stderr=out, start_new_session=True)
        try:
            child.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            _stop(child)
            return f"the trial did not end within {seconds:g} s"
        out.seek(0)
        errors = [line.removeprefix("error: ") for line in out.read().splitlines() if line.startswith("error: ")]
    code = child.returncode
    return f"the trial ended early: {errors[-1] if errors else f'exit code {code}'}" if code else ""


def _stop(child: "subprocess.Popen[bytes]") -> None:
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=30)
            return
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue


def _shortened(recipe: Recipe, uris: list[str], workspace: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml_text.parse(recipe.to_yaml(), recipe.path)
    content |= {"name": "trial", "workspace": workspace, "outside": {}, "deploy": {}}
    for name, stage in content["stages"].items():
        if stage["kind"] == "shard":
            # so that both splits get clips
            stage |= {"sources": uris, "val_fraction": 0.5, "group_sources": 1}
        elif isinstance(recipe.stages[name], TrainConfig):
            stage |= {"steps": min(stage["steps"], TRIAL_STEPS)}
            stage[RUN] |= {"log_every": 1, "checkpoint_every": TRIAL_STEPS, "checkpoints": None, "upload": None}
            stage[RUN] |= {"sample_every": 0, "observer": None, "launcher": {"by": "process"}}
            stage |= {count: 1 for count in ("eval_clips", "eval_videos") if count in stage}
    return content


def _scaled(stage: Stage, real: Any, short: Any) -> Stage:
    """The trial's costs of a stage, scaled to the steps of the recipe."""
    times, more = (
        (real.steps / short.steps, _kept(real) / _kept(short)) if isinstance(real, TrainConfig) else (1.0, 1.0)
    )
    scaled = {k: v and v.times(times) for k, v in vars(stage).items() if k.endswith("_hours")}
    scaled["bytes"] = stage.bytes and stage.bytes.times(more)
    return replace(stage, how=f"a trial on the sample, here, by one process: {stage.how}", **scaled)
