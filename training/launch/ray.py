"""A training stage's processes in a Ray cluster, by Ray Train. The only file of `longtake.training` that knows Ray."""

import collections
import contextlib
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from longtake.datasets import environment
from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.training.config import LaunchConfig, TrainConfig
from longtake.training.launch.processes import (
    RUN_AGAIN,
    SPINNING,
    STOPPED_UNSAVED,
    Error,
    Job,
    error_of,
    raise_error,
    restart_line,
    signals_passed_on,
    spin_briefly,
    stop_sources,
    work,
)

_ENVIRONMENT = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "LONGTAKE_RECIPE")


class _Messages:
    """An actor between the starting process and the training processes of a Ray job: output, errors, requests to stop."""

    def __init__(self) -> None:
        self.stop = False
        self.error: Error | None = None
        self.attempts: collections.Counter[int] = collections.Counter()
        self.text: list[str] = []

    def begin(self, rank: int) -> bool:
        """Whether a process is to work: not after a final error, nor where it died when it was to stop."""
        self.attempts[rank] += 1
        if self.error and self.error.final:
            return False
        if self.attempts[rank] > 1 and self.stop:
            self.error = STOPPED_UNSAVED
            return False
        if self.attempts[rank] > 1 and rank == 0:
            self.text.append(restart_line(self.error))
            self.error = None
        return True

    def note(self, error: Error) -> None:
        if self.error is None:
            self.error = error

    def print(self, text: str) -> bool:
        """Take a process's output; returns whether the process is to stop."""
        self.text.append(text)
        return self.stop

    def ask_to_stop(self) -> None:
        self.stop = True

    def take_text(self) -> str:
        text, self.text = "".join(self.text), []
        return text

    def outcome(self) -> Error | None:
        return self.error


