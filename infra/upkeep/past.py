"""What MLflow knows of past runs of stages, for those who ask what is still needed."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from longtake.datasets.errors import Failure
from longtake.infra.runs import Runs
from longtake.training.registry.store import everything
from longtake.training.registry.uri import parse

_PAGE = 1000


class PastRun(NamedTuple):
    """A stage's run in MLflow."""

    id: str
    experiment: str
    status: str
    fingerprint: str
    kind: str
    output: str
    uri: str
    params: Mapping[str, str]

    @property
    def running(self) -> bool:
        return self.status in ("RUNNING", "SCHEDULED")


def past_runs(store: Runs, condition: str) -> list[PastRun]:
    """The stages' runs of all experiments of the store."""
    client = store.client
    experiments = [e.experiment_id for e in everything(client.search_experiments)]
    runs = everything(client.search_runs, experiments, condition, max_results=_PAGE)
    return [_past_run(run) for run in runs if "longtake.output" in run.data.tags]


def _past_run(run: Any) -> PastRun:
    info, tags = run.info, run.data.tags
    fingerprint, kind, output, uri = (
        tags.get(f"longtake.{tag}", "") for tag in ("fingerprint", "kind", "output", "uri")
    )
    return PastRun(info.run_id, info.experiment_id, info.status, fingerprint, kind, output, uri, run.data.params)


def version_of(store: Runs, uri: str) -> Any:
    """The registered version that a `models:/NAME/VERSION` URI names; None if there is none."""
    from mlflow.exceptions import MlflowException

    name, number, _ = parse(uri)
    if not number:
        return None
    try:
        return store.client.get_model_version(name, number)
    except MlflowException as e:
        if e.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise Failure(f"{uri}: {str(e).splitlines()[0]}") from e
        return None
