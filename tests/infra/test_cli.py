import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from longtake.infra.cli import cli, exit_code


def longtake(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", *arguments]
    return subprocess.run(command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=300)


class Here:
    """A command as `main` runs it, but in this process: a start costs seconds."""

    def __init__(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        self._capsys, self._monkeypatch = capsys, monkeypatch

    def __call__(
        self, *arguments: str, cwd: Path | None = None, **environment: str
    ) -> subprocess.CompletedProcess[str]:
        if cwd:
            self._monkeypatch.chdir(cwd)
        for name, value in environment.items():
            self._monkeypatch.setenv(name, value)
        self._capsys.readouterr()
        code = exit_code(lambda: cli(list(arguments), standalone_mode=False))
        return subprocess.CompletedProcess(arguments, code, *self._capsys.readouterr())


@pytest.fixture
def here(own_store: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Here:
    return Here(capsys, monkeypatch)


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from longtake.infra.cli import cli\n"
        "try: cli(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'ray', 'deepspeed', 'mlflow', 'av', 'matplotlib', 'pyarrow', 'pandas', 'numpy'}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "longtake run quickstart" in done.stdout


def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    commands = [[n] for n in cli.commands] + [["dataset", n] for n in cli.commands["dataset"].commands]  # type: ignore[attr-defined]
    for command in commands:
        assert exit_code(lambda c=command: cli([*c, "--help"], standalone_mode=False)) == 0  # type: ignore[misc]
        assert len(capsys.readouterr().out.splitlines()) > 4, command


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "none.yaml"], "no such recipe file"),
        (["run", "quickstart", "--only", "vea"], "there is no stage 'vea'"),
        (["run", "quickstart", "--set", "stages.vae.stpes=3"], "did you mean steps?"),
        (["stage", "quickstart", "view"], "its input shards has no finished run"),
        (["dataset", "ls", "nowhere"], "no dataset here"),
        (["dataset", "verify", "nowhere"], "no dataset here"),
        (["footage", "out", "--count", "0"], "count must be"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    here: Here, with_store: Callable[[Path], None], tmp_path: Path, arguments: list[str], says: str
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "a.mp4").write_bytes(b"1")
    with_store(tmp_path / "runs" / "quickstart")
    assert_one_line(here(*arguments, cwd=tmp_path, VIDEOS=str(tmp_path / "videos")), says)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["run", "none.yaml"], "no such recipe file"),
        (["run", "quickstart", "--set", "stages.vae.stpes=3"], "did you mean steps?"),
    ],
)
def test_so_it_is_in_a_process_of_its_own(tmp_path: Path, arguments: list[str], says: str) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    assert_one_line(longtake(*arguments, cwd=tmp_path, VIDEOS=str(tmp_path)), says)


def assert_one_line(done: subprocess.CompletedProcess[str], says: str) -> None:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and says in errors[0], done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("make", "says"), [("missing", "no such file or folder"), ("empty", "no video there")])
def test_a_missing_or_empty_folder_of_sources(here: Here, tmp_path: Path, make: str, says: str) -> None:
    if make == "empty":
        (tmp_path / "videos").mkdir()
    done = here("run", "quickstart", cwd=tmp_path, VIDEOS=str(tmp_path / "videos"))
    assert done.returncode == 2 and says in done.stderr and str(tmp_path / "videos") in done.stderr
    assert not list(tmp_path.rglob("*.tar"))


def test_an_unset_variable_is_named(tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "VIDEOS"}
    command = [sys.executable, "-P", "-m", "longtake.infra.cli", "graph", "quickstart"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "environment variable VIDEOS is not set" in done.stderr


def test_graph_json_has_every_stage_edge_and_command(here: Here, tmp_path: Path) -> None:
    import json

    (tmp_path / "a.mp4").write_bytes(b"1")
    done = here("graph", "quickstart", "--json", cwd=tmp_path, VIDEOS=str(tmp_path))
    described = json.loads(done.stdout)
    assert {tuple(e) for e in described["edges"]} >= {("shards", "view"), ("shards", "vae"), ("view", "vae")}
    assert all(s["command"][:2] == ["longtake", "stage"] for s in described["stages"])
    deployed = here("graph", "quickstart", "--json", "--set", "deploy.retries=7")
    assert json.loads(deployed.stdout)["deploy"]["retries"] == 7
    # the commands in it read the recipe anew
    lost = here("graph", "quickstart", "--json", "--set", "deploy.retries=7", "--set", "stages.vae.steps=9")
    assert_one_line(lost, "--set stages.vae.steps=9: a scheduler resolves quickstart anew, without it")
    assert here("graph", "quickstart", "--set", "stages.vae.steps=9").returncode == 0


def test_a_closed_workspace_is_one_line_and_exit_code_1(here: Here, tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    (tmp_path / "file").write_text("in the way")
    done = here("run", "quickstart", "--set", f"workspace={tmp_path}/file/x", cwd=tmp_path, VIDEOS=str(tmp_path))
    assert done.returncode == 1 and "choose a `workspace`" in done.stderr and "Traceback" not in done.stderr


def test_an_unreachable_tracking_server_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"1")
    done = longtake(
        "run",
        "quickstart",
        cwd=tmp_path,
        VIDEOS=str(tmp_path),
        MLFLOW_TRACKING_URI="http://127.0.0.1:9",
        MLFLOW_HTTP_REQUEST_MAX_RETRIES="0",
    )
    assert (
        done.returncode == 2
        and "MLFLOW_TRACKING_URI=http://127.0.0.1:9" in done.stderr
        and "Traceback" not in done.stderr
    )
