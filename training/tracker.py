"""All that training tells MLflow and asks of it: a stage's run (metrics, videos, files) and the model registry.

What a run is told lies in a spool on disk first, and a thread sends it: tracking that is down, slow or killed neither
stops training nor loses anything.
"""

import contextlib
import io
import json
import math
import os
import re
import shutil
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np

from longtake.datasets import clip
from longtake.datasets.errors import Failure, UserError
from longtake.training.spool import Place, Spool

_EVERY = 5.0  # seconds between batches, and between attempts while tracking is down
_PATIENCE = 60.0  # seconds without any progress after which `close` gives up
_BATCH = 1000  # metrics; MLflow takes no more at once
_NAME = re.compile(r"\w[\w.-]*")
_PIECE = 1 << 16  # bytes of a file that is read; what a connection that breaks has brought of one is lost
_DIGEST = 32  # hex digits of a data set's digest; MLflow takes 36 characters


class Tracker:
    """A stage's MLflow run; on rank 0 only, best in a `with`. See `connect`."""

    def __init__(self, run_id: str, spool: Spool, system_metrics: bool) -> None:
        self.run_id, self.spool = run_id, spool
        self._step: int | None = None
        self._trouble = ""
        self._refused: set[str] = set()
        self._stop_sampling, self._closing = threading.Event(), threading.Event()
        self._sender = threading.Thread(target=self._keep_sending, name="tracker", daemon=True)
        self._sampler = threading.Thread(target=self._keep_sampling, name="system metrics", daemon=True)
        self._sender.start()
        if system_metrics:
            self._sampler.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step. Returns at once; infinities arrive as NaN, since MLflow would keep 1.8e308 for them."""
        self._step = step
        self._append(step, metrics)

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        """A video as artifact `samples/step-00001000/NAME.mp4`: encoded here, sent by the thread.

        Args:
            name: letters, digits, `_`, `-` and dots.
            frames: (T, H, W, 3) uint8, H and W even.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"video {name!r}: its name may have letters, digits, '_', '-' and dots")
        shape = frames.shape
        if (
            frames.dtype != np.uint8
            or frames.ndim != 4
            or shape[3] != 3
            or not shape[0]
            or any(n % 2 for n in shape[1:3])
        ):
            raise ValueError(f"video {name}: need uint8 (T, H, W, 3) with even H and W, got {frames.dtype} {shape}")
        place = Path("samples") / f"step-{step:08d}" / f"{name}.mp4"
        self._queue(place, lambda scratch: clip.write(scratch, frames, fps))

    def later(self, path: Path, name: str) -> None:
        """`artifacts` for the middle of training: copied here, sent by the thread."""
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            place = Path(name) / file.relative_to(path if path.is_dir() else path.parent)
            self._queue(place, partial(shutil.copyfile, file))

    def artifacts(self, path: Path, name: str) -> None:
        """What is in a folder, or one file, as artifacts in the folder `name` of the run; sent before it returns.

        Raises:
            Failure: that was not possible.
        """
        with _failing_clearly(f"MLflow: {name}"):
            send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            send(self.run_id, str(path), name)

    def close(self) -> None:
        """Send the rest and end the threads. Raises Failure where something could not be sent; it stays in the spool."""
        self._stop(_PATIENCE)
        steps, files = self.spool.left(), len(self.spool.files())
        if steps or files:
            what = " and ".join([f"{steps} steps' metrics"] * bool(steps) + [f"{files} files"] * bool(files))
            why = self._trouble or self.spool.trouble or f"no answer for {_PATIENCE:.0f} s"
            raise Failure(
                f"MLflow: {what} could not be sent ({why}); they are kept in {self.spool.folder}: run the same command again"
            )
        self.spool.remove()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """`close`; after an error only what can be sent in some seconds, and the next process sends the rest."""
        self._stop(_EVERY) if error else self.close()

    def _stop(self, patience: float) -> None:
        """End the threads after a last attempt to send, which may take as long as it makes progress."""
        self._stop_sampling.set()
        if self._sampler.is_alive():
            self._sampler.join(_EVERY)
        self._closing.set()
        while self._sender.is_alive():
            before = self.spool.place, len(self.spool.files())
            self._sender.join(patience)
            if before == (self.spool.place, len(self.spool.files())):
                break

    def _queue(self, place: Path, write: Callable[[Path], Any]) -> None:
        """Let `write` make a file that becomes the artifact `place`."""
        path, scratch = self.spool.files_folder / place, self.spool.folder / f"queued{place.suffix}"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write(scratch)
            scratch.replace(path)
        except OSError as e:
            print(f"tracking: {path}: {e.strerror or e}; it is left out", flush=True)

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient()

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self.spool.append([step, int(time.time() * 1000), values])

    def _keep_sending(self) -> None:
        while not self._closing.wait(_EVERY):
            self._send()
        self._send()

    def _send(self) -> None:
        """Send all that waits, or note why that is not possible."""
        try:
            for place, batch in self._batches():
                self._post(batch)
                self.spool.sent(place)
            for path, name in self.spool.files():
                self._client.log_artifact(self.run_id, str(path), str(name.parent))
                path.unlink()
        except Exception as e:
            # stores raise errors of many kinds, and none may end this thread
            if not self._trouble:
                print(f"tracking: {_line(e)}; what is logged is kept in {self.spool.folder} and sent later", flush=True)
            self._trouble = _line(e)
        else:
            if self._trouble:
                print("tracking: works again", flush=True)
            self._trouble = ""

    def _batches(self) -> Iterator[tuple[Place, list[Any]]]:
        """What waits in the spool, at most _BATCH metrics at once where a step has no more."""
        from mlflow.entities import Metric

        batch: list[Any] = []
        end = self.spool.place
        for place, (step, when, values) in self.spool.waiting():
            if batch and len(batch) + len(values) > _BATCH:
                yield end, batch
                batch = []
            batch += [Metric(k, v if math.isfinite(v) else math.nan, when, step) for k, v in values.items()]
            end = place
        if batch:
            yield end, batch

    def _post(self, metrics: list[Any]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            for start in range(0, len(metrics), _BATCH):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + _BATCH], synchronous=True)
        except MlflowException as e:
            if e.error_code != "INVALID_PARAMETER_VALUE":
                raise
            if len(metrics) > 1:
                # one that MLflow will never take shall not hold up the others
                for metric in metrics:
                    self._post([metric])
            elif (name := metrics[0].key) not in self._refused:
                self._refused.add(name)
                print(f"tracking: metric {name!r} is refused ({_line(e)}) and left out", flush=True)

    def _keep_sampling(self) -> None:
        """System metrics under MLflow's names, by its own readers, at the last logged step.

        Its own sender would stop for good when tracking is down once, and ask for the whole run at each reading.
        """
        try:
            from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

            monitors = _monitors()
            seconds = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10
            for monitor in monitors:
                # a rate is one since the last reading: the first says nothing
                monitor.collect_metrics()
            stop = False
            while not stop:
                stop = self._stop_sampling.wait(seconds)
                for monitor in monitors:
                    monitor.clear_metrics()
                    monitor.collect_metrics()
                values = {f"system/{k}": v for m in monitors for k, v in m.aggregate_metrics().items()}
                if self._step is not None:
                    self._append(self._step, values)
        except Exception as e:
            # drivers fail in many ways, and none may touch training
            print(f"tracking: no system metrics ({_line(e)})", flush=True)


