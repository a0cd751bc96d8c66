"""The store of runs when it is locked, closed, moved, or what it names was deleted."""

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from longtake.datasets.errors import Failure, UserError
from longtake.infra import cli, graph, recipe, runner, runs, sqlite_store
from longtake.infra.graph import Node
from longtake.infra.runs import Runs

pytestmark = pytest.mark.usefixtures("own_store")
VAE = {"kind": "pretrain_vae", "phase": "image", "dataset": "s3://lake/clips", "model": {"preset": "pv_vae_tiny"}}


def opened(folder: Path, workspace: Path, uri: str = "") -> tuple[Runs, Node]:
    """The store of a recipe of one training stage, and its node."""
    path = folder / "r.yaml"
    stage = VAE | {"sizes": [[32, 32]], "lambda_gan": 0}
    path.write_text(yaml.safe_dump({"name": "kept", "workspace": str(workspace), "stages": {"vae": stage}}))
    os.environ["MLFLOW_TRACKING_URI"] = uri
    loaded = recipe.load(str(path))
    return runs.connect(loaded), graph.build(loaded)[0]


def trained(store: Runs, node: Node) -> str:
    """A finished run that has registered a version, without the work; its id."""
    run_id, output = store.open(node, None)
    Path(output, "checkpoints").mkdir(parents=True)
    store.client.log_text(run_id, "x", "model/config.json")
    store.client.create_registered_model("pv-vae")
    source = f"{store.client.get_run(run_id).info.artifact_uri}/model"
    store.client.create_model_version("pv-vae", source, run_id)
    store.finish(run_id, {"uri": "models:/pv-vae/1"})
    return run_id


def runs_again(store: Runs, node: Node, capsys: pytest.CaptureFixture[str]) -> str:
    """Whether the stage would run, and what is said; empty where it is reused."""
    again = runner.plan(None, [node], store, runner.Choice())["vae"]  # type: ignore[arg-type]
    said = capsys.readouterr().err
    assert again == bool(said)
    return said


def test_a_look_into_a_store_knows_the_tables_of_this_mlflow(fresh_store: Path) -> None:
    with sqlite3.connect(fresh_store) as db:
        # where another version of MLflow has changed them: check what `sqlite_store` reads, then note that version
        assert db.execute("SELECT version_num FROM alembic_version").fetchall() == [(sqlite_store.SCHEMA,)]


