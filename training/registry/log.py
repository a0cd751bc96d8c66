"""Writing models to MLflow's store: logged to a run as a pyfunc, and registered."""

import contextlib
import io
import json
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.datasets.masking import shown
from longtake.datasets.text import WORDS
from longtake.training.foreign.folder import is_foreign
from longtake.training.models.common.pictures import OWN
from longtake.training.registry import aliases, cache, store
from longtake.training.registry.foreign import PIPELINE
from longtake.training.registry.store import delete_artifacts, failing_clearly
from longtake.training.registry.uri import in_store

_KIND = "longtake.kind"  # tag of the versions of foreign models
_IMPORTED = "imported models"  # their experiment
_METRICS, _PARAMS, _LETTERS = 1000, 100, 500  # of one call, and of a parameter, at most
_DIGEST = 32  # hex digits of a data set's digest; MLflow takes 36 characters


def log_model(folder: Path, name: str, run_id: str, sha256: str, lineage: Mapping[str, Any]) -> str:
    """Log a model folder to a run as a pyfunc and register it as `candidate`; returns "models:/NAME/VERSION".

    The run gets the data of the lineage as its inputs, the version the parents as tags. A model or version of this run
    with the same digest is used again; half a model, of a run that was killed, is deleted.

    Raises:
        Failure: the store cannot be reached.
    """
    import mlflow

    client = mlflow.MlflowClient()
    parents = {field: shown(facts["uri"]) for field, facts in lineage.get("inputs", {}).items()}
    tags = {"sha256": sha256} | {f"parent.{field}": uri for field, uri in parents.items()}
    with failing_clearly(f"MLflow: {name}"), _quietly():
        client.log_inputs(run_id, _data(lineage.get("inputs", {})))
        versions = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        numbers = [int(v.version) for v in versions if v.tags.get("sha256") == sha256]
        if not numbers:
            model = _logged(client, run_id, sha256) or _log(folder, run_id, sha256)
            numbers = [int(mlflow.register_model(f"models:/{model}", name, tags=tags).version)]
        client.set_registered_model_alias(name, "candidate", str(max(numbers)))
    return f"models:/{name}/{max(numbers)}"


def log_files(files: Mapping[str, Path], content: Mapping[str, Any], name: str, sha256: str, place: str | None) -> str:
    """Log files with their config.json to a run of their own, and register them; returns "models:/NAME/VERSION".

    A version with the same digest is used again.

    Args:
        files: by their names below config.json.
        place: URL where the store keeps artifacts, if it has no place of its own.

    Raises:
        UserError: the name has versions of another kind.
        Failure: the store cannot be reached.
    """
    import mlflow

    client, kind = mlflow.MlflowClient(), content["model"]
    if same := same_version(name, kind, sha256):
        return same
    with import_run(name, place) as run_id, failing_clearly(f"MLflow: {name}"), _quietly():
        client.log_text(run_id, storage.canonical_json(content).decode(), "model/config.json")
        for file, path in files.items():
            client.log_artifact(run_id, str(path), f"model/{file.rpartition('/')[0]}".rstrip("/"))
        aliases.create(name, {})
        source = f"{client.get_run(run_id).info.artifact_uri}/model"
        made = client.create_model_version(name, source, run_id, {"sha256": sha256, _KIND: kind})
    return f"models:/{name}/{made.version}"


def same_version(name: str, kind: str | None, sha256: str) -> str | None:
    """The version of a name with this digest, "models:/NAME/VERSION"; None where there is none.

    `kind` is that of a foreign model, None for one of ours.

    Raises:
        UserError: the name has versions of another kind.
        Failure: the store cannot be reached.
    """
    import mlflow

    with failing_clearly(f"MLflow: {name}"), _quietly():
        there = store.versions(mlflow.MlflowClient(), name)
    if any(v.tags.get(_KIND) != kind for v in there):
        raise UserError(f"{name}: has versions of another kind of model; choose another name")
    same = [v for v in there if v.tags.get("sha256") == sha256]
    return f"models:/{name}/{same[0].version}" if same else None


@contextlib.contextmanager
def import_run(name: str, place: str | None, beside: Path | None = None) -> Iterator[str]:
    """The id of a new run for a model that is imported; it ends with the block.

    Args:
        place: as for `log_files`.
        beside: a folder that becomes an artifact of the run, by its name.
    """
    import mlflow

    client = mlflow.MlflowClient()
    with aliases.run_in(experiment(_IMPORTED, place), f"import {name}") as run_id:
        if beside:
            with failing_clearly(f"MLflow: {name}"), _quietly():
                client.log_artifacts(run_id, str(beside), beside.name)
        yield run_id


def experiment(name: str, place: str | None = None) -> str:
    """The id of an experiment, which is made where there is none; its artifacts are in `place`, as for `log_files`.

    Raises:
        UserError, Failure: as `store.asking`.
    """
    with store.asking(name) as client, _quietly():
        found = client.get_experiment_by_name(name)
        return str(found.experiment_id if found else client.create_experiment(name, place))


def log_table(run_id: str, params: Mapping[str, str], series: Mapping[str, Mapping[int, float]]) -> None:
    """Parameters of a run, and metrics by step, in as few calls as MLflow takes.

    Raises:
        UserError, Failure: as `store.asking`.
    """
    from mlflow.entities import Metric, Param

    now = int(time.time() * 1000)
    metrics = [Metric(name, value, now, step) for name, points in series.items() for step, value in points.items()]
    given = [Param(name, value[:_LETTERS]) for name, value in params.items()]
    with store.asking(f"run {run_id}") as client:
        for begin in range(0, len(given), _PARAMS):
            client.log_batch(run_id, params=given[begin : begin + _PARAMS])
        for begin in range(0, len(metrics), _METRICS):
            client.log_batch(run_id, metrics=metrics[begin : begin + _METRICS])


