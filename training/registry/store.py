"""Models in MLflow's store: logged, registered, named by URIs, and read; its errors as ours.

What a model folder is, is in `registry`; how one is fetched, in `pull`.
"""

import contextlib
import io
import json
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.training.registry.uri import parse

_PIECE = 1 << 16  # bytes of a file that is read; what a connection that breaks has brought of one is lost
_DIGEST = 32  # hex digits of a data set's digest; MLflow takes 36 characters


def resolve(uri: str) -> dict[str, str | None]:
    """The version that a `models:/` URI names now (see `locate`): its own URI and its sha256."""
    found = locate(uri)
    return {"uri": found.uri, "sha256": found.sha256}


def log_model(folder: Path, name: str, run_id: str, sha256: str, lineage: Mapping[str, Any]) -> str:
    """Log a model folder to a run as a pyfunc and register it as `candidate`; returns "models:/NAME/VERSION".

    The run gets the data of the lineage as its inputs, the version the parents as tags. What this run has logged or
    registered before with the same digest is taken; what it has logged by half, since it was killed, is deleted.

    Raises:
        Failure: the store cannot be reached.
    """
    import mlflow

    client = mlflow.MlflowClient()
    parents = {field: shown(facts["uri"]) for field, facts in lineage.get("inputs", {}).items()}
    tags = {"sha256": sha256} | {f"parent.{field}": uri for field, uri in parents.items()}
    with failing_clearly(f"MLflow: {name}"), _quietly():
        client.log_inputs(run_id, _data(lineage.get("inputs", {})))
        known = client.search_model_versions(f"name = '{name}' and run_id = '{run_id}'")
        numbers = [int(v.version) for v in known if v.tags.get("sha256") == sha256]
        if not numbers:
            model = _logged(client, run_id, sha256) or _log(folder, run_id, sha256)
            numbers = [int(mlflow.register_model(f"models:/{model}", name, tags=tags).version)]
        client.set_registered_model_alias(name, "candidate", str(max(numbers)))
    return f"models:/{name}/{max(numbers)}"


def _log(folder: Path, run_id: str, sha256: str) -> str:
    """The id of a new model of a run."""
    import mlflow

    signature = _signature(folder)
    # `predict` checks what it gets: MLflow would print the array
    signature._is_signature_from_type_hint = True
    packages = ("longtake", "torch", "safetensors", "numpy", "pandas")
    mlflow.start_run(run_id=run_id, log_system_metrics=False)
    try:
        made = mlflow.pyfunc.log_model(
            name="model",
            python_model=str(Path(__file__).with_name("pyfunc.py")),
            artifacts={"model": str(folder)},
            signature=signature,
            # without a build's own suffix, such as +cpu, which the package index does not know
            pip_requirements=[f"{p}=={version(p).partition('+')[0]}" for p in packages],
            tags={"sha256": sha256},
        )
    finally:
        mlflow.end_run("RUNNING")
    return str(made.model_id)


def _signature(folder: Path) -> Any:
    """What the pyfunc of a model folder takes and gives (see pyfunc.py)."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    from longtake.training.models import kind_of

    kind = kind_of(json.loads((folder / "config.json").read_bytes()))
    video = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, -1, 3))])
    if kind.generator is None:
        return ModelSignature(inputs=video, outputs=video)
    asked = [("long", "seed", True), ("string", "class", False), ("long", "frames", False)]
    asked += [("string", "storyboard", False)] if "storyboard" in kind.accepts else []
    table = Schema([ColSpec(type_, name, required=required) for type_, name, required in asked])
    changes = ParamSchema([ParamSpec("steps", "long", None), ParamSpec("guidance", "double", None)])
    return ModelSignature(inputs=table, outputs=video, params=changes)


def _logged(client: Any, run_id: str, sha256: str) -> str | None:
    """The id of a model that a run has logged whole; those that it has logged by half are deleted."""
    experiment = client.get_run(run_id).info.experiment_id
    found = None
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if model.status == "READY" and model.tags.get("sha256") == sha256:
            found = model.model_id
        elif model.status != "READY" and "sha256" in model.tags:
            if not delete_artifacts(where := model.artifact_location):
                print(
                    f"tracking: {where}: half a model of a killed run, which this store cannot delete", file=sys.stderr
                )
            client.delete_logged_model(model.model_id)
    return found


def delete_artifacts(location: str) -> bool:
    """Delete all that lies at an artifact location. False where its store cannot delete, as MLflow's SFTP cannot.

    Raises MLflow's own errors.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(location).delete_artifacts()
    except NotImplementedError:
        # MLflow's base class raises it for stores that have no such thing
        return False
    return True


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


