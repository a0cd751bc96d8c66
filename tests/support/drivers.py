"""Drivers of `shard` stages in processes of their own, with a Ray of their own or on a cluster that can lose a node."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from longtake.pipeline.stages import shard

_SCRIPT = """
import atexit, os, sys
from longtake.pipeline.stages import shard
if __name__ == "__main__":
    if cpus := os.environ.get("TEST_CPUS"):
        import ray
        ray.init(num_cpus=int(cpus), include_dashboard=False, log_to_driver=False, object_store_memory=100 << 20)
    shard.run(shard.Config.model_validate_json(sys.argv[1]), {}, sys.argv[2])
    # as the command ends: a thread of Ray's that waits for an interpreter which is unloaded aborts the process
    atexit._run_exitfuncs()
    os._exit(0)
"""

# a head without CPUs and two nodes with one each; ends when its standard input does
_CLUSTER = """
import json, sys
import ray
from ray.cluster_utils import Cluster
small = {"object_store_memory": 100 << 20, "include_dashboard": False}
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, **small})
nodes = [cluster.add_node(num_cpus=1, **small) for _ in range(2)]
raylets = [node.all_processes["raylet"][0].process.pid for node in nodes]
print(json.dumps({"address": cluster.address, "raylets": raylets}), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@dataclass
class Cluster:
    """A cluster of two nodes: the environment of its drivers, and the processes of its nodes."""

    environment: dict[str, str]
    raylets: list[int]

    def lose_node(self) -> None:
        """Kill the node at work with all that runs on it, at once."""
        raylet = max((psutil.Process(pid) for pid in self.raylets), key=lambda p: len(p.children(recursive=True)))
        node = [raylet, *raylet.children(recursive=True)]
        assert any("ray::" in " ".join(p.cmdline()) for p in node)
        for process in node:
            process.send_signal(signal.SIGKILL)


class Drivers:
    """Starts drivers, each with a Ray of its own unless told otherwise; all that they start bears one mark."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch
        self._mark = secrets.token_hex(8)
        # for a Ray that is not the driver's own: that one makes itself a token
        self.token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}

    def environment(self, **more: str) -> dict[str, str]:
        """That of the tests, without their Ray, and with a temporary folder that goes away with the test."""
        scratch = {"TMPDIR": str(self.scratch), "RAY_TMPDIR": str(self.scratch), "TEST_MARK": self._mark}
        plain = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        return plain | {"RAY_USAGE_STATS_ENABLED": "0"} | scratch | more

    def start(self, config: shard.Config, output: object, **environment: str) -> subprocess.Popen[bytes]:
        return self.script(_SCRIPT, config.model_dump_json(), str(output), **environment)

    def script(
        self, script: str, *arguments: str, stdin: int | None = None, stdout: int = subprocess.DEVNULL, **more: str
    ) -> subprocess.Popen[bytes]:
        with (self.scratch / "stderr").open("ab") as stderr:
            return subprocess.Popen(
                [sys.executable, "-P", "-c", script, *arguments],
                env=self.environment(**more),
                cwd=self.scratch,
                start_new_session=True,
                stdin=stdin,
                stdout=stdout,
                stderr=stderr,
            )

    def finish(self, *drivers: subprocess.Popen[bytes]) -> None:
        """Wait for drivers that nobody kills: all of them must end well."""
        codes = [driver.wait(timeout=300) for driver in drivers]
        if any(codes):
            said = (self.scratch / "stderr").read_text(errors="replace").replace("\r", "\n").splitlines()
            pytest.fail("\n".join([f"exit codes {codes}", *[line for line in said if "source/s" not in line][-80:]]))

    def run(self, config: shard.Config, output: object, **environment: str) -> None:
        self.finish(self.start(config, output, **environment))

    def kill(self, driver: subprocess.Popen[bytes]) -> None:
        """The driver and all that shares its process group: Ray, its workers, the decoders."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()

    @contextlib.contextmanager
    def cluster(self, **more: str) -> Iterator["Cluster"]:
        """A cluster of two nodes for the block, on which drivers with its `environment` work."""
        # a lost node is noticed soon
        checks = {"period_ms": "500", "timeout_ms": "1000", "failure_threshold": "3", "initial_delay_ms": "1000"}
        quick = self.token | {f"RAY_health_check_{name}": value for name, value in checks.items()}
        process = self.script(_CLUSTER, stdin=subprocess.PIPE, stdout=subprocess.PIPE, **quick, **more)
        assert process.stdin and process.stdout
        try:
            said = json.loads(process.stdout.readline())
            yield Cluster(quick | more | {"RAY_ADDRESS": said["address"]}, said["raylets"])
        finally:
            process.stdin.close()
            try:
                process.wait(timeout=60)
            except subprocess.TimeoutExpired:
                self.kill(process)

    def alive(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                if process.environ().get("TEST_MARK") == self._mark and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def close(self) -> list[str]:
        """Kill what still runs; returns the command lines of what did not go by itself."""
        deadline = time.time() + 60
        while (left := self.alive()) and time.time() < deadline:
            time.sleep(0.5)
        lines = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()))
                process.kill()
        psutil.wait_procs(left, timeout=30)
        return lines
