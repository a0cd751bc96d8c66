"""The calls of promotion to the registry: aliases, tags, empty models that are locks, and runs of its own.

Each call waits for the answer, and raises, as `store.asking`, UserError where there is no such model, version
or run, and Failure where the store cannot be reached.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from longtake.datasets.errors import Failure, UserError
from longtake.datasets.masking import shown, shown_within
from longtake.training.registry.store import asking, everything
from longtake.training.registry.uri import parse

_PARENT = "mlflow.parentRunId"


def split(uri: str) -> tuple[str, str]:
    """(name, version) of "models:/NAME/VERSION". Raises UserError for anything else."""
    name, number, _ = parse(uri)
    if not name or not number.isdigit():
        raise UserError(f"{uri}: needs a version of a registered model, such as models:/pv-vae/3")
    return name, number


def read(name: str) -> dict[str, str]:
    """The aliases of a registered model: `{alias: version}`."""
    with asking(f"models:/{name}") as client:
        numbers = client.get_registered_model(name).aliases
    return {alias: str(number) for alias, number in numbers.items()}


def put(name: str, alias: str, number: str) -> None:
    """Give a version an alias, which another one loses."""
    with asking(f"models:/{name}/{number}") as client:
        client.set_registered_model_alias(name, alias, number)


def tags_of(name: str) -> dict[str, str] | None:
    """The tags of a registered model; None where there is none."""
    with asking(f"models:/{name}") as client:
        try:
            return dict(client.get_registered_model(name).tags)
        except Exception as e:
            if _code(e) == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise


def tag(name: str, key: str, value: str | None) -> None:
    """Set a tag of a registered model, or delete it."""
    with asking(f"models:/{name}") as client:
        if value is None:
            client.delete_registered_model_tag(name, key)
        else:
            client.set_registered_model_tag(name, key, value)


def tag_version(uri: str, tags: Mapping[str, str]) -> None:
    """Set tags of "models:/NAME/VERSION"."""
    name, number = split(uri)
    with asking(uri) as client:
        for key, value in tags.items():
            client.set_model_version_tag(name, number, key, value)


def create(name: str, tags: Mapping[str, str]) -> bool:
    """Make an empty registered model; False where there is one. Of several processes that try at once, one does."""
    with asking(f"models:/{name}") as client:
        try:
            client.create_registered_model(name, dict(tags))
        except Exception as e:
            # the latter: it existed, and was deleted before the store could say so
            if _code(e) in ("RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST"):
                return False
            raise
    return True


def delete(name: str) -> None:
    """Delete a registered model, with its versions if it has any."""
    with asking(f"models:/{name}") as client:
        client.delete_registered_model(name)


@contextmanager
def run_beside(uri: str, name: str) -> Iterator[str]:
    """The id of a new run, in the experiment of the run that made a version. The run ends with the block."""
    model, number = split(uri)
    with asking(uri) as client:
        training_run = client.get_model_version(model, number).run_id
        experiment = client.get_run(training_run).info.experiment_id if training_run else "0"
    with run_in(experiment, name) as run_id:
        yield run_id


@contextmanager
def run_in(experiment: str, name: str, tags: Mapping[str, str] | None = None) -> Iterator[str]:
    """The id of a new run in an experiment. The run ends with the block."""
    with asking(name) as client:
        run_id = str(client.create_run(experiment, tags=dict(tags or {}), run_name=name).info.run_id)
    try:
        yield run_id
    except BaseException as e:
        # a store that fails must not hide the error itself
        with suppress(UserError, Failure), asking(name) as client, redirect_stdout(StringIO()):
            client.set_tag(run_id, "longtake.error", shown(f"{type(e).__name__}: {e}")[:500])
            client.set_terminated(run_id, "FAILED" if isinstance(e, Exception) else "KILLED")
        raise
    # the client prints where the run can be seen
    with asking(name) as client, redirect_stdout(StringIO()):
        client.set_terminated(run_id, "FINISHED")


@contextmanager
def run_under(parent: str, name: str, tags: Mapping[str, str]) -> Iterator[str]:
    """The id of a new run below another one. The run ends with the block."""
    with asking(f"run {parent}") as client:
        experiment = client.get_run(parent).info.experiment_id
    with run_in(experiment, name, {_PARENT: parent, **tags}) as run_id:
        yield run_id


def runs_under(parent: str, key: str) -> list[tuple[str, str, bool]]:
    """The runs below another one that have a tag `key`: (its value, the run's id, whether it has finished)."""
    with asking(f"run {parent}") as client:
        experiment = client.get_run(parent).info.experiment_id
        found = everything(client.search_runs, [experiment], f"tags.`{_PARENT}` = '{parent}'")
    return [
        (run.data.tags[key], run.info.run_id, run.info.status == "FINISHED") for run in found if key in run.data.tags
    ]


def delete_run(run_id: str) -> None:
    """Delete a run."""
    with asking(f"run {run_id}") as client:
        client.delete_run(run_id)


def log_metrics(run_id: str, metrics: Mapping[str, float]) -> None:
    """Metrics of a run."""
    with asking(f"run {run_id}") as client:
        for name, value in metrics.items():
            client.log_metric(run_id, name, value)


def log_json(run_id: str, name: str, content: Any) -> None:
    """Plain data as an artifact of a run."""
    with asking(f"run {run_id}: {name}") as client:
        client.log_text(run_id, json.dumps(shown_within(content), indent=2, sort_keys=True), name)


def read_json(run_id: str, name: str) -> Any:
    """The data that `log_json` has logged; None where the run has no such artifact."""
    with asking(f"run {run_id}: {name}") as client, TemporaryDirectory() as folder:
        if not any(entry.path == name for entry in client.list_artifacts(run_id)):
            return None
        return json.loads(Path(client.download_artifacts(run_id, name, folder)).read_bytes())


def _code(e: Exception) -> str:
    return str(getattr(e, "error_code", ""))
