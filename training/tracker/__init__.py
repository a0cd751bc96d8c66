"""A training's run in MLflow: metrics, videos, files.

Records go into a spool on disk first, and a thread sends them: tracking that is down, slow or killed neither stops
training nor loses anything. Another thread encodes videos.
"""

import contextlib
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from longtake.datasets.errors import Failure, UserError
from longtake.training.registry.store import failing_clearly, line
from longtake.training.tracker.spool import Place, Spool
from longtake.training.tracker.videos import Videos

_EVERY = 5.0  # seconds between batches, and between attempts while tracking is down
_PATIENCE = 60.0  # seconds without any progress after which `close` gives up
_BATCH = 1000  # metrics; MLflow takes no more at once
_NAME = re.compile(r"\w[\w.-]*")


class Tracker:
    """A stage's MLflow run; on rank 0 only, best in a `with`. See `connect`."""

    def __init__(self, run_id: str, spool: Spool, system_metrics: bool) -> None:
        self.run_id, self.spool = run_id, spool
        self._step: int | None = None
        self._trouble = ""
        self._refused: set[str] = set()
        self._stop_sampling, self._closing = threading.Event(), threading.Event()
        self._videos = Videos(spool.folder, self._queue)
        self._sender = threading.Thread(target=self._keep_sending, name="tracker", daemon=True)
        self._sampler = threading.Thread(target=self._keep_sampling, name="system metrics", daemon=True)
        self._sender.start()
        if system_metrics:
            self._sampler.start()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Metrics of a step. Returns at once; infinities arrive as NaN, since MLflow would keep 1.8e308 for them."""
        self._step = step
        self._append(step, metrics)

    def video(self, step: int, name: str, frames: np.ndarray, fps: int) -> None:
        """A video as artifact `samples/step-00001000/NAME.mp4`: encoded by one thread, sent by another.

        Args:
            name: letters, digits, `_`, `-` and dots.
            frames: (T, H, W, 3) uint8, H and W even.
        """
        if not _NAME.fullmatch(name):
            raise ValueError(f"video {name!r}: its name may have letters, digits, '_', '-' and dots")
        shape = frames.shape
        if (
            frames.dtype != np.uint8
            or frames.ndim != 4
            or shape[3] != 3
            or not shape[0]
            or any(n % 2 for n in shape[1:3])
        ):
            raise ValueError(f"video {name}: need uint8 (T, H, W, 3) with even H and W, got {frames.dtype} {shape}")
        place = Path("samples") / f"step-{step:08d}" / f"{name}.mp4"
        with self._on_disk(place):
            self._videos.add(place, frames, fps)

    def text(self, step: int, name: str, text: str) -> None:
        """A text as artifact `samples/step-00001000/NAME.txt`, beside the videos of the step."""
        place = Path("samples") / f"step-{step:08d}" / f"{name}.txt"
        self._queue(place, lambda scratch: scratch.write_text(f"{text}\n", encoding="utf-8"))

    def later(self, path: Path, name: str) -> None:
        """`artifacts` for the middle of training: copied here, sent by the thread."""
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            place = Path(name) / file.relative_to(path if path.is_dir() else path.parent)
            self._queue(place, partial(shutil.copyfile, file))

    def artifacts(self, path: Path, name: str) -> None:
        """Send a file or the files of a folder, as artifacts in the folder `name` of the run, before it returns.

        Raises:
            Failure: that was not possible.
        """
        with failing_clearly(f"MLflow: {name}"):
            send = self._client.log_artifacts if path.is_dir() else self._client.log_artifact
            send(self.run_id, str(path), name)

    def close(self) -> None:
        """Send the rest and end the threads. Raises Failure where something could not be sent; it stays in the spool."""
        self._videos.finish()
        self._stop(_PATIENCE)
        steps, files = self.spool.left(), len(self.spool.files())
        if steps or files:
            what = " and ".join([f"{steps} steps' metrics"] * bool(steps) + [f"{files} files"] * bool(files))
            why = self._trouble or self.spool.trouble or f"no answer for {_PATIENCE:.0f} s"
            raise Failure(
                f"MLflow: {what} could not be sent ({why}); they are kept in {self.spool.folder}: run the same command again"
            )
        self.spool.remove()

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        """`close`; after an error, send for some seconds only, and the next process encodes and sends the rest."""
        if not error:
            self.close()
            return
        self._videos.leave(_EVERY)
        self._stop(_EVERY)

    def _stop(self, patience: float) -> None:
        """End the threads after a last attempt to send, which continues as long as it makes progress."""
        self._stop_sampling.set()
        if self._sampler.is_alive():
            self._sampler.join(_EVERY)
        self._closing.set()
        while self._sender.is_alive():
            before = self.spool.place, len(self.spool.files())
            self._sender.join(patience)
            if before == (self.spool.place, len(self.spool.files())):
                break

    def _queue(self, place: Path, write: Callable[[Path], Any]) -> None:
        """Let `write` make a file that becomes the artifact `place`."""
        # not one for all: threads queue at the same time
        scratch = self.spool.folder / f"queued-{threading.get_ident()}{place.suffix}"
        with self._on_disk(place):
            path = self.spool.files_folder / place
            path.parent.mkdir(parents=True, exist_ok=True)
            write(scratch)
            scratch.replace(path)

    @contextlib.contextmanager
    def _on_disk(self, place: Path) -> Iterator[None]:
        """Say that the artifact `place` is left out where the disk does not take what the block writes."""
        try:
            yield
        except OSError as e:
            print(f"tracking: {self.spool.files_folder / place}: {e.strerror or e}; it is left out", flush=True)

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient()

    def _append(self, step: int, metrics: Mapping[str, float]) -> None:
        values = {name: float(value) for name, value in metrics.items()}
        self.spool.append([step, int(time.time() * 1000), values])

    def _keep_sending(self) -> None:
        while not self._closing.wait(_EVERY):
            self._send()
        self._send()

    def _send(self) -> None:
        """Send all waiting records and files, or note why that is not possible."""
        try:
            for place, batch in self._batches():
                self._post(batch)
                self.spool.sent(place)
            for path, name in self.spool.files():
                self._client.log_artifact(self.run_id, str(path), str(name.parent))
                path.unlink()
        except Exception as e:
            # stores raise errors of many kinds; none may end this thread
            if not self._trouble:
                print(f"tracking: {line(e)}; what is logged is kept in {self.spool.folder} and sent later", flush=True)
            self._trouble = line(e)
        else:
            if self._trouble:
                print("tracking: works again", flush=True)
            self._trouble = ""

    def _batches(self) -> Iterator[tuple[Place, list[Any]]]:
        """The waiting metrics, in batches of at most _BATCH unless a single step has more."""
        from mlflow.entities import Metric

        batch: list[Any] = []
        end = self.spool.place
        for place, (step, when, values) in self.spool.waiting():
            if batch and len(batch) + len(values) > _BATCH:
                yield end, batch
                batch = []
            batch += [Metric(k, v if math.isfinite(v) else math.nan, when, step) for k, v in values.items()]
            end = place
        if batch:
            yield end, batch

    def _post(self, metrics: list[Any]) -> None:
        from mlflow.exceptions import MlflowException

        try:
            for start in range(0, len(metrics), _BATCH):
                self._client.log_batch(self.run_id, metrics=metrics[start : start + _BATCH], synchronous=True)
        except MlflowException as e:
            # of a run that was deleted every metric is refused, until it is restored
            if e.error_code != "INVALID_PARAMETER_VALUE" or self._is_deleted():
                raise
            if len(metrics) > 1:
                # a metric that MLflow never takes must not hold up the others
                for metric in metrics:
                    self._post([metric])
            elif (name := metrics[0].key) not in self._refused:
                self._refused.add(name)
                print(f"tracking: metric {name!r} is refused ({line(e)}) and left out", flush=True)

    def _is_deleted(self) -> bool:
        return bool(self._client.get_run(self.run_id).info.lifecycle_stage == "deleted")

    def _keep_sampling(self) -> None:
        """System metrics under MLflow's names, by its own readers, at the last logged step.

        Its own sender would stop for good when tracking is down once, and ask for the whole run at each reading.
        """
        try:
            from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL

            monitors = _monitors()
            seconds = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or 10
            for monitor in monitors:
                # rates count from the last reading: the first means nothing
                monitor.collect_metrics()
            stop = False
            while not stop:
                stop = self._stop_sampling.wait(seconds)
                for monitor in monitors:
                    monitor.clear_metrics()
                    monitor.collect_metrics()
                values = {f"system/{k}": v for m in monitors for k, v in m.aggregate_metrics().items()}
                if self._step is not None:
                    self._append(self._step, values)
        except Exception as e:
            # drivers fail in many ways; none may end the training
            print(f"tracking: no system metrics ({line(e)})", flush=True)


def connect(folder: Path, system_metrics: bool = True) -> Tracker:
    """The run that MLFLOW_RUN_ID names, as `longtake stage` sets it.

    Records that an earlier process of this run left in the spool are sent too. No other process may use `folder`.

    Args:
        folder: local, outlives the process, such as the stage's checkpoints; the spool is `tracking/RUN` in it.
        system_metrics: log use of CPU, memory, disk, network and GPU, every 10 seconds or as
            MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL says.

    Raises:
        UserError: MLFLOW_RUN_ID is not set.
    """
    run_id = os.environ.get("MLFLOW_RUN_ID", "")
    if not _NAME.fullmatch(run_id):
        raise UserError("MLFLOW_RUN_ID: is not set; start training by `longtake run` or `longtake stage`")
    return Tracker(run_id, Spool(folder / "tracking" / run_id), system_metrics)


def _monitors() -> list[Any]:
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor
    from mlflow.system_metrics.metrics.rocm_monitor import ROCMMonitor

    monitors = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    for kind in (GPUMonitor, ROCMMonitor):
        # they do not start without such a GPU
        with contextlib.suppress(Exception):
            monitors.append(kind())
    return monitors
