"""Shared by the tests of commands: a store of runs with its tables, and variables that end with the test."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session", autouse=True)
def own_token() -> None:
    """Ray reads its token once in a process: now, so that a test with another one leaves the Ray that tests share alone."""
    from ray._raylet import AuthenticationTokenLoader

    assert AuthenticationTokenLoader.instance().has_token()


@pytest.fixture(scope="session")
def fresh_store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An sqlite store with nothing in it; its tables take seconds to make. Copy it."""
    import mlflow

    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    mlflow.MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def with_store(fresh_store: Path) -> Callable[[Path], None]:
    """Puts a fresh store into a workspace."""

    def put(workspace: Path) -> None:
        workspace.mkdir(parents=True, exist_ok=True)
        shutil.copy(fresh_store, workspace / "mlflow.db")

    return put


@pytest.fixture
def own_store(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Variables of `runs.connect` and stages, and the store that MLflow remembers, end with the test."""
    import mlflow

    # an earlier test's, which would come before what this one's environment says
    mlflow.set_tracking_uri(None)
    names = ("TRACKING_URI", "EXPERIMENT_NAME", "RUN_ID", "HTTP_REQUEST_TIMEOUT")
    for name in (*(f"MLFLOW_{n}" for n in names), "LONGTAKE_RECIPE", "RAY_ADDRESS"):
        # a value first, so that whatever the test leaves there is taken back
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    yield
    mlflow.set_tracking_uri(None)