def log_artifacts(run_id: str, files: Mapping[str, Path]) -> None:
    """Files as artifacts of a run, by their names there, such as videos/1.mp4.

    Raises:
        UserError, Failure: as `store.asking`.
    """
    with store.asking(f"run {run_id}") as client, _quietly():
        for name, path in files.items():
            client.log_artifact(run_id, str(path), name.rpartition("/")[0] or None)


def _log(folder: Path, run_id: str, sha256: str) -> str:
    """Log a model folder to a run; returns the id of the logged model."""
    import mlflow

    signature = _signature(folder)
    # `predict` checks its input itself: MLflow would print the array
    signature._is_signature_from_type_hint = True
    packages = (
        "longtake",
        "torch",
        "safetensors",
        "numpy",
        "pandas",
        *sorted({*_of_text(folder), *_of_pictures(folder), *_of_foreign(folder)}),
    )
    mlflow.start_run(run_id=run_id, log_system_metrics=False)
    try:
        logged = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(folder)},
            signature=signature,
            pip_requirements=[_pinned(package) for package in packages],
            tags={"sha256": sha256},
        )
    finally:
        mlflow.end_run("RUNNING")
    return str(logged.model_id)


def _of_text(folder: Path) -> tuple[str, ...]:
    """The packages that encode the prompts of a model folder; none for a model without text."""
    facts = _facts(folder)
    text = facts.get("text")
    if not text:
        return ("tokenizers",) if facts.get("words") else ()
    return ("tokenizers", "wordllama" if text["encoder"]["encoder"] == WORDS else "transformers")


def _of_pictures(folder: Path) -> tuple[str, ...]:
    """The packages that encode the pictures that a model folder's model sees beside a gap."""
    encoder = (_facts(folder).get("image") or {}).get("encoder")
    by_transformers = encoder and encoder != OWN and (in_store(encoder) or Path(encoder).expanduser().is_dir())
    return ("transformers",) if by_transformers else ()


def _of_foreign(folder: Path) -> tuple[str, ...]:
    """The packages of a model folder whose model, or the autoencoder of its latents, is of another library."""
    facts = _facts(folder)
    vae = (facts.get("vae") or {}).get("uri", "")
    if in_store(vae):
        foreign = (cache.last_config(vae) or {}).get("model") in (PIPELINE, "foreign_vae")
    else:
        foreign = bool(vae) and storage.is_local(vae) and is_foreign(Path(storage.filesystem(vae)[1]))
    # its config names the class
    return ("accelerate", "diffusers") if foreign or "class_name" in facts["config"] else ()


def _pinned(package: str) -> str:
    """The requirement of a package in the version that is here; in any where it is not, as a text encoder's in a training."""
    try:
        # without a build's own suffix, such as +cpu, which the package index does not know
        return f"{package}=={version(package).partition('+')[0]}"
    except PackageNotFoundError:
        return package


def _facts(folder: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((folder / "config.json").read_bytes())
    return facts


def _signature(folder: Path) -> Any:
    """The inputs, outputs and parameters of a model folder's pyfunc (see pyfunc.py)."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec
    from mlflow.types.schema import Array, DataType

    from longtake.training.models import kind_of
    from longtake.training.registry import gaps
    from longtake.training.registry.requests import columns_of, parameters_of

    kind = kind_of(_facts(folder))
    video = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, -1, 3))])
    if kind.generator is not None:
        columns, parameters = (
            dict.fromkeys(columns_of(kind.accepts), False) | {"seed": True},
            parameters_of(kind.accepts),
        )
    elif kind.infiller is not None:
        columns, parameters = dict.fromkeys(gaps.NEEDED, True) | dict.fromkeys(gaps.WORDS, False), gaps.PARAMETERS
    else:
        return ModelSignature(inputs=video, outputs=video)
    clip = Array(Array(Array(Array(DataType.integer))))
    types = {"seed": "long", "frames": "long", "before": clip, "after": clip}
    table = Schema([ColSpec(types.get(name, "string"), name, required=needed) for name, needed in columns.items()])
    changes = ParamSchema([ParamSpec(name, of, None) for name, of in parameters.items()])
    return ModelSignature(inputs=table, outputs=video, params=changes)


def _logged(client: Any, run_id: str, sha256: str) -> str | None:
    """The id of a complete model that a run has logged; its incomplete ones are deleted."""
    experiment = client.get_run(run_id).info.experiment_id
    complete = None
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if model.status == "READY" and model.tags.get("sha256") == sha256:
            complete = model.model_id
        elif model.status != "READY" and "sha256" in model.tags:
            if not delete_artifacts(location := model.artifact_location):
                print(
                    f"tracking: {location}: half a model of a killed run, which this store cannot delete",
                    file=sys.stderr,
                )
            client.delete_logged_model(model.model_id)
    return complete


def _data(inputs: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Data sets and views as inputs of a run, with our digests."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    return [
        DatasetInput(
            MetaDataset(
                CodeDatasetSource({"uri": shown(facts["uri"])}), name=field, digest=facts["digest"][:_DIGEST]
            )._to_mlflow_entity(),
            [InputTag("mlflow.data.context", "training")],
        )
        for field, facts in inputs.items()
        if facts.get("digest")
    ]


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide MLflow's advice, which it prints past logging; its errors are exceptions."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
