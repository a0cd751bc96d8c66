"""`evaluate`: measure models side by side on the held-out clips of a dataset (see `run.evaluate`)."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.stage import DatasetInput, Input, StageConfig, ViewInput
from longtake.training.evaluation import figures, table, tracked
from longtake.training.evaluation import run as running
from longtake.training.evaluation.suite import Networks, Suite, named
from longtake.training.metrics.features import digest_of
from longtake.training.models.common.pictures import OWN
from longtake.training.registry.uri import in_store

VERSION = 1
PRODUCES = "evaluation"


class Config(StageConfig):
    """Measure models of any families side by side, on the val split of a dataset.

    models     stages that make models, and URIs of others
    dataset    whose held-out clips are measured
    view       which of them; null takes all
    suite      which clips, videos and measures: its settings, or the name of a suite of the package
    networks   that you bring; a measure without its network is left out
    """

    kind: Literal["evaluate"]
    models: Annotated[tuple[str, ...], Input("model")] = Field(min_length=1)
    dataset: DatasetInput
    view: ViewInput | None = None
    suite: Annotated[Suite, BeforeValidator(named)] = Suite()
    networks: Networks = Networks()


def outside(config: Config) -> str:
    """A digest of the networks that are files and folders."""
    return digest_of(
        *(path for path in config.networks.model_dump().values() if path != OWN and not in_store(path or ""))
    )


def complete(uri: str) -> bool:
    """Whether the table and the videos that it names are there."""
    if not storage.is_local(uri):
        return storage.exists(storage.join(uri, table.FILE))
    folder = Path(storage.filesystem(uri)[1])
    if not (folder / table.FILE).exists():
        return False
    return all((folder / video["file"]).exists() for video in table.read(folder).videos)


def run(config: Config, inputs: Mapping[str, str], output: str) -> dict[str, Any]:
    """Measure, write the table, and log a run for each model.

    Raises:
        UserError, Failure: as `run.evaluate` and `tracked.write`; the workspace is no folder of this machine.
    """
    if not storage.is_local(output):
        raise UserError(f"{output}: an evaluation is kept in a folder; name a workspace on a disk of this machine")
    models = [inputs[f"models.{number}"] for number in range(len(config.models))]
    folder = Path(storage.filesystem(output)[1])
    try:
        made = running.evaluate(
            models,
            inputs["dataset"],
            inputs.get("view"),
            config.suite,
            config.networks,
            folder,
            lambda line: print(line, flush=True),
        )
    except torch.OutOfMemoryError as e:
        raise Failure(
            "the GPU's memory is too small for this; lower suite.chunk, suite.clips.frames or suite.clips.size: what is measured"
            " is kept"
        ) from e
    print(table.printed(made), flush=True)
    tracked.write(made, folder, os.environ["MLFLOW_RUN_ID"])
    return {"uri": output, "metrics": metrics(made)}


def metrics(made: table.Table) -> dict[str, float]:
    """The figures of all models, as metrics NAME.N of the run: N is the model's number in the table, NAME as `figures.named`."""
    numbers = {model["digest"]: number for number, model in enumerate(made.models)}
    found = {"models": float(len(made.models))}
    for name, figure in figures.named(made).items():
        found |= {f"{name}.{numbers[digest]}": value["value"] for digest, value in figure.values.items()}
    return found
