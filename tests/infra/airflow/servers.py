"""A Ray head and the four parts of Airflow, started for a test and gone after it; and a wire between them to cut."""

import contextlib
import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[3]
DAGS = ROOT / "infra" / "dags"
BIN = ROOT / ".venv" / "bin"
VENV = Path(os.environ.get("LONGTAKE_AIRFLOW_VENV") or ROOT / ".venv-airflow")
TOKEN = secrets.token_hex(32)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def make_venv() -> None:
    """Airflow in an environment of its own, as the README of the DAGs installs it."""
    if not (VENV / ".installed").exists():
        subprocess.run([str(BIN / "python"), "-m", "venv", str(VENV)], check=True)
        pip = [str(VENV / "bin" / "pip"), "install", "--quiet", "-r", str(DAGS / "requirements.txt")]
        subprocess.run(pip, check=True)
        (VENV / ".installed").touch()


def until(what: str, seconds: float, true: Callable[[], Any], every: float = 1.0) -> Any:
    """The result of `true` once it is true."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if found := true():
            return found
        time.sleep(every)
    raise AssertionError(f"{what}: not within {seconds:g} s")


class Processes:
    """Processes in groups of their own, each with a log; all killed at the end."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.running: dict[str, subprocess.Popen[bytes]] = {}

    def start(self, name: str, command: list[str], env: dict[str, str]) -> None:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.running[name] = subprocess.Popen(
                command,
                env=env,
                cwd=self.folder,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )

    def kill(self, name: str) -> None:
        child = self.running.pop(name)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()

    def check(self) -> None:
        for name, child in self.running.items():
            assert child.poll() is None, f"{name} ended:\n{(self.folder / f'{name}.log').read_text()[-3000:]}"


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Processes]:
    them = Processes(folder)
    try:
        yield them
    finally:
        for name in [*them.running]:
            them.kill(name)