def line(e: Exception) -> str:
    return shown((str(e).splitlines() or [type(e).__name__])[0])[:300]


@contextlib.contextmanager
def failing_clearly(what: str) -> Iterator[None]:
    """Turn MLflow's errors into ours."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, ImportError) as e:
        code = getattr(e, "error_code", "")
        missing = isinstance(e, FileNotFoundError) or code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        store = shown(mlflow.get_tracking_uri())
        message = f"{what}: {line(e)} (tracking store: {store})"
        if "unsupported URI" in message and store.startswith(("sqlite", "mysql", "postgresql", "mssql")):
            message = f"{what}: the store {store} needs all of MLflow: pip install mlflow, or name a server"
        if missing or isinstance(e, ImportError):
            raise UserError(message) from e
        raise (Unreachable if _unanswered(e) else Failure)(message) from e


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Hide MLflow's advice, which it prints past logging; its errors are exceptions."""
    with contextlib.redirect_stderr(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class Unreachable(Failure):
    """The store does not answer; what it would say may be known from before."""


@dataclass(frozen=True)
class Named:
    """What a URI names in the registry now."""

    uri: str  # of the version itself, which its aliases may leave
    version: str  # empty of what is not registered
    sha256: str | None  # of its weights, as registered (see `registry.digest`)
    created: int  # milliseconds; a store that is made anew counts its versions from 1 again
    location: str  # of its artifacts


def store() -> str:
    """The registry that MLFLOW_TRACKING_URI or `mlflow.set_tracking_uri` names; local ones as absolute paths."""
    import mlflow

    uri = str(mlflow.get_registry_uri())
    scheme, _, path = uri.rpartition(":///" if uri.startswith("sqlite") else "://")
    if scheme in ("", "file", "sqlite") and not uri.startswith("databricks"):
        return f"{scheme or 'file'}:///{Path(path.removeprefix('file:')).absolute()}"
    return uri


@contextlib.contextmanager
def asking(what: str) -> Iterator[Any]:
    """An MLflow client for small questions about `what`: one that hangs is given up in less than a minute.

    Raises:
        UserError: no store is named, or it does not have what is asked for.
        Unreachable: it does not answer.
        Failure: it refuses.
    """
    import mlflow

    if not mlflow.tracking.is_tracking_uri_set():
        raise UserError(f"{what}: MLFLOW_TRACKING_URI is not set; name the store, such as http://HOST:5000")
    patience = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}
    ours = {name: value for name, value in patience.items() if name not in os.environ}
    os.environ |= ours
    try:
        with failing_clearly(what):
            yield mlflow.MlflowClient()
    finally:
        for name in ours:
            os.environ.pop(name, None)


def locate(uri: str) -> Named:
    """What `models:/NAME@ALIAS`, `models:/NAME/VERSION`, `models:/NAME/latest`, `models:/ID` of a logged model, or
    `runs:/RUN/PATH` names now.

    Raises:
        UserError: there is no such thing; says what there is instead.
        Unreachable, Failure: as `asking`.
    """
    from mlflow.exceptions import MlflowException

    if uri.startswith("runs:/"):
        return _of_run(uri)
    name, number, alias = parse(uri)
    with asking(uri) as client:
        if name.startswith("m-") and not alias and not number:
            model = client.get_logged_model(name)
            return Named(uri, "", model.tags.get("sha256"), model.creation_timestamp, model.artifact_location)
        if not name or not (alias or number == "latest" or number.isdecimal()):
            raise UserError(f"{uri}: name a model as models:/NAME@ALIAS or models:/NAME/VERSION")
        try:
            if number == "latest":
                number = str(max((int(v.version) for v in versions(client, name)), default=0))
            by_alias, by_number = client.get_model_version_by_alias, client.get_model_version
            found = by_alias(name, alias) if alias else by_number(name, number)
        except MlflowException as e:
            if e.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"{uri}: {_instead(client, name)}") from e
        location = client.get_model_version_download_uri(name, found.version)
    number = str(found.version)
    return Named(f"models:/{name}/{number}", number, found.tags.get("sha256"), found.creation_timestamp, location)


def missing(uri: str) -> str:
    """What a URI names and is not there any more, in words: the version, or its files on this machine's disks; or nothing.

    Raises:
        Unreachable, Failure: as `asking`.
    """
    try:
        location = locate(uri).location
    except UserError:
        return f"{uri} is gone from the registry"
    if "://" not in location and not Path(location).is_dir():
        return f"the files of {uri} are gone from {location}"
    return ""