def run(job: Job, config: TrainConfig) -> None:
    """Ray Train in the cluster that RAY_ADDRESS names, else in one of our own for as long as it takes."""
    how = config.run.launcher
    spin_briefly()
    with _cluster(how) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        near = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        messages = ray.remote(num_cpus=0)(_Messages).options(scheduling_strategy=near).remote()
        storage, name = Path(job.folder) / "ray", secrets.token_hex(8)
        (storage / name).mkdir(parents=True)
        trainer = TorchTrainer(
            _ray_process,
            train_loop_config={
                "job": job,
                "messages": messages,
                "environment": {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
                "cwd": str(Path.cwd()),
                "shared": str(storage / name),
            },
            torch_config=TorchConfig(
                backend="nccl" if how.gpus else "gloo", timeout_s=int(1.5 * config.run.stall_seconds + 30)
            ),
            scaling_config=ScalingConfig(
                num_workers=how.processes,
                use_gpu=how.gpus > 0,
                resources_per_worker={"CPU": how.cpus} | ({"GPU": how.gpus} if how.gpus else {}),
            ),
            run_config=RunConfig(
                name=name,
                storage_path=str(storage),
                failure_config=FailureConfig(max_failures=how.max_failures),
                # read as torch is loaded, so it must be there when the workers start
                worker_runtime_env={"env_vars": {name: os.environ[name] for name in SPINNING if name in os.environ}},
            ),
        )
        failures: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as e:
                failures.append(e)

        # in a thread, since in the main one it takes SIGINT for itself, and aborts
        thread, stop = threading.Thread(target=fit, daemon=True), threading.Event()
        try:
            with signals_passed_on(stop.set, config):
                thread.start()
                while thread.is_alive():
                    thread.join(0.5)
                    if stop.is_set():
                        messages.ask_to_stop.remote()
                    sys.stderr.write(ray.get(messages.take_text.remote()))
                    sys.stderr.flush()
            error = ray.get(messages.outcome.remote())
        except ray.exceptions.RayError as e:
            raise Failure(f"training: Ray failed ({str(e).splitlines()[0]}); {RUN_AGAIN}") from e
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        failure = failures[0] if failures else None
        if failure or (error and error.final):
            raise_error(error, _dead(ray, failure))
        if failure:
            raise Failure(f"training: Ray failed ({str(failure).splitlines()[0]}); {RUN_AGAIN}") from failure


def _dead(ray: Any, failure: BaseException | None) -> dict[int, str]:
    """How processes died that reported no error, by rank."""
    failed = getattr(failure, "worker_failures", {})
    how = "died, perhaps for want of memory (lower `batch` or `workers`)"
    return {rank: how for rank, e in failed.items() if isinstance(e, ray.exceptions.RayActorError)}


@contextlib.contextmanager
def _cluster(how: LaunchConfig) -> Iterator[Any]:
    """The `ray` module, connected. Raises UserError where the processes and one spare CPU do not fit in."""
    address = environment.ray_address()
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address == "local" and "RAY_AUTH_MODE" not in os.environ:
        # else Ray writes a token of its own into the home folder
        os.environ |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    import ray

    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            ending = signal.getsignal(signal.SIGTERM)
            # Ray puts the working folder on its workers' sys.path, where our `datasets` would hide the package of that name;
            # and it is where they work
            empty = stack.enter_context(tempfile.TemporaryDirectory())
            stack.callback(ray.shutdown)
            local = {"include_dashboard": False} if address == "local" else {}
            try:
                with contextlib.chdir(empty):
                    ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
            except (ConnectionError, OSError) as e:
                raise UserError(f"RAY_ADDRESS={address}: no Ray cluster answers ({str(e).splitlines()[0]})") from e
            if threading.current_thread() is threading.main_thread():
                # Ray's own handler exits with code 15
                signal.signal(signal.SIGTERM, ending)
        logging.getLogger("ray.train").setLevel(logging.ERROR)
        check_room(how, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield ray


def check_room(how: LaunchConfig, nodes: list[dict[str, float]]) -> None:
    """Raise UserError where the processes do not fit in, since Ray would wait for ever.

    The spare CPU is for what reads data and for Ray itself.
    """
    needs = {"CPU": how.cpus, "GPU": how.gpus}
    room = sum(min(int(node.get(k, 0) / each + 1e-6) for k, each in needs.items() if each) for node in nodes)
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in needs)
    if room < how.processes or cpus < how.processes * how.cpus + 1:
        each = f"{how.cpus:g} CPU" + (f" and {how.gpus:g} GPU" if how.gpus else "")
        raise UserError(
            f"run.launcher: {how.processes} processes of {each} and one spare CPU do not fit into the Ray cluster, which has"
            f" {cpus:g} CPU and {gpus:g} GPU on {len(nodes)} nodes; lower its processes or cpus, or add nodes"
        )


class _Relay:
    """A text stream that sends what is written, at the latest when it is flushed; beside rank 0 only errors."""

    def __init__(self, send: Callable[[str], Any], rank: int) -> None:
        self._send, self._rank = send, rank
        self._text: collections.deque[str] = collections.deque()

    def write(self, text: str) -> int:
        self._text.append(text)
        return len(text)

    def flush(self) -> None:
        text = "".join(self._text.popleft() for _ in range(len(self._text)))
        if self._rank:
            text = "".join(line for line in text.splitlines(keepends=True) if line.startswith("error: "))
        if text:
            self._send(text)

    def isatty(self) -> bool:
        return False


def _ray_process(context: dict[str, Any]) -> None:
    """One training process, in a thread of Ray's worker. Signals do not come here, so it asks `messages` whether to stop.

    A node that will go (a spot instance, a drained pod) is a request to stop too: Ray tells the processes of the job.
    """
    import ray

    rank, messages = ray.train.get_context().get_world_rank(), context["messages"]
    if not ray.get(messages.begin.remote(rank)):
        return
    os.environ.update(context["environment"])
    stop, ended = threading.Event(), threading.Event()
    relay: Any = _Relay(lambda text: ray.get(messages.print.remote(text)), rank)

    def listen() -> None:
        while not ended.wait(1.0):
            relay.flush()
            if ray.get(messages.print.remote("")):
                stop.set()

    def watch_nodes() -> None:
        # a barrier of these threads on all ranks
        while not ended.wait(1.0):
            if ray.train.get_preemption_info():
                stop.set()

    try:
        if not Path(context["shared"]).is_dir():
            raise UserError(
                f"checkpoints: {context['job'].folder} is not there on node {ray.util.get_node_ip_address()};"
                " name a folder on a disk that all nodes of the Ray cluster share"
            )
        os.chdir(context["cwd"])
        stop_sources[:] = [stop.is_set]
        for task in (listen, watch_nodes):
            threading.Thread(target=task, daemon=True).start()
        with contextlib.redirect_stdout(relay), contextlib.redirect_stderr(relay):
            work(context["job"])
    except BaseException as e:
        ray.get(messages.note.remote(error_of(e)))
        if not isinstance(e, Interrupted):
            raise
    finally:
        ended.set()
        relay.flush()