def test_a_run_with_nothing_to_do_starts_no_engine_and_no_client(
    tmp_path: Path, with_store: Callable[[Path], None]
) -> None:
    with_store(tmp_path / "ws")
    opened(tmp_path, tmp_path / "ws")
    pinned = graph.pin(recipe.load(str(tmp_path / "r.yaml")))
    store, nodes = runs.connect(pinned), graph.build(pinned)
    location = Path(store.client.get_run(trained(store, nodes[0])).info.artifact_uri)
    assert (location / "model").is_dir()
    parent = store.open_parent(pinned, graph.whole_fingerprint(nodes))
    store.finish(parent, {"uri": "report.html"})
    (tmp_path / "ws" / "report.html").write_text(runner._mark(nodes, store))
    script = (
        "import sys; from longtake.infra.cli import cli; cli(['run', sys.argv[1]], standalone_mode=False)\n"
        "heavy = {'mlflow', 'sqlalchemy', 'deepspeed', 'ray', 'pandas', 'torch._dynamo'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    command = [sys.executable, "-P", "-c", script, str(tmp_path / "r.yaml")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "vae: reused" in done.stdout and "models:/pv-vae/1" in done.stdout

    # a version whose files are gone is made again
    shutil.rmtree(location / "model")
    assert store.loss("models:/pv-vae/1") == f"the files of models:/pv-vae/1 are gone from {location}/model"


def test_what_was_deleted_of_a_finished_training_is_said_and_made_again(
    tmp_path: Path, with_store: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with_store(tmp_path / "ws")
    store, node = opened(tmp_path, tmp_path / "ws")
    run_id = trained(store, node)
    capsys.readouterr()
    assert runs_again(store, node, capsys) == ""
    shutil.move(tmp_path / "ws" / "artifacts", tmp_path / "away")
    assert "vae: the files of models:/pv-vae/1 are gone from " in runs_again(store, node, capsys)
    shutil.move(tmp_path / "away", tmp_path / "ws" / "artifacts")
    store.client.delete_model_version("pv-vae", "1")
    assert runs_again(store, node, capsys).startswith(
        "vae: models:/pv-vae/1 is gone from the registry; it is made again"
    )
    # it works where its checkpoint is
    assert store.open(node, None)[1] == node.output
    store.client.delete_run(run_id)
    for run in store.client.search_runs([store.experiment]):
        store.client.delete_run(run.info.run_id)
    assert runs_again(store, node, capsys).startswith("vae: its run in MLflow was deleted; it is made again")
    assert store.open(node, None)[1] == node.output


def test_an_experiment_that_was_deleted_is_restored_and_said(
    tmp_path: Path, with_store: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with_store(tmp_path / "ws")
    store, node = opened(tmp_path, tmp_path / "ws")
    trained(store, node)
    store.client.delete_experiment(store.experiment)
    capsys.readouterr()
    store, node = opened(tmp_path, tmp_path / "ws")
    assert "the experiment kept was deleted; it is restored" in capsys.readouterr().err
    assert store.finished(node.fingerprint)


@pytest.mark.parametrize("copied", [False, True])
def test_a_workspace_that_was_moved_or_copied_goes_on_from_what_it_holds(
    tmp_path: Path, with_store: Callable[[Path], None], copied: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    old, new = tmp_path / "old", tmp_path / "elsewhere" / "new"
    with_store(old)
    store, node = opened(tmp_path, old)
    run_id = trained(store, node)
    new.parent.mkdir()
    (shutil.copytree if copied else shutil.move)(old, new)
    capsys.readouterr()
    store, node = opened(tmp_path, new)
    assert f"was at {old} before; its records now name {new}" in capsys.readouterr().err
    assert runs_again(store, node, capsys) == ""
    assert store.finished(node.fingerprint).output == node.output  # type: ignore[union-attr]
    assert Path(store.client.get_run(run_id).info.artifact_uri, "model", "config.json").is_relative_to(new)
    assert Path(store.client.download_artifacts(run_id, "model/config.json")).read_text() == "x"
    assert store.client.get_model_version_download_uri("pv-vae", "1").startswith(str(new))
    assert old.exists() == copied
    # once is enough
    opened(tmp_path, new)
    assert capsys.readouterr().err == ""


def test_a_moved_workspace_is_known_by_a_relative_uri_of_its_store(
    tmp_path: Path,
    with_store: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_store(tmp_path / "old")
    trained(*opened(tmp_path, tmp_path / "old"))
    (tmp_path / "old").rename(tmp_path / "new")
    capsys.readouterr()
    monkeypatch.chdir(tmp_path)
    store, node = opened(tmp_path, tmp_path / "new", "sqlite:///new/mlflow.db")
    assert f"its records now name {tmp_path / 'new'}" in capsys.readouterr().err
    assert runs_again(store, node, capsys) == ""


def test_a_link_to_a_workspace_is_no_move(
    tmp_path: Path, with_store: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with_store(tmp_path / "ws")
    store, node = opened(tmp_path, tmp_path / "ws")
    trained(store, node)
    (tmp_path / "link").symlink_to("ws")
    capsys.readouterr()
    store, node = opened(tmp_path, tmp_path / "link")
    assert runs_again(store, node, capsys) == ""


def test_records_of_another_store_are_taken_at_the_workspace_s_present_path(
    tmp_path: Path, with_store: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server keeps the runs, and each machine mounts the workspace at a path of its own."""
    old, new = tmp_path / "old", tmp_path / "new"
    old.mkdir()
    with_store(tmp_path / "server")
    uri = f"sqlite:///{tmp_path}/server/mlflow.db"

    def connected(workspace: Path) -> tuple[Runs, Node]:
        path = tmp_path / "r.yaml"
        stages = {"view": {"kind": "curate", "dataset": "s3://lake/clips"}}
        path.write_text(yaml.safe_dump({"name": "kept", "workspace": str(workspace), "stages": stages}))
        monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
        loaded = recipe.load(str(path))
        return runs.connect(loaded), graph.build(loaded)[0]

    store, node = connected(old)
    run_id, output = store.open(node, None)
    Path(output).mkdir(parents=True)
    store.finish(run_id, {"uri": output})
    old.rename(new)
    store, node = connected(new)
    run = store.finished(node.fingerprint)
    assert run and run.uri == run.output == node.output == output.replace(str(old), str(new))


def test_a_locked_store_is_waited_for_and_then_told_in_a_line(
    tmp_path: Path,
    with_store: Callable[[Path], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with_store(tmp_path / "ws")
    path = tmp_path / "ws" / "mlflow.db"
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN EXCLUSIVE")
    monkeypatch.setattr(sqlite_store, "PATIENCE", 0.1)
    with pytest.raises(Failure, match=r"mlflow.db: another program has kept this store of runs locked"):
        opened(tmp_path, tmp_path / "ws")
    assert "locked by another program; waiting" in capsys.readouterr().err
    monkeypatch.setattr(sqlite_store, "PATIENCE", 60.0)
    # it is let go as soon as somebody waits
    monkeypatch.setattr(sqlite_store, "print", lambda *_, **__: other.execute("ROLLBACK"), raising=False)
    assert opened(tmp_path, tmp_path / "ws")[0].find("0") is None


@pytest.mark.parametrize(
    "what", ["attempt to write a readonly database", "unable to open database file", "database is locked"]
)
def test_a_store_that_cannot_be_written_is_one_line(
    what: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "sqlite:////there/mlflow.db")

    def fails() -> None:
        try:
            raise sqlite3.OperationalError(what)
        except sqlite3.OperationalError as e:
            raise RuntimeError("(sqlite3.OperationalError) and sixty lines") from e

    assert cli.exit_code(fails) == 1
    said = capsys.readouterr().err
    assert said.startswith("error: MLFLOW_TRACKING_URI=sqlite:////there/mlflow.db: ") and said.count("\n") == 1


def test_no_password_of_a_store_or_source_is_printed_or_logged(
    tmp_path: Path, with_store: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with_store(tmp_path / "ws")
    path = tmp_path / "r.yaml"
    stage = VAE | {"dataset": "http://me:TopSecret@host/clips", "run": {"upload": "s3://b/x?token=TopSecret"}}
    path.write_text(yaml.safe_dump({"name": "kept", "workspace": f"{tmp_path}/ws", "stages": {"vae": stage}}))
    loaded = recipe.load(str(path))
    store, node = runs.connect(loaded), graph.build(loaded)[0]
    run_id, _ = store.open(node, store.open_parent(loaded, "0"))
    store.end(run_id, "FAILED", "UserError: http://me:TopSecret@host/clips: no such thing")
    store.log_json(run_id, "result.json", {"uri": "http://me:TopSecret@host/clips"})
    for command in (cli.cli.commands["status"], cli.cli.commands["graph"]):
        command.main([str(path)], standalone_mode=False)
    assert "host/clips" in (said := capsys.readouterr().out) and "TopSecret" not in said
    kept = [*(tmp_path / "ws").rglob("*.json"), *(tmp_path / "ws").rglob("*.yaml"), tmp_path / "ws" / "mlflow.db"]
    assert len(kept) >= 3 and not [p for p in kept if b"TopSecret" in p.read_bytes()]


@pytest.mark.parametrize("workspace", ["sftp://me:TopSecret@host/ws", "s3://b/ws?token=TopSecret"])
def test_a_workspace_with_a_login_is_refused_for_its_addresses_are_recorded(tmp_path: Path, workspace: str) -> None:
    with pytest.raises(UserError, match=r"r.yaml: workspace .*\*\*\*.* has a login or key in it") as e:
        opened(tmp_path, workspace)  # type: ignore[arg-type]
    assert "TopSecret" not in str(e.value)
    with pytest.raises(UserError, match=r"--to .* has a login or key in it"):
        cli.cli.commands["resolve"].main(["quickstart", "--to", workspace], standalone_mode=False)


def test_a_stack_trace_has_no_passwords(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        raise ZeroDivisionError("sftp://me:TopSecret@host/ws")
    except ZeroDivisionError as e:
        cli._print_trace(type(e), e, e.__traceback__)
    said = capsys.readouterr().err
    assert said.startswith("Traceback") and said.endswith("ZeroDivisionError: sftp://***@host/ws\n")
    assert "TopSecret" not in said


def test_text_with_quotes_and_logins_is_logged_as_json(tmp_path: Path, with_store: Callable[[Path], None]) -> None:
    with_store(tmp_path / "ws")
    store, node = opened(tmp_path, tmp_path / "ws")
    run_id, _ = store.open(node, None)
    store.log_json(run_id, "result.json", {"why": 'asked for "http://h/x?token=TopSecret\\"'})
    text = Path(store.client.download_artifacts(run_id, "result.json")).read_text()
    assert json.loads(text) == {"why": 'asked for "http://h/x?token=***"'}


def test_a_stage_that_the_system_kills_is_told_though_it_could_not_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    start = subprocess.Popen
    node: Any = type("N", (), {"name": "vae"})
    code = f"import os; os.kill(os.getpid(), {int(signal.SIGKILL)})"
    monkeypatch.setattr(runner.subprocess, "Popen", lambda command, env: start([sys.executable, "-c", code]))
    with pytest.raises(Failure, match="stage vae: its process was killed by signal 9, perhaps for want of memory"):
        runner._run_process("r.yaml", node, "0", fresh=False)


@pytest.mark.parametrize("name", ["my ws", "it's [4K]", "ü#;&::@+", "-$HOME *"])
def test_a_workspace_may_have_an_odd_path(tmp_path: Path, with_store: Callable[[Path], None], name: str) -> None:
    with_store(tmp_path / name)
    store, node = opened(tmp_path, tmp_path / name)
    run_id = trained(store, node)
    assert not runner.plan(None, [node], store, runner.Choice())["vae"]  # type: ignore[arg-type]
    assert Path(store.client.download_artifacts(run_id, "model/config.json")).read_text() == "x"
    assert {path.name for path in tmp_path.iterdir()} == {name, "r.yaml"}


@pytest.mark.parametrize("name", ["a?b", "100%", "a\nb"])
def test_a_workspace_where_no_store_can_lie_is_refused_by_its_key(tmp_path: Path, name: str) -> None:
    with pytest.raises(UserError, match=r"r.yaml: workspace .* choose another path, or set MLFLOW_TRACKING_URI"):
        opened(tmp_path, tmp_path / name)


def test_no_training_goes_on_in_another_workspace(tmp_path: Path, with_store: Callable[[Path], None]) -> None:
    with_store(tmp_path / "ws")

    def opened_in(workspace: str, steps: int) -> str:
        content = {"name": "shared", "workspace": str(tmp_path / workspace), "stages": {"vae": VAE | {"steps": steps}}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
        loaded = recipe.load(str(tmp_path / "r.yaml"))
        output = runs.connect(loaded).open(graph.build(loaded)[0], None)[1]
        Path(output).mkdir(parents=True, exist_ok=True)
        return output

    first = opened_in("one", 100)
    other = opened_in("two", 200)
    assert other.startswith(f"{tmp_path}/two/") and opened_in("one", 300) == first
    assert opened_in("two", 400) == other


def test_a_training_goes_on_where_it_was_by_other_steps_another_name_and_after_force(
    tmp_path: Path, with_store: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    with_store(tmp_path / "ws")
    store, _ = opened(tmp_path, tmp_path / "ws")

    def node(**changes: Any) -> Node:
        stage = VAE | {"sizes": [[32, 32]], "lambda_gan": 0} | changes
        content = {"name": "kept", "workspace": str(tmp_path / "ws"), "stages": {"vae": stage}}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
        return graph.build(recipe.load(str(tmp_path / "r.yaml")))[0]

    # a run that has failed, with updates to leave out; more steps; a name
    run_id, output = store.open(node(steps=100), None)
    store.end(run_id, "FAILED", "not finite")
    capsys.readouterr()
    left_out, place = store.open(node(steps=100, skip_nonfinite=3), None)
    assert left_out != run_id and place == output == node(steps=100).output != node(steps=100, skip_nonfinite=3).output
    assert capsys.readouterr().out == f"vae: goes on in {output}; --force begins anew\n"
    store.finish(left_out, {"uri": "models:/pv-vae/1"})
    longer, place = store.open(node(steps=200), None)
    assert place == output == store.output_of(node(steps=200, name="better"))
    store.finish(longer, {"uri": "models:/pv-vae/2"})

    # a training that has finished with more steps is another, and so is one of other settings
    assert store.output_of(node(steps=50)) == node(steps=50).output
    assert store.output_of(node(steps=200, lr=0.5)) == node(steps=200, lr=0.5).output

    # with fewer steps again it begins anew, whether its own run had failed or not
    _, place = store.open(node(steps=100), None)
    assert place.startswith(f"{output}-")

    # a run from nothing replaces what was before
    _, anew = store.open(node(steps=200), None, fresh=True)
    assert anew.startswith(f"{node(steps=200).output}-")
    assert store.open(node(steps=300), None)[1] == anew == store.output_of(node(steps=200, name="better"))