def artifacts_of(uri: str) -> str:
    """Where the artifacts lie of the run that made what a URI names (see `locate`).

    Raises:
        UserError: there is no such thing, or no run is known.
        Unreachable, Failure: as `asking`.
    """
    scheme, _, path = locate(uri).uri.partition(":/")
    name, _, number = path.strip("/").partition("/")
    with asking(uri) as client:
        if scheme == "runs":
            run_id = name
        elif number:
            run_id = client.get_model_version(name, number).run_id
        else:
            run_id = client.get_logged_model(name).source_run_id
        if not run_id:
            raise UserError(f"{uri}: the store does not say which run has made it")
        return str(client.get_run(run_id).info.artifact_uri)


def versions(client: Any, name: str) -> list[Any]:
    """All versions of a registered model, the newest first."""
    mark = '"' if "'" in name else "'"
    found = everything(client.search_model_versions, f"name = {mark}{name}{mark}")
    return sorted(found, key=lambda v: -int(v.version))


def everything(search: Callable[..., Any], *given: Any, **named: Any) -> list[Any]:
    """All pages of one of the client's searches."""
    found, token = [], None
    while True:
        page = search(*given, page_token=token, **named)
        found += page
        token = page.token
        if not token:
            return found


def _instead(client: Any, name: str) -> str:
    """What there is, where something is asked for that there is not."""
    models = {m.name: m for m in everything(client.search_registered_models) if "longtake.lock" not in m.tags}
    where = shown(store())
    if name not in models:
        known = ", ".join(sorted(models)[:20]) or "none"
        return f"no model {name!r} is registered in {where}; registered: {known}"
    numbers = ", ".join(str(v.version) for v in versions(client, name)[:20]) or "none"
    known = ", ".join(f"{alias} ({number})" for alias, number in sorted(models[name].aliases.items())) or "none"
    return f"no such version or alias of {name} in {where}; versions: {numbers}; aliases: {known}"


def _of_run(uri: str) -> Named:
    run_id, _, path = uri.removeprefix("runs:/").strip("/").partition("/")
    name, _, inside = path.partition("/")
    with asking(uri) as client:
        info = client.get_run(run_id).info
        logged = client.search_logged_models([info.experiment_id], f"source_run_id = '{run_id}'")
        # a model that a run has logged does not lie in its artifacts
        places = [(m.artifact_location, inside) for m in logged if m.name == name] or [(info.artifact_uri, path)]
    return Named(uri, "", None, 0, "/".join(part.rstrip("/") for part in places[0] if part))


def is_served(location: str) -> bool:
    """Whether a server hands these artifacts out, by `list_served` and `read_served`."""
    return location.startswith(("http://", "https://", "mlflow-artifacts:"))


def list_served(location: str, path: str) -> dict[str, int | None]:
    """The names in a folder of artifacts, with the size of a file in bytes, None of a folder.

    Raises:
        Unreachable, Failure: as `asking`.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with asking(f"{location}/{path}"):
        found = get_artifact_repository(location).list_artifacts(path or None)
    return {f.path.rsplit("/", 1)[-1]: None if f.is_dir else (f.file_size or 0) for f in found}


def read_served(location: str, path: str, start: int) -> tuple[int, Iterator[bytes]]:
    """A file from byte `start` on, or where the server cannot do that, from 0 on: where, and the bytes.

    Raises, also while it is read:
        OSError: of kinds that `storage.retrying` tells apart.
    """
    from mlflow.exceptions import MlflowException
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository
    from mlflow.utils.credentials import get_default_host_creds
    from mlflow.utils.rest_utils import http_request

    headers = {"Accept-Encoding": "identity"} | ({"Range": f"bytes={start}-"} if start else {})
    host = get_default_host_creds(get_artifact_repository(location).artifact_uri)
    options = {"max_retries": 0, "raise_on_status": False, "stream": True}
    try:
        answer = http_request(host, f"/{quote(path)}", "GET", extra_headers=headers, **options)
    except MlflowException as e:
        raise ConnectionError(line(e)) from e
    if answer.status_code not in (200, 206):
        answer.close()
        kind = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}.get(answer.status_code)
        raise (kind or ConnectionError)(f"{path}: the server answers {answer.status_code} {answer.reason}")
    return (start if answer.status_code == 206 else 0), answer.iter_content(_PIECE)


def _unanswered(e: Exception) -> bool:
    """Whether an error is that of a store that does not answer, not an answer."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(e, MlflowException):
        silent = e.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
        return silent and not isinstance(e, RestException)
    return getattr(e, "response", None) is None
