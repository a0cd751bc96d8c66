"""What the stages that learn from a dataset's latents share: the column, checked; its autoencoder; the pinned inputs."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor

from longtake.datasets import compact, schema, storage
from longtake.datasets.errors import UserError
from longtake.datasets.latents import Latents, encoder_digest, read_latents
from longtake.datasets.stage import StageConfig
from longtake.training import registry
from longtake.training.engines import device
from longtake.training.models.common import sampling
from longtake.training.models.pv_vae.model import PVVAE


def check_recipe(config: Any, inputs: Mapping[str, StageConfig], columns: Collection[str], span: int) -> None:
    """ValueError where a recipe's latents are of another dataset, or its clips are shorter than `span` frames."""
    for field in columns:
        made: Any = inputs.get(field)
        if made is not None and made.dataset != config.dataset:
            raise ValueError(f"{field}: are of the dataset {made.dataset}, not of {config.dataset}")
    geometry = getattr(inputs.get("dataset"), "clip", None)
    if geometry is not None and geometry.max_frames < span:
        raise ValueError(
            f"frames: a window spans {span} frames, the dataset's clips have at most {geometry.max_frames}; raise clip.max_seconds"
        )


def frame_rate(dataset: str, span: int) -> float:
    """Frames a second of the train split's clips. Raises UserError where none has `span` frames."""
    base, facts = compact.open_split(dataset, "train")
    longest = pc.max(facts["frame_count"]).as_py() or 0
    if longest and longest < span:
        what = "images, and a video prior needs clips" if longest == 1 else f"clips of at most {longest} frames"
        raise UserError(f"dataset: {dataset} has {what}; a window spans {span} frames: lower `frames`")
    return float(base.row(0, 0)["fps"]) if longest else 0.0


def column_of(dataset: str, uri: str, frames: int, field: str = "latents") -> Latents:
    """The record of a column of latents that windows of so many frames can be taken of.

    Raises:
        UserError: the latents are of another dataset, or of what it was before; or have no such windows.
        Failure: damaged files.
    """
    made = read_latents(uri)
    if made.dataset != storage.absolute(dataset):
        raise UserError(f"{field}: {uri} are of the dataset {made.dataset}, not of {dataset}")
    low, high = sampling.nearest_lengths(frames, made.factor)
    if low != high:
        raise UserError(f"frames: {frames}: latents have windows of 1 + {made.factor}n frames, such as {low} or {high}")
    for split in schema.SPLITS:
        if compact.open_split(dataset, split)[0].digest != made.digests[split]:
            raise UserError(
                f"{field}: {uri}: the dataset has changed since they were made; run their `cache_latents` stage again"
            )
    if not len(compact.open_split(dataset, "train", made.column)[1]):
        raise UserError(f"{field}: {dataset} has no column {made.column}; run their `cache_latents` stage again")
    return made


def commonest_size(dataset: str, made: Latents) -> tuple[int, int]:
    """Height and width that the latents of most clips have, in positions."""
    sizes = compact.open_split(dataset, "train", made.column)[1]
    sides = np.stack([sizes[name].to_numpy() for name in ("height", "width")])
    kinds, counts = np.unique(sides[:, sides[0] > 0], axis=1, return_counts=True)
    height, width = kinds[:, counts.argmax()].tolist()
    return height, width


def statistics(made: Latents, posterior: Literal["sample", "mean"]) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation `(C,)` of what is learned: draws from the posteriors, or their means."""
    mean, std = torch.tensor(made.mean), torch.tensor(made.std)
    return mean, (std.square() + torch.tensor(made.posterior_std).square()).sqrt() if posterior == "sample" else std


def decoder_of(made: Latents, uri: str) -> PVVAE:
    """The autoencoder that makes videos of the latents, frozen, on this rank's device.

    Raises:
        UserError: it is none, or has another encoder than has made the latents.
    """
    vae = sampling.load_vae(uri)
    if encoder_digest(vae) != made.encoder["digest"]:
        raise UserError(
            f"vae: {uri} has another encoder than has made the latents, {made.encoder['uri']}; encode again, or name that"
        )
    return vae.requires_grad_(False).to(device())


def pinned(inputs: Mapping[str, str], folder: Path) -> dict[str, str]:
    """The inputs with the models' versions, as they were when this training began; their lineage is kept in `folder`.

    Where no autoencoder is named, it is the one that has made the latents.
    """
    path = folder / "lineage.json"
    if path.exists():
        record = json.loads(path.read_bytes())
    else:
        vae = {"vae": read_latents(inputs["latents"]).encoder["uri"]} if "latents" in inputs else {}
        record = registry.lineage(vae | dict(inputs))
        storage.write(str(path), storage.canonical_json(record))
    models = {name: record["inputs"][name]["uri"] for name in ("vae", "base") if name in record["inputs"]}
    return dict(inputs) | models


def lineage_of(folder: Path) -> dict[str, Any]:
    """What `pinned` has kept."""
    return dict(json.loads((folder / "lineage.json").read_bytes()))
