"""What the end of a training needs is tried before its first step."""

import json
from collections.abc import Iterator
from pathlib import Path

import mlflow
import pytest
from mlflow import MlflowClient

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.training.config import TrainConfig
from longtake.training.launch import preflight


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[MlflowClient, str]]:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    mlflow.set_tracking_uri(uri)
    client = MlflowClient(uri)
    run_id = client.create_run(client.create_experiment("x", str(tmp_path / "artifacts"))).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", run_id)
    yield client, run_id
    mlflow.set_tracking_uri(None)


def test_registry_artifacts_and_upload_are_written_to(tmp_path: Path, run: tuple[MlflowClient, str]) -> None:
    client, run_id = run
    config = TrainConfig(name="tried", run={"upload": f"memory://{tmp_path.name}"})
    preflight.check(config)
    # and once more, as where a training goes on
    preflight.check(config)
    assert client.get_registered_model("tried").name == "tried" and not client.search_model_versions("name='tried'")
    logged = json.loads(Path(client.download_artifacts(run_id, "config.json")).read_bytes())
    assert TrainConfig(**logged) == config
    assert storage.names(f"memory://{tmp_path.name}") == []


def test_an_upload_that_cannot_be_written_is_named(tmp_path: Path, run: tuple[MlflowClient, str]) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"upload: .*/file/x cannot be written \(.*\); give the right to"):
        preflight.check(TrainConfig(run={"upload": str(tmp_path / "file" / "x")}))


def test_artifacts_that_cannot_be_written_are_named(tmp_path: Path, run: tuple[MlflowClient, str]) -> None:
    (tmp_path / "artifacts").write_text("in the way")
    with pytest.raises((UserError, Failure), match=f"MLflow: the artifacts of run {run[1]}: "):
        preflight.check(TrainConfig())


def test_a_registry_that_does_not_answer_is_told(
    run: tuple[MlflowClient, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", "http://127.0.0.1:9")
    with pytest.raises(Failure, match=r"models:/model: .*127.0.0.1"):
        preflight.check(TrainConfig())
