"""The life of a training stage, whatever it trains: lock, pin, launch, train, measure, publish, promote, count.

A stage is a module with `VERSION`, `PRODUCES` and a `Config` (a `TrainConfig` with its `kind`), as every stage has it (see
`longtake.datasets.stage`), whose `run` is the one below; and with

- `MODEL`, the kind of its model in config.json, and `SUMMARY`, the file that `evaluate` leaves its figures in;
- `prepare(config, inputs, folder) -> Setup`: data and model from before the first step, checked. The inputs are pinned and
  what is live among them resolved, `folder` is that of the checkpoints; a `Setup` has `model`, on this rank's device, and
  whatever else the stage needs;
- `loader(config, setup, rank, world) -> Stream`: this rank's share of the training batches, rank `rank` of `world` that
  read (see `engines.place`);
- `objective(config, setup) -> Objective`;
- `evaluate(config, setup, folder)`: measures the trained model on held-out clips, each rank its share, and leaves
  `SUMMARY` and pictures in the folder;
- `facts(config, setup, lineage) -> dict`: more for config.json, beside the model's config and lineage;
- `counts(config, setup) -> dict[str, float]`: the number of clips to learn from, as metrics.

It may also have

- `largest(config, inputs, count)`, and what goes with it: the first line says what it takes of memory (see `training.fit`);
- `announce(config, setup, loader) -> (lines, figures)`: lines to print and figures to log before the first step;
- `kind(setup) -> str`: the kind of its model in config.json, where that is not always `MODEL`;
- `registered(config) -> dict[str, str]`: models of the registry that its settings name, pinned as its inputs are;
- `keep(config, folder, scratch)`: writes further artifacts of the run into `scratch`.
"""

import contextlib
import gc
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import nn

from longtake.datasets.masking import shown
from longtake.training import checkpoint, engines, forecast, launch, observer, registry, tracker
from longtake.training.checkpoint import upload
from longtake.training.config import TrainConfig
from longtake.training.live.record import resolved
from longtake.training.loop import train
from longtake.training.registry import disk, lineage, promotion
from longtake.training.tracker import Tracker

SERIES = "by_step/"  # of metrics whose steps are no training steps, but positions in a clip
_EVALUATION = "heldout"  # folder of the evaluation, and its name among the artifacts


class Setup(Protocol):
    """What a stage works with."""

    @property
    def model(self) -> nn.Module: ...