def connect(folder: Path, system_metrics: bool = True) -> Tracker:
    """The run that MLFLOW_RUN_ID names, as `longtake stage` sets it.

    What an earlier process of this run left in the spool is sent too. The process must be the only one with `folder`.

    Args:
        folder: local, outlives the process, such as the stage's checkpoints; the spool is `tracking/RUN` in it.
        system_metrics: log use of CPU, memory, disk, network and GPU, every 10 seconds or as
            MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says.

    Raises:
        UserError: MLFLOW_RUN_ID is not set.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID", "")
    if not _NAME.fullmatch(run_id):
        raise UserError("MLFLOW_RUN_ID: is not set; start training by `longtake run` or `longtake stage`")
    return Tracker(run_id, Spool(folder / "tracking" / run_id), system_metrics)


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
    parents = {field: facts["uri"] for field, facts in lineage.get("inputs", {}).items()}
    tags = {"sha256": sha256} | {f"parent.{field}": uri for field, uri in parents.items()}
    with _failing_clearly(f"MLflow: {name}"), _quietly():
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
            python_model=str(Path(__file__).with_name("served.py")),
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
    """What the pyfunc of a model folder takes and gives (see served.py)."""
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, ParamSchema, ParamSpec, Schema, TensorSpec

    video = Schema([TensorSpec(np.dtype("uint8"), (-1, -1, -1, -1, 3))])
    if json.loads((folder / "config.json").read_bytes())["model"] != "latte":
        return ModelSignature(inputs=video, outputs=video)
    asked = [("long", "seed", True), ("string", "class", False), ("long", "frames", False)]
    table = Schema([ColSpec(kind, name, required=required) for kind, name, required in asked])
    changes = ParamSchema([ParamSpec("steps", "long", None), ParamSpec("guidance", "double", None)])
    return ModelSignature(inputs=table, outputs=video, params=changes)


def _logged(client: Any, run_id: str, sha256: str) -> str | None:
    """The id of a model that a run has logged whole; those that it has logged by half are deleted."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    experiment = client.get_run(run_id).info.experiment_id
    found = None
    for model in client.search_logged_models([experiment], f"source_run_id = '{run_id}'"):
        if model.status == "READY" and model.tags.get("sha256") == sha256:
            found = model.model_id
        elif model.status != "READY" and "sha256" in model.tags:
            try:
                get_artifact_repository(model.artifact_location).delete_artifacts()
            except NotImplementedError:
                # how MLflow says that a store cannot delete
                where = model.artifact_location
                print(
                    f"tracking: {where}: half a model of a killed run, which this store cannot delete", file=sys.stderr
                )
            client.delete_logged_model(model.model_id)
    return found


