"""What is noted of runs that are stopped, of two at once, and of those that are resumed; and which runs a report shows."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from longtake.datasets.errors import Interrupted, UserError
from longtake.infra import cli, graph, recipe, runner, runs
from longtake.infra.graph import Node
from longtake.infra.recipe import Recipe
from longtake.infra.runs import Runs

pytestmark = pytest.mark.usefixtures("own_store")
VAE = {
    "kind": "pretrain_vae", "phase": "image", "dataset": "s3://lake/clips", "model": {"preset": "pv_vae_tiny"},
    "sizes": [[32, 32]], "lambda_gan": 0,
}  # fmt: skip


class Workspace:
    """A recipe whose stages are run by hand: their traces in MLflow, without the work."""

    def __init__(self, folder: Path, stages: dict[str, Any]) -> None:
        self.folder = folder
        self.path = folder / "r.yaml"
        self.path.write_text(yaml.safe_dump({"name": "kept", "workspace": str(folder / "ws"), "stages": stages}))

    def open(self, *overrides: str) -> tuple[Recipe, dict[str, Node], Runs]:
        loaded = graph.pin(recipe.load(str(self.path), overrides))
        return loaded, {node.name: node for node in graph.build(loaded)}, runs.connect(loaded)

    def ran(self, stage: str, uri: str, *overrides: str) -> str:
        """A finished run of a stage; its id."""
        _, nodes, store = self.open(*overrides)
        run, _ = store.open(nodes[stage], None)
        store.finish(run, {"uri": uri})
        return run

    def registered(self) -> str:
        """A version of a model; its URI."""
        _, _, store = self.open()
        store.client.create_registered_model("pv-vae")
        (self.folder / "model").mkdir()
        store.client.create_model_version("pv-vae", str(self.folder / "model"))
        return "models:/pv-vae/1"

    def status(self, *overrides: str) -> str:
        """The status of the whole recipe's run."""
        _, nodes, store = self.open(*overrides)
        run = store.find(graph.whole_fingerprint(list(nodes.values())))
        assert run
        return run.status

    def says(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
        capsys.readouterr()
        assert cli.exit_code(lambda: cli.cli([*arguments, str(self.path)], standalone_mode=False)) == 0
        return capsys.readouterr().out


@pytest.fixture
def here(tmp_path: Path, with_store: Callable[[Path], None]) -> Workspace:
    with_store(tmp_path / "ws")
    return Workspace(tmp_path, {"vae": VAE})


def test_a_stage_that_is_stopped_when_it_is_made_again_is_not_taken_for_its_run_from_before(
    here: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    here.ran("vae", here.registered())
    loaded, _, _ = here.open()
    start = subprocess.Popen
    # as `longtake` ends that was stopped and has saved its state
    stopped = "import os, sys; sys.exit(int(os.environ.get('LONGTAKE_STOPPED_CODE', '0')))"
    monkeypatch.delenv("LONGTAKE_STOPPED_CODE", raising=False)
    with monkeypatch.context() as patch:
        patch.setattr(runner.subprocess, "Popen", lambda _, **more: start([sys.executable, "-c", stopped], **more))
        with pytest.raises(Interrupted):
            runner.run(loaded, runner.Choice(start="vae"), print)
    assert here.status() == "KILLED" and "LONGTAKE_STOPPED_CODE" not in os.environ


def test_a_second_start_leaves_the_run_to_the_process_that_is_at_it(here: Workspace) -> None:
    loaded, nodes, store = here.open()
    run, output = store.open(nodes["vae"], None)
    folder = Path(output) / "checkpoints"
    folder.mkdir(parents=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is training here already"):
            runner.run_stage(loaded, "vae")
    assert store.client.get_run(run).info.status == "RUNNING"


def test_a_run_that_finds_its_folder_busy_by_another_one_has_failed(here: Workspace) -> None:
    """As by the same training under another name."""
    loaded, nodes, store = here.open()
    folder = Path(nodes["vae"].output) / "checkpoints"
    folder.mkdir(parents=True)
    with (folder / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="is training here already"):
            runner.run_stage(loaded, "vae")
    found = store.find(nodes["vae"].fingerprint)
    assert found and found.status == "FAILED"


def test_a_run_with_nothing_to_do_shows_its_own_report(here: Workspace) -> None:
    model, other = here.registered(), "stages.vae.steps=7"
    ids = [here.ran("vae", model), here.ran("vae", model, other)]
    page = here.folder / "ws" / "report.html"

    def shown(*overrides: str) -> list[bool]:
        loaded, _, _ = here.open(*overrides)
        assert runner.run(loaded, runner.Choice(), print) == page
        return [run in page.read_text() for run in ids]

    assert shown() == [True, False]
    made = page.read_bytes()
    assert shown() == [True, False] and page.read_bytes() == made, "it is there already"
    assert shown(other) == [False, True]
    assert shown() == [True, False]


def test_a_report_from_halfway_ends_no_recipe_and_is_made_again_at_the_end(
    tmp_path: Path, with_store: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with_store(tmp_path / "ws")
    stages: dict[str, Any] = {"vae": VAE, "next": {**VAE, "parent": "vae", "seed": 1}}
    del stages["next"]["model"]
    here = Workspace(tmp_path, stages)
    model = here.registered()
    first = here.ran("vae", model)
    here.says(capsys, "report")
    page = tmp_path / "ws" / "report.html"
    assert here.status() == "KILLED" and first in page.read_text()
    loaded, nodes, store = here.open()
    run, _ = store.open(nodes["next"], None)
    store.end(run, "FAILED", "no luck")
    here.says(capsys, "report")
    assert here.status() == "FAILED"
    store.open_parent(loaded, graph.whole_fingerprint(list(nodes.values())))
    here.says(capsys, "report")
    assert here.status() == "RUNNING", "another process is at it"
    second = here.ran("next", model)
    here.says(capsys, "run")
    assert here.status() == "FINISHED" and second in page.read_text()


def test_a_report_is_of_the_dataset_that_its_view_is_of(
    tmp_path: Path, with_store: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with_store(tmp_path / "ws")
    (tmp_path / "a.mp4").write_bytes(b"1")
    shards = {"kind": "shard", "sources": [str(tmp_path / "a.mp4")]}
    view = {"kind": "curate", "dataset": "first"}
    here = Workspace(tmp_path, {"first": shards, "view": view, "second": shards | {"group_sources": 7}})
    for stage, uri in (("first", "one"), ("view", "one/views/v.parquet"), ("second", "two")):
        here.ran(stage, f"{tmp_path}/{uri}")
    here.says(capsys, "report")
    text = (tmp_path / "ws" / "report.html").read_text()
    assert f"{tmp_path}/one: no dataset" in text and f"{tmp_path}/two: no dataset" not in text


def test_of_a_run_that_goes_on_neither_its_stop_nor_its_old_error_is_told(
    here: Workspace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _, nodes, store = here.open()
    run, _ = store.open(nodes["vae"], None)
    store.end(run, "FAILED", "the disk was full")
    assert "the disk was full" in here.says(capsys, "status")
    store.open(nodes["vae"], None)
    assert "the disk was full" not in here.says(capsys, "status")
    later = time.time() + 3600
    with monkeypatch.context() as patch:
        patch.setattr(runs.time, "time", lambda: later)
        found = store.find(nodes["vae"].fingerprint)
    assert found and found.status == "RUNNING" and found.seconds > 3590