def run(stage: ModuleType, config: Any, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Train from the latest checkpoint, measure, log and register the model, make it champion.

    Raises:
        UserError: no usable sample; data, models or windows that do not fit; a workspace for no checkpoints; a checkpoint of
            other inputs or settings.
        Failure, Interrupted: as `loop.train`.
    """
    place, former = checkpoint.place_of(config.run, output), checkpoint.former_place(config.run, output)
    config = config.model_copy(update={"run": config.run.model_copy(update={"upload": place.upload})})
    first = os.environ.get("RANK", "0") == "0"
    with launch.together(), contextlib.ExitStack() as held:

        def begin() -> str:
            """Lock the folder, get a copy where it is empty, pin the inputs; before there are ranks that wait for a collective."""
            named = {**inputs, **(stage.registered(config) if hasattr(stage, "registered") else {})}
            folder = _folder(config, named, place, former)
            held.enter_context(checkpoint.locked(folder))
            _fetch(folder, place, former)
            path = checkpoint.latest(folder)
            lineage.begin(named, folder, checkpoint.meta(path) if path else None)
            return str(folder)

        folder = Path(launch.share(begin))
        job = (stage.__name__, config, inputs, folder)
        with observer.beside(*job) if first else contextlib.nullcontext():
            continues = launch.run(*job)
        return publish(stage, config, inputs, folder) if continues else {}


def _folder(config: TrainConfig, inputs: Mapping[str, str], place: checkpoint.Place, former: checkpoint.Place) -> Path:
    """The folder to train in: that of the place, unless an earlier version has begun this training in its own."""
    if checkpoint.latest(place.folder) or not (path := checkpoint.latest(former.folder)):
        return place.folder
    begun, run_id = checkpoint.meta(path), os.environ.get("MLFLOW_RUN_ID")
    if run_id and begun.get("run") == run_id:
        return former.folder
    changed = checkpoint.differences(config, begun["settings"]) + lineage.differences(inputs, former.folder)
    if begun["step"] > config.steps:
        changed.append(f"steps: {begun['step']} there, {config.steps} here")
    if not changed:
        return former.folder
    print(f"{path}: is of another training ({', '.join(changed[:3])}); this one begins in {place.folder}", flush=True)
    return place.folder


def _fetch(folder: Path, place: checkpoint.Place, former: checkpoint.Place) -> None:
    """Get the copy of the latest checkpoint where there is none here, or the one that an earlier version made in this run."""
    if place.upload is None or former.upload is None:
        return
    upload.fetch_alone(folder, place.upload)
    if checkpoint.latest(folder) or not (maker := upload.maker(former.upload)):
        return
    if maker == os.environ.get("MLFLOW_RUN_ID"):
        upload.fetch_alone(folder, former.upload)
    else:
        print(
            f"{shown(former.upload)}: its checkpoint is of run {maker}; this training begins anew. To go on from that one, move"
            f" what is there into {shown(place.upload)}",
            flush=True,
        )


def work(stage: Any, config: Any, inputs: Mapping[str, str], folder: Path) -> None:
    """What each rank does: train from the latest checkpoint in `folder`, leave the last one there, and measure it."""
    torch.distributed.barrier()  # the first rank has pinned the inputs before
    inputs = lineage.pinned(inputs, folder)
    path = checkpoint.latest(folder)
    unfinished = path is None or checkpoint.meta(path)["step"] < config.steps
    foreseen = forecast.announce(stage, config, inputs) if unfinished else None
    torch.manual_seed(config.seed)
    _train(stage, config, inputs, folder, foreseen)
    results = _empty_folder(folder)
    setup = stage.prepare(config, resolved(config, inputs, folder), folder)
    setup.model.load_state_dict(checkpoint.trained(folder, config, setup.model))
    setup.model.eval()
    stage.evaluate(config, setup, results)


def _train(stage: Any, config: TrainConfig, inputs: Mapping[str, str], folder: Path, foreseen: float | None) -> None:
    setup = stage.prepare(config, resolved(config, inputs, folder), folder)
    loader = stage.loader(config, setup, *engines.place(config))
    objective = stage.objective(config, setup)
    with _tracked(folder) as log:
        if log and hasattr(stage, "announce"):
            lines, figures = stage.announce(config, setup, loader)
            print(*lines, sep="\n", flush=True)
            log.log(0, figures)
        train(objective, loader, config, folder, log, launch.stop_requested, foreseen)


@contextlib.contextmanager
def _tracked(folder: Path) -> Iterator[Tracker | None]:
    """The run, on the first rank; None on the others."""
    if torch.distributed.get_rank():
        yield None
        return
    with tracker.connect(folder) as log:
        yield log


def _empty_folder(folder: Path) -> Path:
    """Free the training's device memory; returns an empty folder for the evaluation.

    Every rank must call it, on a disk that they share.
    """
    gc.collect()
    torch.cuda.empty_cache()
    results = folder / _EVALUATION
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
    torch.distributed.barrier()
    return results


def publish(stage: Any, config: Any, inputs: Mapping[str, str], folder: Path) -> dict[str, Any]:
    """Make a model folder of a finished training, register it, and log its evaluation to the run.

    Returns:
        `uri` of the version, and `metrics`.
    """
    setup = stage.prepare(config, resolved(config, lineage.pinned(inputs, folder), folder), folder)
    record = lineage.read(folder)
    facts = {"lineage": record} | stage.facts(config, setup, record)
    with tracker.connect(folder, system_metrics=False) as log, TemporaryDirectory() as scratch:
        model, beside = Path(scratch) / "model", Path(scratch) / "beside"
        kind = stage.kind(setup) if hasattr(stage, "kind") else stage.MODEL
        weights = checkpoint.trained(folder, config, setup.model)
        disk.save(model, kind, setup.model.config.model_dump(mode="json"), weights, facts)
        uri = registry.register(model, config.name, log.run_id)
        figures = published(folder, stage.SUMMARY, log)
        if hasattr(stage, "keep"):
            stage.keep(config, folder, beside)
            for path in sorted(beside.iterdir()) if beside.exists() else ():
                log.artifacts(path, path.name)
    if config.run.promote:
        promotion.promote(uri)
    return {"uri": uri, "metrics": figures | stage.counts(config, setup)}


def published(folder: Path, name: str, log: Tracker) -> dict[str, float]:
    """Log the evaluation to the run, its curves as metrics `by_step/...`; returns the other figures of `name`'s summary.

    Raises:
        Failure: the run cannot be written.
    """
    summary: Mapping[str, Any] = json.loads((folder / _EVALUATION / name).read_bytes())["summary"]
    curves: dict[int, dict[str, float]] = {}
    for series, points in summary["series"].items():
        for step, value in points:
            curves.setdefault(step, {})[f"{SERIES}{series}"] = value
    for step, values in sorted(curves.items()):
        log.log(step, values)
    log.artifacts(folder / _EVALUATION, _EVALUATION)
    numbers = {name: value for name, value in summary.items() if type(value) in (int, float) and name != "seed"}
    return {name: float(value) for name, value in numbers.items()}