def _data(inputs: Mapping[str, Mapping[str, Any]]) -> list[Any]:
    """Data sets and views as inputs of a run, with our digests."""
    from mlflow.data.code_dataset_source import CodeDatasetSource
    from mlflow.data.meta_dataset import MetaDataset
    from mlflow.entities import DatasetInput, InputTag

    return [
        DatasetInput(
            MetaDataset(
                CodeDatasetSource({"uri": facts["uri"]}), name=field, digest=facts["digest"][:_DIGEST]
            )._to_mlflow_entity(),
            [InputTag("mlflow.data.context", "training")],
        )
        for field, facts in inputs.items()
        if facts.get("digest")
    ]


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        # where there is no such GPU they do not start
        with contextlib.suppress(Exception):
            monitors.append(kind())
    return monitors


def _line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0][:300]


@contextlib.contextmanager
def _failing_clearly(what: str) -> Iterator[None]:
    """Turn MLflow's errors into ours."""
    import mlflow
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError, ImportError) as e:
        code = getattr(e, "error_code", "")
        missing = isinstance(e, FileNotFoundError) or code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")
        store = without_password(mlflow.get_tracking_uri())
        message = f"{what}: {without_password(_line(e))} (tracking store: {store})"
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
        with _failing_clearly(what):
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
    name, at, alias = uri.removeprefix("models:/").partition("@")
    name, _, number = (name, "", "") if at else name.partition("/")
    with asking(uri) as client:
        if name.startswith("m-") and not at and not number:
            model = client.get_logged_model(name)
            return Named(uri, "", model.tags.get("sha256"), model.creation_timestamp, model.artifact_location)
        if not name or not (alias if at else number == "latest" or number.isdecimal()):
            raise UserError(f"{uri}: name a model as models:/NAME@ALIAS or models:/NAME/VERSION")
        try:
            if number == "latest":
                number = str(max((int(v.version) for v in versions(client, name)), default=0))
            by_alias, by_number = client.get_model_version_by_alias, client.get_model_version
            found = by_alias(name, alias) if at else by_number(name, number)
        except MlflowException as e:
            if e.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"{uri}: {_instead(client, name)}") from e
        location = client.get_model_version_download_uri(name, found.version)
    number = str(found.version)
    return Named(f"models:/{name}/{number}", number, found.tags.get("sha256"), found.creation_timestamp, location)


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
    where = without_password(store())
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
        raise ConnectionError(without_password(_line(e))) from e
    if answer.status_code not in (200, 206):
        answer.close()
        kind = {401: PermissionError, 403: PermissionError, 404: FileNotFoundError}.get(answer.status_code)
        raise (kind or ConnectionError)(f"{path}: the server answers {answer.status_code} {answer.reason}")
    return (start if answer.status_code == 206 else 0), answer.iter_content(_PIECE)


def without_password(uri: str) -> str:
    """An address as it may be shown."""
    return re.sub(r"://[^/@\s]*@", "://", uri)


def _unanswered(e: Exception) -> bool:
    """Whether an error is that of a store that does not answer, not an answer."""
    from mlflow.exceptions import MlflowException, RestException

    if isinstance(e, MlflowException):
        silent = e.error_code in ("INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE")
        return silent and not isinstance(e, RestException)
    return getattr(e, "response", None) is None
