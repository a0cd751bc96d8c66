"""Starting a training stage's processes: in this process, by torchrun, by Ray, or where a launcher has started us.

Each process calls the stage's `work(config, inputs, folder)` inside a process group; the result is in the checkpoint
folder. A crash, a Failure or a killed process is started again, at most `max_failures` times, from the last checkpoint; a
UserError is not. The first error of an attempt is the one that is said; what others meet because of it is not. This is the
only file of `longtake.training` that knows Ray.
"""

import atexit
import collections
import contextlib
import json
import logging
import os
import secrets
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

from longtake.datasets import environment
from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.training.config import LaunchConfig, TrainConfig
from longtake.training.launch import preflight, torchrun
from longtake.training.launch.processes import (
    CUT_SHORT,
    GO_ON,
    SPINNING,
    Error,
    Job,
    again,
    error_of,
    raise_error,
    signals_passed_on,
    spin_briefly,
    stop_requested,
    stop_sources,
    work,
)

__all__ = ["Said", "launched", "run", "share", "stop_requested", "together"]

T = TypeVar("T")
_ENVIRONMENT = ("MLFLOW_RUN_ID", "MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "LONGTAKE_RECIPE")
_SHARED, _ERROR, _SAID = "longtake/shared", "longtake/error", "longtake/said"
_DAY = 86400.0

_end_group: Callable[[], None] | None = None  # of the ranks that a launcher has started


def launched() -> bool:
    """Whether torchrun, the deepspeed launcher or the like has started this process beside others."""
    return environment.ranks()[1] > 1


def run(module: str, config: TrainConfig, inputs: Mapping[str, str], folder: Path) -> bool:
    """Do the stage's work in as many processes as `config.launcher` says; returns when all have ended well.

    Args:
        module: name of the stage's module, which has `Config` and `work`.
        folder: of checkpoints; on a disk that all processes share.

    Returns:
        Whether this is the process that goes on with the result: beside rank 0 of those that a launcher has started,
        the others have nothing more to do.

    Raises:
        UserError, Failure, Interrupted: as `work` raised it in some process.
    """
    job = Job(module, config.model_dump(mode="json"), dict(inputs), str(folder.absolute()))
    if os.environ.get("RANK", "0") == "0":
        preflight.check(config)
    if launched():
        if config.launcher.by != "process":
            raise UserError(
                f"launcher: by {config.launcher.by}, but a launcher has started {os.environ['WORLD_SIZE']} of this"
                " process already; leave launcher out, or start the stage by `longtake` alone"
            )
        work(job)
        if _end_group:
            # all ranks at once, since the end of a group is a collective of some backends
            _end_group()
        return os.environ["RANK"] == "0"
    {"process": _here, "torchrun": torchrun.run, "ray": _ray}[config.launcher.by](job, config)
    return True


def _here(job: Job, _: TrainConfig) -> None:
    work(job)


# Ranks that a launcher has started.


class Said(Failure):
    """Another process of the job says what went wrong; this one ends with the same exit code."""

    def __init__(self, error: Error) -> None:
        super().__init__(error.message)
        self.code = 2 if error.kind == "UserError" else 1


@contextlib.contextmanager
def together() -> Iterator[int]:
    """The rank of this process among those that a launcher has started; 0 where there is none. May be nested.

    Raises:
        Said, Interrupted: in place of this rank's own error, where another rank has met one first.
    """
    global _end_group
    if not launched():
        yield 0
        return
    from longtake.training import engines

    with contextlib.ExitStack() as group:
        # the loop's watchdog has the patience that the stage's config asks for
        rank, _ = group.enter_context(engines.process_group(_DAY))
        outer, _end_group = _end_group, _end_group or group.close
        store = engines.store()
        try:
            yield rank
        except BaseException as e:
            first = _claim(store, rank, error_of(e))
            if first is None:
                raise
            _wait_until_said(store)
            raise Interrupted if first.kind == "Interrupted" else Said(first) from e
        finally:
            _end_group = outer


def _claim(store: Any, rank: int, error: Error) -> Error | None:
    """The error that another rank has met before this one, if any."""
    try:
        number, *first = json.loads(store.compare_set(_ERROR, "", json.dumps([rank, *error])))
    except (RuntimeError, ValueError):
        # rank 0 keeps the store, and has gone with it
        return None if rank == 0 else Error("Failure", "rank 0 has ended")
    if number != rank:
        return Error(*first)
    atexit.register(_said, store)
    return None


def _said(store: Any) -> None:
    with contextlib.suppress(RuntimeError):
        store.set(_SAID, "yes")


def _wait_until_said(store: Any) -> None:
    """A launcher kills all as soon as one has ended: let the one that knows what went wrong say it before."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(RuntimeError):
        store.wait([_SAID], timedelta(seconds=10))


def share(make: Callable[[], T]) -> T:
    """What `make` returns on rank 0, plain data, on every rank; it is called on rank 0 alone. Inside `together`.

    Raises:
        Said: on the other ranks, where `make` has raised.
    """
    if not launched():
        return make()
    from longtake.training import engines

    store = engines.store()
    if os.environ["RANK"] != "0":
        while not store.check([_SHARED]):
            # waiting in the store itself would be deaf to signals
            time.sleep(0.05)
        value = json.loads(store.get(_SHARED))
        if value is None:
            raise Said(Error("Failure", "rank 0 has failed"))
        return value[0]
    try:
        made = make()
    except BaseException as e:
        _claim(store, 0, error_of(e))
        store.set(_SHARED, "null")
        raise
    store.set(_SHARED, json.dumps([made]))
    return made


# Ray


class _Post:
    """An actor: what the starting process and the training processes of a Ray job tell each other."""

    def __init__(self) -> None:
        self.stop = False
        self.error: Error | None = None
        self.attempts: collections.Counter[int] = collections.Counter()
        self.text: list[str] = []

    def begin(self, rank: int) -> bool:
        """Whether a process is to work: not where the job has met a final error, or was to stop when it died."""
        self.attempts[rank] += 1
        if self.error and self.error.final:
            return False
        if self.attempts[rank] > 1 and self.stop:
            self.error = CUT_SHORT
            return False
        if self.attempts[rank] > 1 and rank == 0:
            self.text.append(again(self.error))
            self.error = None
        return True

    def note(self, error: Error) -> None:
        if self.error is None:
            self.error = error

    def tell(self, text: str) -> bool:
        """Take what a process prints; says whether it is to stop."""
        self.text.append(text)
        return self.stop

    def ask_to_stop(self) -> None:
        self.stop = True

    def take(self) -> str:
        text, self.text = "".join(self.text), []
        return text

    def outcome(self) -> Error | None:
        return self.error


def _ray(job: Job, config: TrainConfig) -> None:
    """Ray Train in the cluster that RAY_ADDRESS names, else in one of our own for as long as it takes."""
    how = config.launcher
    spin_briefly()
    with _cluster(how) as ray:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        near = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
        post = ray.remote(num_cpus=0)(_Post).options(scheduling_strategy=near).remote()
        storage, name = Path(job.folder) / "ray", secrets.token_hex(8)
        (storage / name).mkdir(parents=True)
        trainer = TorchTrainer(
            _ray_process,
            train_loop_config={
                "job": job,
                "post": post,
                "environment": {key: os.environ[key] for key in _ENVIRONMENT if key in os.environ},
                "cwd": str(Path.cwd()),
                "shared": str(storage / name),
            },
            torch_config=TorchConfig(
                backend="nccl" if how.gpus else "gloo", timeout_s=int(1.5 * config.stall_seconds + 30)
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
        ended: list[BaseException] = []

        def fit() -> None:
            try:
                trainer.fit()
            except BaseException as e:
                ended.append(e)

        # in a thread, since in the main one it takes SIGINT for itself, and aborts
        thread, stop = threading.Thread(target=fit, daemon=True), threading.Event()
        try:
            with signals_passed_on(stop.set, config):
                thread.start()
                while thread.is_alive():
                    thread.join(0.5)
                    if stop.is_set():
                        post.ask_to_stop.remote()
                    sys.stderr.write(ray.get(post.take.remote()))
                    sys.stderr.flush()
            error = ray.get(post.outcome.remote())
        except ray.exceptions.RayError as e:
            raise Failure(f"training: Ray failed ({str(e).splitlines()[0]}); {GO_ON}") from e
        finally:
            shutil.rmtree(storage, ignore_errors=True)
        failure = ended[0] if ended else None
        if failure or (error and error.final):
            raise_error(error, _dead(ray, failure))
        if failure:
            raise Failure(f"training: Ray failed ({str(failure).splitlines()[0]}); {GO_ON}") from failure


def _dead(ray: Any, failure: BaseException | None) -> dict[int, str]:
    """The processes that died without a word."""
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
        _check(how, [node["Resources"] for node in ray.nodes() if node["Alive"]])
        yield ray


def _check(how: LaunchConfig, nodes: list[dict[str, float]]) -> None:
    """Ray waits for ever for room; say so at once. The spare CPU is for what reads data and for Ray itself."""
    wanted = {"CPU": how.cpus, "GPU": how.gpus}
    room = sum(min(int(node.get(k, 0) / each + 1e-6) for k, each in wanted.items() if each) for node in nodes)
    cpus, gpus = (sum(node.get(name, 0) for node in nodes) for name in wanted)
    if room < how.processes or cpus < how.processes * how.cpus + 1:
        each = f"{how.cpus:g} CPU" + (f" and {how.gpus:g} GPU" if how.gpus else "")
        raise UserError(
            f"launcher: {how.processes} processes of {each} and one spare CPU do not fit into the Ray cluster, which has"
            f" {cpus:g} CPU and {gpus:g} GPU on {len(nodes)} nodes; lower launcher.processes or launcher.cpus, or add nodes"
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


def _ray_process(given: dict[str, Any]) -> None:
    """One process of `_ray`, in a thread of Ray's worker: signals do not come here, so it asks the starting process.

    A node that is to go (a spot instance, a drained pod) is a request to stop too: Ray tells the processes of the job.
    """
    import ray

    rank, post = ray.train.get_context().get_world_rank(), given["post"]
    if not ray.get(post.begin.remote(rank)):
        return
    os.environ.update(given["environment"])
    asked, ended = threading.Event(), threading.Event()
    relay: Any = _Relay(lambda text: ray.get(post.tell.remote(text)), rank)

    def listen() -> None:
        while not ended.wait(1.0):
            relay.flush()
            if ray.get(post.tell.remote("")):
                asked.set()

    def watch_nodes() -> None:
        # a barrier of these threads on all ranks
        while not ended.wait(1.0):
            if ray.train.get_preemption_info():
                asked.set()

    try:
        if not Path(given["shared"]).is_dir():
            raise UserError(
                f"checkpoints: {given['job'].folder} is not there on node {ray.util.get_node_ip_address()};"
                " name a folder on a disk that all nodes of the Ray cluster share"
            )
        os.chdir(given["cwd"])
        stop_sources[:] = [asked.is_set]
        for task in (listen, watch_nodes):
            threading.Thread(target=task, daemon=True).start()
        with contextlib.redirect_stdout(relay), contextlib.redirect_stderr(relay):
            work(given["job"])
    except BaseException as e:
        ray.get(post.note.remote(error_of(e)))
        if not isinstance(e, Interrupted):
            raise
    finally:
        ended.set()
        relay.flush()
