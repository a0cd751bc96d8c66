"""What the tests of the stages that learn latents share: a small dataset with labels and columns of latents."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from longtake.datasets import compact, encoding, index, schema, storage, view
from longtake.datasets import latents as column
from longtake.pipeline import latents
from longtake.pipeline.column import by_shard
from longtake.training import checkpoint
from longtake.training.live.record import resolved
from longtake.training.loop import train
from longtake.training.models.memory import shared
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.objective import Turn
from longtake.training.registry import disk, lineage

TINY: dict[str, Any] = {
    "preset": "memory_dit_tiny",
    "depth": 2,
    "width": 32,
    "heads": 2,
    "memory_widths": (8, 16),
    "memory_heads": 2,
    "rates": ["2x2x2"],
    "window": 2,
}
QUICK: dict[str, Any] = {
    "dataset": "dataset",
    "latents": "latents",
    "low_latents": "low_latents",
    "model": TINY,
    "frames": 9,
    "history_seconds": 2.0,
    "steps": 4,
    "batch": 2,
    "lr": 1e-3,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 0,
    "sample_steps": 2,
    "ema_half_lives": [],
    "eval_clips": 2,
}


def vae(seed: int = 0) -> PVVAE:
    """Random weights, none of them zero."""
    torch.manual_seed(seed)
    model = PVVAE(config_from_preset("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8))
    for parameter in model.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return model.eval()


def labelled(dataset: str, folder: Path) -> str:
    """A copy of a dataset whose clips have labels, as a manifest would give them, and follow each other without a hole."""
    copy = str(shutil.copytree(dataset, folder))
    for split in schema.SPLITS:
        for shard in index.read_shards(copy, split):
            rows = shard.table.to_pylist()
            ends: dict[str, float] = {}
            for number, row in enumerate(rows):
                row["label"] = "ab"[number % 2]
                row["start_seconds"] = ends.get(row["source"], 0.0)
                ends[row["source"]] = row["start_seconds"] + row["frame_count"] / row["fps"]
            url = storage.join(copy, split, f"{shard.name}.parquet")
            index.write_index(url, rows, schema.INDEX, shard.tar_bytes, shard.tar_sha256)
    return copy


def saved(model: PVVAE, folder: Path) -> str:
    """The autoencoder as a model folder."""
    disk.save(folder, "pv_vae", model.config.model_dump(mode="json"), model.state_dict(), {"lineage": {}})
    return str(folder)


def inputs(root: Path, dataset: str, join: float = 100.0) -> dict[str, str]:
    """A copy of a dataset with labels, its autoencoder, and its latents of the whole video and of one half as large."""
    model, copy = vae(), labelled(dataset, root / "dataset")
    uri = saved(model, root / "vae")
    return {
        "dataset": copy,
        "latents": encoded(root / "latents", copy, model, uri, join=join),
        "low_latents": encoded(root / "low", copy, model, uri, (2, 2), join),
    }


def encoded(
    folder: Path, dataset: str, model: PVVAE, uri: str, shrink: tuple[int, int] = (1, 1), join: float = 100.0
) -> str:
    """Latents as `cache_latents` makes them, without Ray."""
    chosen = encoding.Settings(None, "fp32", "float16", None, 64, 4, 2, shrink=shrink, join_seconds=join)
    strides = encoding.strides_of(model, "here")
    name = encoding.column_name(column.encoder_digest(model), chosen, "")
    bases = {split: compact.open_split(dataset, split)[0] for split in schema.SPLITS}
    for split, base in bases.items():
        for shard, keep in by_shard(base, view.kept(base, None)[0]).items():
            latents.make_latents(model, strides, dataset, split, shard, name, chosen, keep)
    found = column.merged(column.read_moments(dataset, s) for s in index.read_shards(dataset, "train", name))
    record = column.Latents(
        dataset=dataset,
        column=name,
        encoder={"uri": uri, "digest": column.encoder_digest(model), "model": "PVVAE", "config": {}},
        channels=strides.channels,
        factor=strides.factor,
        stride=strides.stride,
        size=None,
        precision="fp32",
        dtype="float16",
        count=found.count,
        mean=tuple(found.mean.tolist()),
        std=tuple(np.sqrt(found.m2 / found.count).tolist()),
        posterior_std=tuple(np.sqrt(found.variance).tolist()),
        view=None,
        digests={split: base.digest for split, base in bases.items()},
        shrink=shrink,
        join_seconds=join,
    )
    column.write_latents(str(folder), record)
    return str(folder)


def prepared(chosen: Any, given: dict[str, str], folder: Path, stage: Any = shared) -> Any:
    """What a stage works with, of inputs that are pinned in the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    return stage.prepare(chosen, resolved(chosen, lineage.pinned(given, folder), folder), folder)


def turn(engine: Any, batch: dict[str, Any], rng: torch.Generator, step: int = 0) -> Turn:
    """What the loss of the only engine is given."""
    return Turn("model", {"model": engine}, batch, step, rng, 0, {})


_RANK = """
import json, sys
from pathlib import Path
import torch
import STAGE as stage
from longtake.training import checkpoint, engines
from longtake.training.live.record import resolved
from longtake.training.loop import train
from latent_stages import prepared

if __name__ == "__main__":
    with engines.process_group() as (rank, world):
        torch.set_num_threads(1)
        for line in sys.stdin:
            job = json.loads(line)
            config, folder = stage.Config(**job["settings"]), Path(job["folder"])
            torch.manual_seed(config.seed)
            setup = prepared(config, job["inputs"], Path(job["folder"] + str(rank)), stage)
            train(stage.objective(config, setup), stage.loader(config, setup, rank, world), config, folder)
            weights = checkpoint.Weights(checkpoint.latest(folder))
            print(json.dumps({name: value.tolist() for name, value in weights.items()}), flush=True)
"""


def rank_of(stage: Any) -> str:
    """A script that is a rank of trainings by a stage's module: it takes a job a line, and answers with the weights."""
    return _RANK.replace("STAGE", stage.__name__)


def fit(stage: Any, chosen: Any, given: dict[str, str], folder: Path, until: int | None = None, log: Any = None) -> Any:
    """Train as a rank does and return the last weights; `until` a step, as if it had been stopped there."""
    torch.manual_seed(chosen.seed)
    setup = prepared(chosen, given, folder, stage)
    running = chosen.model_copy(update={"steps": until}) if until else chosen
    train(stage.objective(chosen, setup), stage.loader(chosen, setup, 0, 1), running, folder, log)
    found = checkpoint.latest(folder)
    assert found
    return dict(checkpoint.Weights(found))


class Log:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.videos: dict[str, tuple[int, ...]] = {}

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)

    @property
    def steps(self) -> list[dict[str, float]]:
        """What was logged of training steps, not of held-out clips."""
        return [row for row in self.rows if "loss" in row]

    def video(self, step: int, name: str, video: Any, fps: float) -> None:
        self.videos[name] = video.shape


def mlflow_run(folder: Path, patch: Any) -> Iterator[str]:
    """An MLflow store with an open run, whose id it gives; for a fixture."""
    import mlflow

    uri = f"sqlite:///{folder}/mlflow.db"
    patch.setenv("MLFLOW_TRACKING_URI", uri)
    patch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "60")
    mlflow.set_tracking_uri(uri)
    client = mlflow.MlflowClient()
    run = client.create_run(client.create_experiment("e", f"{folder}/artifacts")).info.run_id
    patch.setenv("MLFLOW_RUN_ID", run)
    yield run
    mlflow.set_tracking_uri(None)
