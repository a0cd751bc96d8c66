"""`longtake doctor`: a line a check, exit code 1 where one fails, and nothing left behind."""

import json
import re
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from longtake.datasets import storage
from longtake.infra import graph, recipe, runs
from longtake.infra.cli.housekeeping import doctor as command
from longtake.infra.upkeep import doctor, machine

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(autouse=True)
def prepared(own_store: None, with_store: Callable[[Path], None], tmp_path: Path) -> None:
    """A workspace `ws` with a store whose tables need not be made."""
    with_store(tmp_path / "ws")


def write(folder: Path, workspace: str | None = None, sources: str | None = None, **more: Any) -> str:
    (folder / "videos").mkdir(exist_ok=True)
    (folder / "videos" / "a.mp4").write_bytes(b"1")
    stages = {
        "shards": {"kind": "shard", "sources": [sources or str(folder / "videos")], **more.pop("shards", {})},
        "view": {"kind": "curate", "dataset": "shards"},
    }
    path = folder / "r.yaml"
    content = {"name": "ill", "workspace": workspace or str(folder / "ws"), "stages": stages, **more}
    path.write_text(yaml.safe_dump(content))
    return str(path)


def examined(path: str, address: str | None = None) -> dict[str, list[doctor.Line]]:
    loaded = recipe.load(path)
    found: dict[str, list[doctor.Line]] = {}
    for line in doctor.examine(loaded, graph.build(loaded), address):
        found.setdefault(line.check, []).append(line)
    return found


class Server(HTTPServer):
    """Answers everything with a Date that is `ahead` seconds from now."""

    ahead = 0.0


class _Handler(BaseHTTPRequestHandler):
    def do_HEAD(self) -> None:
        self.send_response_only(200)
        self.send_header("Date", formatdate(time.time() + self.server.ahead, usegmt=True))  # type: ignore[attr-defined]
        self.end_headers()

    do_GET = do_HEAD

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[tuple[Server, str]]:
    running = Server(("127.0.0.1", 0), _Handler)
    threading.Thread(target=running.serve_forever, daemon=True).start()
    yield running, f"http://127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def test_a_fit_machine_and_workspace_pass_and_nothing_is_left_behind(tmp_path: Path) -> None:
    path = write(tmp_path)
    found = examined(path)
    for check in ("MLflow", "MLflow artifacts", "storage", "sources of shards", "resources", "versions"):
        assert [line.level for line in found[check]] == ["ok"], found[check]
    assert "ms an operation" in found["storage"][0].says and "MB/s" in found["storage"][0].says
    store = runs.connect(recipe.load(path))
    assert not store.client.search_runs([store.experiment]), "the run that was tried is deleted"
    assert not list((tmp_path / "ws").rglob("*doctor*"))


