"""MLflow's store of models: what a URI names, which versions there are, and their artifacts; its errors as ours.

Model folders themselves are in `disk`, fetching them in `cache`, writing them in `log`.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown
from longtake.training.registry.uri import parse

_CHUNK = 1 << 16  # bytes read at a time; a connection that breaks loses the current chunk


def resolve(uri: str) -> dict[str, str | None]:
    """The version that a `models:/` URI names now (see `locate`): its own URI and its sha256."""
    named = locate(uri)
    return {"uri": named.uri, "sha256": named.sha256}


class Unreachable(Failure):
    """The store does not answer. A pulled model may still be in the cache."""


@dataclass(frozen=True)
class Named:
    """What a URI names in the registry now."""

    uri: str  # of the version itself, since aliases move
    version: str  # empty for a model that is not registered
    sha256: str | None  # of the weights, as registered (see `disk.digest`)
    created: int  # milliseconds; a new store counts versions from 1 again
    location: str  # of the artifacts


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
    """An MLflow client for small questions about `what`: a store that hangs is given up in less than a minute.

    Raises:
        UserError: no store is named, or it does not have what the block asks for.
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
            version = by_alias(name, alias) if alias else by_number(name, number)
        except MlflowException as e:
            if e.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"{uri}: {_alternatives(client, name)}") from e
        location = client.get_model_version_download_uri(name, version.version)
    number = str(version.version)
    return Named(f"models:/{name}/{number}", number, version.tags.get("sha256"), version.creation_timestamp, location)


def missing(uri: str) -> str:
    """A sentence where the version of a URI, or its files on this machine's disks, are gone; else empty.

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
    """The location of the artifacts of the run that made a model (see `locate`).

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
    entries = everything(client.search_model_versions, f"name = {mark}{name}{mark}")
    return sorted(entries, key=lambda v: -int(v.version))


def everything(search: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Any]:
    """All pages of one of the client's searches."""
    entries, token = [], None
    while True:
        page = search(*args, page_token=token, **kwargs)
        entries += page
        token = page.token
        if not token:
            return entries


def _alternatives(client: Any, name: str) -> str:
    """The names that exist, for the message that a model, version or alias does not."""
    models = {m.name: m for m in everything(client.search_registered_models) if "longtake.lock" not in m.tags}
    where = shown(store())
    if name not in models:
        names = ", ".join(sorted(models)[:20]) or "none"
        return f"no model {name!r} is registered in {where}; registered: {names}"
    numbers = ", ".join(str(v.version) for v in versions(client, name)[:20]) or "none"
    aliases = ", ".join(f"{alias} ({number})" for alias, number in sorted(models[name].aliases.items())) or "none"
    return f"no such version or alias of {name} in {where}; versions: {numbers}; aliases: {aliases}"


def _of_run(uri: str) -> Named:
    run_id, _, path = uri.removeprefix("runs:/").strip("/").partition("/")
    name, _, inside = path.partition("/")
    with asking(uri) as client:
        info = client.get_run(run_id).info
        logged = client.search_logged_models([info.experiment_id], f"source_run_id = '{run_id}'")
        # a model that a run has logged is not among its artifacts
        places = [(m.artifact_location, inside) for m in logged if m.name == name] or [(info.artifact_uri, path)]
    return Named(uri, "", None, 0, "/".join(part.rstrip("/") for part in places[0] if part))


def delete_artifacts(location: str) -> bool:
    """Delete all files at an artifact location. False where its store cannot delete, for example MLflow's SFTP.

    Raises MLflow's own errors.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    try:
        get_artifact_repository(location).delete_artifacts()
    except NotImplementedError:
        # MLflow's base class raises it for stores that have no such thing
        return False
    return True


def is_served(location: str) -> bool:
    """Whether a server hands out these artifacts, by `list_served` and `read_served`."""
    return location.startswith(("http://", "https://", "mlflow-artifacts:"))


def list_served(location: str, path: str) -> dict[str, int | None]:
    """The names in a folder of artifacts, with the size of a file in bytes, None of a folder.

    Raises:
        Unreachable, Failure: as `asking`.
    """
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    with asking(f"{location}/{path}"):
        entries = get_artifact_repository(location).list_artifacts(path or None)
    return {f.path.rsplit("/", 1)[-1]: None if f.is_dir else (f.file_size or 0) for f in entries}


def read_served(location: str, path: str, start: int) -> tuple[int, Iterator[bytes]]:
    """A file from byte `start` on, or from 0 where the server cannot do that: the first byte's number, and the bytes.

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
        response = http_request(host, f"/{quote(path)}", "GET", extra_headers=headers, **options)
    except MlflowException as e:
        raise ConnectionError(line(e)) from e
    if response.status_code not in (200, 206):
        response.close()
        kind = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}.get(response.status_code)
        raise (kind or ConnectionError)(f"{path}: the server answers {response.status_code} {response.reason}")
    return (start if response.status_code == 206 else 0), response.iter_content(_CHUNK)


def line(e: Exception) -> str:
    """The first line of an error, without logins and keys."""
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


def _unanswered(e: Exception) -> bool:
    """Whether an error means that the store does not answer."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(e, MlflowException):
        silent = e.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
        return silent and not isinstance(e, RestException)
    return getattr(e, "response", None) is None
