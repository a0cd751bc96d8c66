"""How the training stages measure what they have trained in the end: what they are told, and what becomes of it.

All ranks of the training measure, each its share, before they leave: `work` ends with it. What they find lies in the folder
`heldout` of the checkpoints, which the first process hands to MLflow when it registers the model.
"""

import gc
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import Field

from longtake.datasets.errors import UserError
from longtake.datasets.stage import Measuring, Scheduling
from longtake.training.config import TrainConfig
from longtake.training.engines import device
from longtake.training.metrics.features import FeatureNetwork, features, load_network
from longtake.training.metrics.share import place
from longtake.training.tracker import Tracker

SERIES = "by_step/"  # of metrics whose steps are no training steps, but positions in a clip


class EvaluatedConfig(TrainConfig):
    """How the trained model is measured on held-out clips, over all processes of the training; beside each, what it costs.

    Other settings measure the model of the last checkpoint again, and train nothing.
    """

    eval_clips: Annotated[int, Measuring()] = Field(512, ge=1)  # held-out clips, at most; a few forward passes each
    # LTD, principal components and paths of the latents in time: next to nothing
    eval_latents: Annotated[bool, Measuring()] = True
    # clips of either split that linear probes of flow, next frame and tracks see: they are decoded, and matched block by
    # block, which takes about as long on a CPU as 100 passes of a tiny model; 0 has none
    eval_probes: Annotated[int, Measuring()] = Field(0, ge=0)
    # a feature network (see training.metrics.features), for Fréchet and kernel distances: a pass of it a video; without one
    # none is measured
    features: Annotated[str | None, Measuring()] = None
    eval_batch: Annotated[int, Scheduling()] = Field(8, ge=1)  # videos that a process generates at once


def checked_network(path: str | None, frames: int, size: tuple[int, int]) -> FeatureNetwork | None:
    """The feature network, on this rank's device, after it has taken a video as they will come; None without a path.

    Raises:
        UserError: no such file, or no such network; it does not take these videos.
    """
    if path is None:
        return None
    network = load_network(path, device=device())
    try:
        features(network, torch.zeros(1, 3, frames, *size, device=device()))
    except (RuntimeError, ValueError) as e:
        what = f"{frames} frames of {size[0]}x{size[1]}"
        raise UserError(f"features: {path}: takes no videos of {what} ({str(e).splitlines()[0][:120]})") from e
    return network


def emptied(folder: Path) -> Path:
    """The folder for what is found, empty, and what the training no longer holds of the device's memory, freed.

    Every rank must call it, on a disk that they share.
    """
    gc.collect()
    torch.cuda.empty_cache()
    found = folder / "heldout"
    if place()[0] == 0:
        shutil.rmtree(found, ignore_errors=True)
        found.mkdir()
    torch.distributed.barrier()
    return found


def published(folder: Path, name: str, log: Tracker) -> dict[str, float]:
    """Hand what was found to the run, its curves as metrics `by_step/...`; returns the other figures of `name`'s summary.

    Raises:
        Failure: the run does not take it.
    """
    summary: Mapping[str, Any] = json.loads((folder / "heldout" / name).read_bytes())["summary"]
    curves: dict[int, dict[str, float]] = {}
    for series, points in summary["series"].items():
        for step, value in points:
            curves.setdefault(step, {})[f"{SERIES}{series}"] = value
    for step, values in sorted(curves.items()):
        log.log(step, values)
    log.artifacts(folder / "heldout", "heldout")
    plain = {name: value for name, value in summary.items() if type(value) in (int, float) and name != "seed"}
    return {name: float(value) for name, value in plain.items()}