def test_the_versions_that_the_product_is_tested_with_are_those_of_its_constraints() -> None:
    pinned = dict(re.findall(r"^([\w-]+)==([\w.+]+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE))
    for name in ("ray", "torch", "deepspeed", "mlflow"):
        assert pinned[name].startswith(machine.TESTED[name] + "."), name


def test_another_version_than_tested_is_a_warning_that_names_the_fix() -> None:
    lines = list(machine.versions(machine.TESTED | {"mlflow": "2.0"}))
    [line] = [line for line in lines if line.check == "version of mlflow"]
    assert line.level == "warn" and "tested with 2.0" in line.says and 'pip install "mlflow==2.0.*"' in line.fix


def test_a_version_below_what_is_required_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "requires", lambda _: ["torch>=99.0", 'nosuchpackage>=1; extra == "pipeline"'])
    lines = {line.check: line for line in machine.versions()}
    assert lines["version of torch"].level == "fail" and "torch>=99.0" in lines["version of torch"].fix
    assert lines["version of nosuchpackage"].level == "warn"


def test_mlflow_that_is_down_is_one_line_without_its_password(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://ann:secret@127.0.0.1:{port}")
    result = CliRunner().invoke(command, [write(tmp_path)])
    [line] = [line for line in result.output.splitlines() if "MLflow" in line]
    assert result.exit_code == 1 and line.startswith("fail ") and f"port {port}" in line
    assert "secret" not in result.output


def test_a_store_that_gives_back_other_tags_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path)
    store = runs.connect(recipe.load(path))
    monkeypatch.setattr(type(store.client), "set_tag", lambda *_: None)
    [line] = examined(path)["MLflow"]
    assert line.level == "fail" and "another tag" in line.says


def test_artifacts_that_cannot_be_written_are_a_failure(tmp_path: Path) -> None:
    path = write(tmp_path)
    loaded = recipe.load(path)
    store = runs.connect(loaded)
    place = tmp_path / "ws" / "artifacts"
    assert store.experiment
    place.write_text("a file in the way")
    found = examined(path)
    assert found["MLflow"][0].level == "ok" and found["MLflow artifacts"][0].level == "fail", found


def test_a_workspace_that_cannot_be_written_is_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/m.db")
    [line] = examined(write(tmp_path, workspace=f"{tmp_path}/file/ws"))["storage"]
    assert line.level == "fail" and "/file/ws" in line.says


def test_a_store_that_loses_or_keeps_what_it_should_not_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(storage, "read", lambda url: b"other")
        assert next(doctor.round_trip(str(tmp_path / "a"))).level == "fail"
    with monkeypatch.context() as patch:
        patch.setattr(doctor, "_delete", lambda url: None)
        [line] = doctor.round_trip(str(tmp_path / "b"))
        assert line.level == "fail" and "could not be deleted" in line.says
    [line] = doctor.round_trip(str(tmp_path / "c"))
    assert line.level == "ok" and not (tmp_path / "c").exists(), "it was not there before"


def test_sources_that_are_not_there_are_a_failure_and_other_checks_go_on(tmp_path: Path) -> None:
    found = examined(write(tmp_path, sources=str(tmp_path / "nowhere")))
    assert [line.level for line in found["sources of shards"]] == ["fail"] and found["resources"][0].level == "ok"


def test_a_recipe_that_asks_for_more_than_there_is_is_told_what_and_where(tmp_path: Path) -> None:
    path = write(tmp_path, shards={"run": {"cpus": 512}})
    [line] = examined(path)["resources"]
    assert line.level == "fail" and "stages.shards.run.cpus: needs 512 CPU" in line.says and "this machine" in line.says
    result = CliRunner().invoke(command, [path])
    assert result.exit_code == 1 and "needs 512 CPU" in result.output


def test_a_cluster_is_asked_where_one_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, server: tuple[Server, str]
) -> None:
    from longtake.infra.cluster import jobs

    address = server[1]
    monkeypatch.setattr(jobs, "cluster_nodes", lambda _: [{"CPU": 600.0}, {"CPU": 8.0, "GPU": 2.0}])
    monkeypatch.setattr(jobs, "cluster_labels", lambda _: [{}, {}])
    monkeypatch.setattr(jobs, "cluster_version", lambda _: "2.60.0")
    found = examined(write(tmp_path, shards={"run": {"cpus": 512}}), address)
    assert "2 nodes, 608 CPUs, 2 GPUs" in found["Ray"][0].says
    assert found["resources"][0].level == "ok"
    monkeypatch.setattr(jobs, "cluster_version", lambda _: "1.9.0")
    assert "runs Ray 1.9.0" in examined(write(tmp_path), address)["Ray"][0].says


def test_a_cluster_that_does_not_answer_is_one_line_each(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"http://127.0.0.1:{taken.getsockname()[1]}"
    found = examined(write(tmp_path), address)
    assert [line.level for line in found["Ray"]] == ["fail"] and "nothing answers" in found["Ray"][0].says
    assert [line.level for line in found["resources"]] == ["fail"]


@pytest.mark.parametrize(("ahead", "level"), [(0, "ok"), (60, "warn"), (-60, "warn"), (7200, "fail")])
def test_a_clock_that_is_off_is_noticed(server: tuple[Server, str], ahead: float, level: str) -> None:
    running, url = server
    running.ahead = ahead
    [line] = doctor.clocks([url])
    assert line.level == level and (level == "ok" or ("behind" if ahead < 0 else "ahead") in line.says)


def test_limits_of_the_machine_are_compared(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 1024))
    [line] = machine.open_files()
    assert line.level == "warn" and "1024" in line.says and "ulimit -n" in line.fix
    monkeypatch.setattr(machine, "LEAST_MEMORY", 1 << 60)
    assert next(machine.memory()).level == "warn"
    monkeypatch.setattr(machine, "SHARED_SHARE", 1e6)
    assert (
        next(machine.shared_memory()).level == "warn"
        and next(machine.shared_memory(str(tmp_path / "no"))).level == "warn"
    )
    monkeypatch.setattr(machine, "LEAST_DISK", 1 << 60)
    [line] = machine.disks([str(tmp_path / "not" / "there" / "yet")])
    assert line.level == "warn" and not (tmp_path / "not").exists()
    monkeypatch.setattr(machine, "FULL", 0.0)
    assert next(machine.disks([str(tmp_path)])).level == "fail"


def test_a_check_that_breaks_is_a_finding_and_not_a_stack_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken() -> Iterator[doctor.Line]:
        raise RuntimeError("//ann:secret@host is odd\nand more")
        yield

    monkeypatch.setattr(machine, "memory", broken)
    lines = {line.check: line for line in doctor.examine()}
    assert lines["memory"].level == "fail" and lines["memory"].says.startswith("RuntimeError: //ann")
    assert "disk of" in " ".join(lines)


def test_without_a_recipe_the_machine_alone_is_looked_at_and_json_is_json() -> None:
    done = subprocess.run(
        [sys.executable, "-P", "-c", "from longtake.infra.cli.housekeeping import doctor; doctor()", "--json"],
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    lines = json.loads(done.stdout)
    assert {"versions", "accelerators", "memory"} <= {line["check"] for line in lines}
    assert done.returncode == int(any(line["level"] == "fail" for line in lines))
    assert not {"storage", "MLflow", "resources"} & {line["check"] for line in lines}