def clean_env(**more: str) -> dict[str, str]:
    """The environment of a fresh shell, without variables for Ray, MLflow and Airflow."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_", "AIRFLOW", "LONGTAKE_"))}
    return kept | {"NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"} | more


@contextlib.contextmanager
def ray_head(them: Processes) -> Iterator[str]:
    """The address of a head with two CPUs that asks for TOKEN; its jobs find `longtake`."""
    # its sockets need a short path
    scratch = tempfile.mkdtemp(prefix="ray-")
    port = free_port()
    auth = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN}
    path = f"{BIN}:{os.environ['PATH']}"
    env = clean_env(**auth, PATH=path, OMP_NUM_THREADS="1", RAY_USAGE_STATS_ENABLED="0")
    command = [str(BIN / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={free_port()}"]
    command += [f"--dashboard-port={port}", "--include-dashboard=true", f"--temp-dir={scratch}"]
    # its own: jobs go by an agent whose usual port another Ray of this machine may have
    command += ["--object-store-memory=200000000", f"--dashboard-agent-listen-port={free_port()}"]
    them.start("ray", command, env)
    address = f"http://127.0.0.1:{port}"

    def answers() -> bool:
        them.check()
        try:
            headers = {"Authorization": f"Bearer {TOKEN}"}
            with urllib.request.urlopen(
                urllib.request.Request(f"{address}/api/jobs/", headers=headers), timeout=5
            ) as a:
                return bool(a.status == 200)
        except OSError:
            return False

    try:
        until("Ray's dashboard", 90, answers)
        yield address
    finally:
        them.kill("ray")
        remove(Path(scratch))


class Wire:
    """A proxy in front of Ray: `cut` it, and connections drop. It notes the jobs that were posted."""

    def __init__(self, target: str) -> None:
        self.cut = False
        self.posted: list[str] = []
        host, wire = target.removeprefix("http://"), self

        class Handler(BaseHTTPRequestHandler):
            def pass_on(self) -> None:
                if wire.cut:
                    self.connection.close()
                    return
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                there = http.client.HTTPConnection(host, timeout=60)
                there.request(self.command, self.path, body, dict(self.headers))
                answer = there.getresponse()
                content = answer.read()
                if self.command == "POST" and self.path == "/api/jobs/" and answer.status == 200:
                    wire.posted.append(json.loads(content)["submission_id"])
                self.send_response(answer.status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            do_GET = do_POST = pass_on

            def log_message(self, *_: Any) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()


class Airflow:
    """Airflow on sqlite, its parts in processes of their own, and its REST API."""

    def __init__(self, them: Processes, home: Path, graphs: Path, ray: str) -> None:
        self.them = them
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.ray = ray
        self.token = ""
        settings = {
            "CORE__DAGS_FOLDER": DAGS, "CORE__LOAD_EXAMPLES": False, "CORE__PARALLELISM": 4,
            "CORE__EXECUTION_API_SERVER_URL": f"{self.url}/execution/",
            "CORE__SIMPLE_AUTH_MANAGER_ALL_ADMINS": True,
            "API__HOST": "127.0.0.1", "API__PORT": port,
            "API__BASE_URL": self.url, "API_AUTH__JWT_SECRET": secrets.token_hex(32),
            "DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": 5, "DAG_PROCESSOR__REFRESH_INTERVAL": 5,
            "TRIGGERER__JOB_HEARTBEAT_SEC": 2, "TRIGGERER__TRIGGERER_HEALTH_CHECK_THRESHOLD": 10,
        }  # fmt: skip
        self.env = clean_env(
            AIRFLOW_HOME=str(home),
            PYTHONPATH=str(DAGS),
            PYTHONDONTWRITEBYTECODE="1",
            PATH=f"{VENV / 'bin'}:{os.environ['PATH']}",
            LONGTAKE_GRAPHS=str(graphs),
            LONGTAKE_RAY_PATIENCE_SECONDS="3",
            **{f"AIRFLOW__{key}": str(value) for key, value in settings.items()},
        )

    def start(self) -> None:
        migrate = [str(VENV / "bin" / "airflow"), "db", "migrate"]
        done = subprocess.run(migrate, env=self.env, capture_output=True, text=True, timeout=180)
        assert done.returncode == 0, done.stdout + done.stderr
        for part in ("api-server", "dag-processor", "scheduler", "triggerer"):
            self.part(part)
        until("Airflow's API", 120, self.log_in)
        host, port = self.ray.removeprefix("http://").split(":")
        connection = {"connection_id": "longtake_ray", "conn_type": "http", "host": host, "port": int(port)}
        self.call("POST", "/api/v2/connections", connection | {"password": TOKEN})

    def part(self, name: str) -> None:
        command = [str(VENV / "bin" / "airflow"), name]
        self.them.start(name, command + (["--skip-serve-logs"] if name == "triggerer" else []), self.env)

    def log_in(self) -> bool:
        self.them.check()
        try:
            self.token = self.call("GET", "/auth/token")["access_token"]
        except OSError:
            return False
        return True

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {self.token}"} if self.token else {}
        )
        data = json.dumps(body).encode() if body is not None else None
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return json.loads(answer.read() or "null")
        except urllib.error.HTTPError as e:
            if e.code == 404:
                return None
            raise AssertionError(f"{method} {path}: {e.code} {e.read()[:500]!r}") from e

    def api(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        return self.call(method, f"/api/v2/dags{path}", body)

    def trigger(self, dag: str, run: str) -> None:
        self.api("POST", f"/{dag}/dagRuns", {"dag_run_id": run, "logical_date": None})

    def run(self, dag: str, run: str) -> dict[str, Any]:
        return self.api("GET", f"/{dag}/dagRuns/{run}") or {}

    def task(self, dag: str, run: str, task: str) -> dict[str, Any]:
        return self.api("GET", f"/{dag}/dagRuns/{run}/taskInstances/{task}") or {}

    def states(self, dag: str, run: str) -> dict[str, str]:
        found = self.api("GET", f"/{dag}/dagRuns/{run}/taskInstances")["task_instances"]
        return {t["task_id"]: t["state"] for t in found}

    def ended(self, dag: str, run: str, seconds: float) -> dict[str, Any]:
        """The run, once it has ended."""

        def over() -> Any:
            self.them.check()
            found = self.run(dag, run)
            return found if found.get("state") in ("success", "failed") else None

        return until(f"{dag} {run}", seconds, over)

    def log(self, task: str) -> str:
        """All that was logged of a task's tries, in all its runs."""
        logs = Path(self.env["AIRFLOW_HOME"]) / "logs"
        found = sorted(p for p in logs.rglob("*.log*") if f"task_id={task}" in str(p))
        return "\n".join(p.read_text(errors="replace") for p in found)


def remove(folder: Path) -> None:
    """Ray's agents write for a moment after they have lost their head."""
    for _ in range(5):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(1)
        if not folder.exists():
            return
