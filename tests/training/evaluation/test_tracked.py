"""The leaderboard in MLflow: a run for the evaluation, one for each model below it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlflow
import pytest
from evaluated import group, model, table, value, video, write
from mlflow import MlflowClient

from longtake.training.evaluation import tracked
from longtake.training.evaluation.table import Table, read


@pytest.fixture
def client(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    yield MlflowClient()
    mlflow.set_tracking_uri(None)


@pytest.fixture
def made(tmp_path: Path) -> Table:
    models = [model("models:/latte@champion", "a", "models:/latte/3", settings={"steps": 50}), model("/m/gan", "b")]
    psnr = {"psnr": ("higher", {"a": value(31.0, 30.5, 31.5), "b": value(26.0)})}
    curve = {"psnr": {"a": [[0.5, 31.0, 30.0, 32.0], [1.5, 29.0, None, None]]}}
    groups = [group("reconstruction", psnr, frames=17, curves=curve), group("gaps", psnr, "2", frames=24)]
    groups.append(group("speed", {"rate": ("higher", {"a": value(9.0, 8.0, 10.0)})}, "3", machine="one"))
    return read(write(tmp_path / "evaluation", table(models, groups, [video("a", "17f-s0")])))


def test_each_model_is_a_run_below_the_evaluations(client: Any, made: Table, tmp_path: Path) -> None:
    with tracked.run("evaluation", f"{tmp_path}/artifacts") as parent:
        tracked.write(made, tmp_path / "evaluation", parent)
        tracked.write(made, tmp_path / "evaluation", parent)  # as after a kill: nothing twice
    whole = client.get_run(parent)
    assert whole.info.status == "FINISHED" and client.get_experiment(whole.info.experiment_id).name == "evaluations"
    below = client.search_runs([whole.info.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'")
    runs = {run.info.run_name: run for run in below}
    assert len(below) == 2 and set(runs) == {"models:/latte@champion", "/m/gan"}
    ours, theirs = runs["models:/latte@champion"].data, runs["/m/gan"].data
    assert {name: ours.metrics[name] for name in ("rate", "rate_low", "rate_high")} == {
        "rate": 9.0, "rate_low": 8.0, "rate_high": 10.0
    }  # fmt: skip
    assert ours.metrics["reconstruction.psnr_low"] == 30.5 and theirs.metrics["gaps.psnr"] == 26.0
    assert "rate" not in theirs.metrics and "gaps.psnr_low" not in theirs.metrics, "what is not known is not there"
    history = client.get_metric_history(runs["models:/latte@champion"].info.run_id, "by_step/psnr")
    assert [(point.step, point.value) for point in history] == [(0, 31.0), (1, 29.0)]
    assert ours.params["model"] == "models:/latte/3" and ours.params["settings.steps"] == "50"
    assert ours.params["split"] == "val" and ours.params["size"] == "64×64"
    assert ours.params["gaps.frames"] == "24" and ours.params["speed.machine"] == "one"
    assert "speed.machine" not in theirs.params and theirs.params["reconstruction.frames"] == "17"
    files = Path(client.download_artifacts(parent, tracked.FOLDER, str(tmp_path)))
    assert read(files) == made and (files / made.videos[0]["file"]).stat().st_size


def test_half_a_run_of_a_model_is_made_again(
    client: Any, made: Table, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with tracked.run("evaluation", f"{tmp_path}/artifacts") as parent:
        monkeypatch.setattr(tracked.log, "log_table", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            tracked.write(made, tmp_path / "evaluation", parent)
        monkeypatch.undo()
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
        tracked.write(made, tmp_path / "evaluation", parent)
    experiment = client.get_run(parent).info.experiment_id
    below = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert [run.info.status for run in below] == ["FINISHED"] * 2 and all(run.data.metrics for run in below)
