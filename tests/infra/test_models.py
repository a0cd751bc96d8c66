"""`longtake models`: what is listed, shown and fetched, and what is said when that cannot be."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from longtake.datasets.errors import Failure, UserError
from longtake.infra.cli import models
from longtake.training import registry
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.registry import disk


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """pv-vae with two versions, an empty model, and the lock of a promotion."""
    import mlflow

    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("MLFLOW_TRACKING_URI", uri)
        mlflow.set_tracking_uri(uri)
        client = mlflow.MlflowClient()
        experiment = client.create_experiment("e", f"{folder}/artifacts")
        for seed in (0, 1):
            torch.manual_seed(seed)
            vae = PVVAE(config_from_preset("pv_vae_tiny"))
            lineage = {"inputs": {"dataset": {"uri": "s3://lake/clips", "digest": "d" * 64}}}
            config = vae.config.model_dump(mode="json")
            disk.save(folder / "model", "pv_vae", config, vae.state_dict(), {"lineage": lineage})
            run = client.create_run(experiment).info.run_id
            client.log_metric(run, "psnr", 30.0 + seed)
            client.log_metric(run, "system/cpu", 1.0)
            registry.register(folder / "model", "pv-vae", run)
        client.set_registered_model_alias("pv-vae", "champion", "1")
        client.set_model_version_tag("pv-vae", "2", "gate.verdict", "kept")
        client.create_registered_model("empty")
        client.create_registered_model("pv-vae.lock", {"longtake.lock": "1"})
        yield uri
        mlflow.set_tracking_uri(None)


@pytest.fixture(autouse=True)
def environment(store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", store)
    monkeypatch.setenv("LONGTAKE_CACHE", str(tmp_path / "cache"))


def run(*arguments: str) -> Result:
    return CliRunner().invoke(models.models, arguments)


def said(*arguments: str) -> str:
    done = run(*arguments)
    assert done.exit_code == 0, (done.output, done.exception)
    return done.stdout


def refused(kind: type[Exception], *arguments: str) -> str:
    done = run(*arguments)
    assert isinstance(done.exception, kind), (done.output, done.exception)
    text = str(done.exception)
    assert "\n" not in text and len(text) < 600
    return text


def test_a_list_has_the_models_and_their_aliases_but_no_locks() -> None:
    rows = json.loads(said("list", "--json"))
    assert [(row["name"], row["versions"]) for row in rows] == [("empty", 0), ("pv-vae", 2)]
    assert rows[1]["aliases"] == {"candidate": "2", "champion": "1"} and rows[1]["newest"].endswith("Z")
    table = [line.split() for line in said("list").splitlines()]
    assert table[0] == ["NAME", "VERSIONS", "CHAMPION", "CANDIDATE", "PREVIOUS", "NEWEST"]
    assert table[2][:5] == ["pv-vae", "2", "1", "2", "-"]


def test_a_version_is_shown_with_what_is_known_of_it() -> None:
    facts = json.loads(said("show", "pv-vae@candidate", "--json"))
    assert facts["uri"] == "models:/pv-vae/2" and facts["aliases"] == ["candidate"] and facts["model"] == "pv_vae"
    assert facts["metrics"] == {"psnr": 31.0} and facts["gate"] == {"gate.verdict": "kept"}
    assert facts["inputs"]["dataset"]["uri"] == "s3://lake/clips" and facts["problem"] is None
    assert facts["bytes"] > 1000 and len(facts["sha256"]) == 64 and facts["parameters"]
    assert [(v["version"], v["aliases"], v["gate"]) for v in facts["versions"]] == [
        ("2", ["candidate"], "kept"),
        ("1", ["champion"], None),
    ]
    text = said("show", "models:/pv-vae")
    for line in ("models:/pv-vae/1 (champion)", "  model: pv_vae", "    psnr: 30", "    dataset: s3://lake/clips"):
        assert line in text.splitlines()
    assert not list(Path(os.environ["LONGTAKE_CACHE"]).rglob("*.safetensors")), "showing a model does not fetch it"


def test_a_model_is_pulled_and_copied(tmp_path: Path, store: str) -> None:
    folder = Path(said("pull", "pv-vae@champion").strip())
    assert folder.parent == tmp_path / "cache" / "models"
    assert said("pull", "models:/pv-vae/1", "--to", str(tmp_path / "m")).strip() == str(tmp_path / "m")
    assert sorted(p.name for p in (tmp_path / "m").iterdir()) == ["config.json", "model.safetensors"]
    assert len(registry.load(str(tmp_path / "m")).state_dict())
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "thesis.txt").touch()
    assert "is there already" in refused(UserError, "pull", "pv-vae/1", "--to", str(tmp_path / "there"))


def test_what_is_not_there_is_said_with_what_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "registered: empty, pv-vae" in refused(UserError, "show", "nothing")
    assert "versions: 2, 1; aliases: candidate (2), champion (1)" in refused(UserError, "show", "pv-vae@other")
    assert "versions: none" in refused(UserError, "show", "empty")
    assert "registered: empty, pv-vae" in refused(UserError, "pull", "nothing@champion")
    assert "versions: 2, 1" in refused(UserError, "pull", "pv-vae/7")
    assert "models:/NAME@ALIAS" in refused(UserError, "pull", "pv-vae")


def test_without_a_store_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for command in (["list"], ["show", "pv-vae"], ["pull", "pv-vae@champion"]):
        monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
        assert "MLFLOW_TRACKING_URI is not set" in refused(UserError, *command)
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/typo.db")
        assert "typo.db: no such database" in refused(UserError, *command)
    assert not (tmp_path / "typo.db").exists()


@pytest.mark.parametrize("hanging", [False, True])
def test_a_server_that_is_down_or_hangs_is_one_line(hanging: bool, tmp_path: Path) -> None:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        if hanging:
            listening.listen(16)
        settings = {
            "MLFLOW_TRACKING_URI": f"http://127.0.0.1:{listening.getsockname()[1]}",
            "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
            "MLFLOW_HTTP_REQUEST_TIMEOUT": "1",
        }
        script = "from longtake.infra import cli\ncli.cli.add_command(cli.models.models)\ncli.main()"
        script = "from longtake.infra.cli import models\n" + script
        command = [sys.executable, "-P", "-c", script, "models", "list"]
        done = subprocess.run(command, env=os.environ | settings, capture_output=True, text=True, timeout=100)
    assert done.returncode == 1, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert line.startswith("error: models: ") and "127.0.0.1" in line


def test_a_server_that_hangs_is_given_up_soon(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def note(*_: Any, **options: Any) -> None:
        asked.update({k: os.environ.get(k) for k in names})
        raise ConnectionError("down")

    names = ("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "MLFLOW_HTTP_REQUEST_TIMEOUT")
    for name in names:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("mlflow.MlflowClient.search_registered_models", note)
    assert "down" in refused(Failure, "list")
    # three tries of ten seconds each, and no trace afterwards
    assert asked == dict(zip(names, ("2", "10"), strict=True))
    assert not set(names) & set(os.environ)
