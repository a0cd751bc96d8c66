"""Tracking never stops training, and loses nothing."""

import errno
import math
import os
import subprocess
import sys
import threading
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from longtake.datasets import clip
from longtake.datasets.errors import Failure, UserError
from longtake.training import tracker
from longtake.training.tracker import spool, videos

KILLED = (
    "import os, sys\nfrom pathlib import Path\nimport numpy as np\nfrom longtake.training import tracker\n"
    "from mlflow import MlflowClient\ntracker._EVERY = 0.05\n{before}\n"
    "log = tracker.connect(Path(sys.argv[1]), system_metrics=False)\n"
    "for step in range(500):\n    log.log(step, {{'loss': step / 7, 'rate': 1.0}})\n"
    "log.video(499, 'one', np.zeros((3, 16, 16, 3), np.uint8), 6)\n{after}"
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """A store's URI and an experiment in it."""
    folder = tmp_path_factory.mktemp("store")
    uri = f"sqlite:///{folder}/mlflow.db"
    return uri, MlflowClient(uri).create_experiment("e", f"{folder}/artifacts")


@pytest.fixture
def run(store: tuple[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """An open run, which MLFLOW_RUN_ID names; batches go out at once."""
    uri, experiment = store
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    mlflow.set_tracking_uri(uri)
    made = MlflowClient().create_run(experiment).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", made)
    monkeypatch.setattr(tracker, "_EVERY", 0.05)
    yield made
    mlflow.set_tracking_uri(None)


@pytest.fixture
def down(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """While this is set, no metric and no file gets through."""
    event = threading.Event()
    for name in ("log_batch", "log_artifact"):
        monkeypatch.setattr(MlflowClient, name, failing_while(event, getattr(MlflowClient, name)))
    return event


def failing_while(event: threading.Event, real: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        if event.is_set():
            raise MlflowException("the server is on fire\nstack trace")
        return real(*args, **options)

    return call


def connect(tmp_path: Path, system_metrics: bool = False) -> tracker.Tracker:
    return tracker.connect(tmp_path / "checkpoints", system_metrics)


def history(run: str, name: str) -> list[tuple[int, float]]:
    return [(m.step, m.value) for m in MlflowClient().get_metric_history(run, name)]


def until(true: Callable[[], Any]) -> None:
    for _ in range(600):
        if true():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come about in 30 s")


def test_without_a_run_training_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_RUN_ID", raising=False)
    with pytest.raises(UserError, match="MLFLOW_RUN_ID: is not set"):
        connect(tmp_path)


def test_metrics_arrive_and_the_spool_goes(run: str, tmp_path: Path) -> None:
    log = connect(tmp_path)
    assert log.run_id == run
    for step in range(1200):
        log.log(step, {"loss": step / 7, "lr/body": 1e-4})
    log.close()
    assert history(run, "loss") == [(step, step / 7) for step in range(1200)]
    assert len(history(run, "lr/body")) == 1200
    assert not log.spool.folder.exists()
    log.close()


def test_what_is_not_finite_arrives_as_nan(run: str, tmp_path: Path) -> None:
    log = connect(tmp_path)
    for step, value in enumerate((math.nan, math.inf, -math.inf, 1.0)):
        log.log(step, {"loss": value})
    log.close()
    assert [math.isnan(value) for _, value in history(run, "loss")] == [True, True, True, False]


def test_a_store_that_hangs_holds_nobody_up(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers, asked, real = threading.Event(), threading.Event(), MlflowClient.log_batch

    def hanging(*args: Any, **options: Any) -> Any:
        asked.set()
        assert answers.wait(60)
        return real(*args, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", hanging)
    log = connect(tmp_path)
    log.log(0, {"loss": 0.0})
    assert asked.wait(30)
    for step in range(1, 50):
        log.log(step, {"loss": 0.0})
    monkeypatch.setattr(tracker, "_PATIENCE", 0.1)
    with pytest.raises(Failure, match=r"50 steps' metrics could not be sent \(no answer for"):
        log.close()
    monkeypatch.setattr(tracker, "_PATIENCE", 60)
    answers.set()
    log.close()
    assert len(history(run, "loss")) == 50


def test_tracking_that_is_down_is_said_once_and_its_return_once(
    run: str, tmp_path: Path, down: threading.Event, capsys: pytest.CaptureFixture[str]
) -> None:
    down.set()
    log = connect(tmp_path)
    for step in range(40):
        log.log(step, {"loss": 1.0})
        time.sleep(0.02)
    down.clear()
    until(lambda: len(history(run, "loss")) == 40)
    log.close()
    folder = tmp_path / "checkpoints" / "tracking" / run
    assert capsys.readouterr().out.splitlines() == [
        f"tracking: the server is on fire; what is logged is kept in {folder} and sent later",
        "tracking: works again",
    ]


def test_what_could_not_be_sent_is_sent_by_the_next_process(run: str, tmp_path: Path, down: threading.Event) -> None:
    down.set()
    log = connect(tmp_path)
    for step in range(5):
        log.log(step, {"loss": 1.0})
    log.video(4, "one", np.zeros((3, 16, 16, 3), np.uint8), 6)
    with pytest.raises(
        Failure, match=r"5 steps' metrics and 1 files could not be sent \(the server is on fire\); they"
    ):
        log.close()
    down.clear()
    log = connect(tmp_path)
    log.log(5, {"loss": 1.0})
    log.close()
    assert [step for step, _ in history(run, "loss")] == [0, 1, 2, 3, 4, 5]
    assert [a.path for a in MlflowClient().list_artifacts(run, "samples/step-00000004")] != []
    assert not log.spool.folder.exists()


def test_a_kill_loses_nothing_while_tracking_is_down(run: str, tmp_path: Path) -> None:
    dead = os.environ | {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0"}
    script = KILLED.format(before="", after="os.kill(os.getpid(), 9)")
    command = [sys.executable, "-P", "-c", script, str(tmp_path / "checkpoints")]
    assert subprocess.run(command, env=dead).returncode == -9
    segment = next((tmp_path / "checkpoints" / "tracking" / run).glob("*.jsonl"))
    with segment.open("ab") as f:
        f.write(b'[500, 17000, {"lo')  # a kill in the middle of a line
    log = connect(tmp_path)
    log.log(500, {"loss": 500 / 7})
    log.close()
    assert history(run, "loss") == [(step, step / 7) for step in range(501)]
    assert [a.path for a in MlflowClient().list_artifacts(run, "samples/step-00000499")] == [
        "samples/step-00000499/one.mp4"
    ]


def test_a_kill_after_a_batch_sends_that_batch_again_and_no_other(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dying = (
        "tracker._BATCH, real, seen = 100, MlflowClient.log_batch, []\n"
        "def dying(*a, **k):\n    real(*a, **k)\n    seen.append(1)\n    len(seen) == 3 and os.kill(os.getpid(), 9)\n"
        "MlflowClient.log_batch = dying\n"
    )
    script = KILLED.format(before=dying, after="log.close()")
    assert subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path / "checkpoints")]).returncode == -9
    sent: list[int] = []
    real = MlflowClient.log_batch

    def counting(*args: Any, **options: Any) -> Any:
        sent.extend(m.step for m in options["metrics"] if m.key == "loss")
        return real(*args, **options)

    monkeypatch.setattr(MlflowClient, "log_batch", counting)
    before = len(history(run, "loss"))
    log = connect(tmp_path)
    log.close()
    # the log was cut off somewhere: what it has is there once, and one batch of 50 steps was sent twice
    found = [step for step, _ in history(run, "loss")]
    assert before == 150 and found == list(range(len(found)))
    assert sent == list(range(100, len(found)))


def test_the_spool_stays_small(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_SEGMENT", 1000)
    log = connect(tmp_path)
    for step in range(300):
        log.log(step, {"loss": 1.0, "rate": 2.0})
    assert len(list(log.spool.folder.glob("*.jsonl"))) > 5
    until(lambda: len(list(log.spool.folder.glob("*.jsonl"))) == 1)
    log.close()
    assert len(history(run, "rate")) == 300


def test_a_disk_that_is_full_for_a_while_loses_nothing(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    free, real = [3], os.write

    def writing(handle: int, data: bytes) -> int:
        if not free[0]:
            raise OSError(errno.ENOSPC, "No space left on device")
        count = real(handle, data[: free[0]])
        free[0] -= count
        return count

    log = connect(tmp_path)
    with monkeypatch.context() as patched:
        patched.setattr(os, "write", writing)
        log.log(0, {"loss": 0.0})
        log.log(1, {"loss": 1.0})
        said = capsys.readouterr().out
        assert said.count("No space left on device; metrics are kept in memory") == 1
        assert log.spool.left() == 2
        free[0] = 1 << 20
        log.log(2, {"loss": 2.0})
    log.close()
    assert history(run, "loss") == [(0, 0.0), (1, 1.0), (2, 2.0)]


def test_a_metric_that_mlflow_refuses_is_named_and_holds_up_no_other(
    run: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = connect(tmp_path)
    for step in range(3):
        log.log(step, {"loss": 1.0, "a;b": 2.0})
    log.close()
    assert len(history(run, "loss")) == 3
    assert capsys.readouterr().out.count("tracking: metric 'a;b' is refused") == 1


@pytest.mark.parametrize("what", ["run", "experiment"])
def test_of_a_run_that_is_deleted_and_restored_no_metric_is_lost(run: str, tmp_path: Path, what: str) -> None:
    client, log = MlflowClient(), connect(tmp_path)
    name = run if what == "run" else client.get_run(run).info.experiment_id
    getattr(client, f"delete_{what}")(name)
    for step in range(3):
        log.log(step, {"loss": 1.0})
    until(lambda: log._trouble)
    getattr(client, f"restore_{what}")(name)
    log.log(3, {"loss": 1.0})
    log.close()
    assert [step for step, _ in history(run, "loss")] == [0, 1, 2, 3]


def test_a_video_is_an_artifact_that_plays(run: str, tmp_path: Path) -> None:
    frames = np.zeros((5, 32, 48, 3), np.uint8)
    frames[:, :, 24:] = 200
    log = connect(tmp_path)
    log.video(1000, "held-out_3", frames, fps=6)
    until(lambda: MlflowClient().list_artifacts(run, "samples"))
    log.close()
    path = mlflow.artifacts.download_artifacts(run_id=run, artifact_path="samples/step-00001000/held-out_3.mp4")
    assert np.abs(clip.decode(Path(path).read_bytes()).astype(int) - frames).mean() < 5
    for name, wrong in (("../x", frames), ("x", frames[0]), ("x", frames[:, :31]), ("x", frames / 255)):
        with pytest.raises(ValueError, match=r"video .*(its name|need uint8)"):
            log.video(0, name, wrong, 6)


def test_a_video_that_the_disk_does_not_take_is_said_and_left_out(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(clip, "write", full)
    with connect(tmp_path) as log:
        log.video(1, "one", np.zeros((3, 16, 16, 3), np.uint8), 6)
    assert "one.mp4: No space left on device; it is left out" in capsys.readouterr().out


def test_videos_are_encoded_while_training_goes_on(run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At most so many wait; the thread that trains waits for room, and at the end all are encoded."""
    may_go, real, by = threading.Event(), clip.write, set[str]()

    def slow(*args: Any) -> None:
        by.add(threading.current_thread().name)
        may_go.wait()
        real(*args)

    monkeypatch.setattr(clip, "write", slow)
    monkeypatch.setattr(videos, "_MOST", 3)
    log, frames = connect(tmp_path), np.zeros((3, 16, 16, 3), np.uint8)
    for step in range(3):
        log.video(step, "one", frames, 6)  # none is encoded yet
    fourth = threading.Thread(target=log.video, args=(3, "one", frames, 6))
    fourth.start()
    fourth.join(0.2)
    assert fourth.is_alive() and not log.spool.files()
    may_go.set()
    fourth.join()
    log.close()
    assert by == {"videos"}
    assert len(MlflowClient().list_artifacts(run, "samples")) == 4


def test_a_kill_before_a_video_is_encoded_loses_nothing(run: str, tmp_path: Path) -> None:
    before = "import threading\nfrom longtake.datasets import clip\nclip.write = lambda *_: threading.Event().wait()\n"
    script = KILLED.format(before=before, after="os.kill(os.getpid(), 9)")
    assert subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path / "checkpoints")]).returncode == -9
    connect(tmp_path).close()
    path = mlflow.artifacts.download_artifacts(run_id=run, artifact_path="samples/step-00000499/one.mp4")
    assert clip.decode(Path(path).read_bytes()).shape == (3, 16, 16, 3)


def test_artifacts_are_there_when_it_returns_or_it_is_a_failure(
    run: str, tmp_path: Path, down: threading.Event
) -> None:
    (tmp_path / "shown").mkdir()
    (tmp_path / "shown" / "a.txt").write_text("a")
    log = connect(tmp_path)
    log.artifacts(tmp_path / "shown", "heldout")
    log.artifacts(tmp_path / "shown" / "a.txt", "profile")
    client = MlflowClient()
    assert [a.path for a in client.list_artifacts(run, "heldout")] == ["heldout/a.txt"]
    assert [a.path for a in client.list_artifacts(run, "profile")] == ["profile/a.txt"]
    down.set()
    with pytest.raises(Failure, match="MLflow: profile: the server is on fire"):
        log.artifacts(tmp_path / "shown" / "a.txt", "profile")
    log.close()


def test_files_of_the_middle_of_training_are_sent_when_that_is_possible(
    run: str, tmp_path: Path, down: threading.Event
) -> None:
    (tmp_path / "trace" / "sub").mkdir(parents=True)
    (tmp_path / "trace" / "sub" / "a.json").write_text("a")
    down.set()
    with connect(tmp_path) as log:
        log.later(tmp_path / "trace", "profile")
        log.later(tmp_path / "trace" / "sub" / "a.json", "one")
        (tmp_path / "trace" / "sub" / "a.json").unlink()
        down.clear()
    client = MlflowClient()
    assert [a.path for a in client.list_artifacts(run, "profile/sub")] == ["profile/sub/a.json"]
    assert [a.path for a in client.list_artifacts(run, "one")] == ["one/a.json"]


def test_an_error_of_training_is_not_hidden_by_one_of_tracking(run: str, tmp_path: Path, down: threading.Event) -> None:
    down.set()
    with pytest.raises(ZeroDivisionError), connect(tmp_path, system_metrics=True) as log:
        log.log(1, {"loss": 1.0})
        raise ZeroDivisionError
    assert not any(t.name in ("tracker", "system metrics") for t in threading.enumerate())
    down.clear()
    with pytest.raises(ZeroDivisionError), connect(tmp_path) as log:
        log.log(2, {"loss": 1.0})
        raise ZeroDivisionError
    assert history(run, "loss") == [(1, 1.0), (2, 1.0)], "what can be sent in time is"


def test_system_metrics_come_by_themselves_and_go_on_when_resumed(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu = types.ModuleType("pynvml")
    gpu.__dict__.update(
        NVMLError=RuntimeError,
        nvmlInit=lambda: None,
        nvmlDeviceGetCount=lambda: 1,
        nvmlDeviceGetHandleByIndex=lambda n: n,
        nvmlDeviceGetMemoryInfo=lambda h: types.SimpleNamespace(used=30e9, total=40e9),
        nvmlDeviceGetUtilizationRates=lambda h: types.SimpleNamespace(gpu=87),
        nvmlDeviceGetPowerUsage=lambda h: 300_000,
        nvmlDeviceGetEnforcedPowerLimit=lambda h: 400_000,
    )
    monkeypatch.setitem(sys.modules, "pynvml", gpu)
    from mlflow.system_metrics.metrics import gpu_monitor

    monkeypatch.setattr(gpu_monitor, "pynvml", gpu, raising=False)
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    for step in (10, 20):
        log = connect(tmp_path, system_metrics=True)
        log.log(step, {"loss": 1.0})
        cpu = "system/cpu_utilization_percentage"
        until(lambda cpu=cpu, step=step: step in [s for s, _ in history(run, cpu)])
        log.close()
    assert {s for s, _ in history(run, cpu)} == {10, 20}
    assert history(run, "system/gpu_0_utilization_percentage")[0][1] == 87
    assert history(run, "system/gpu_0_memory_usage_megabytes")[0][1] == 30000
    assert history(run, "system/system_memory_usage_percentage")
    assert not any(t.name == "system metrics" for t in threading.enumerate())


def test_a_short_run_has_system_metrics_too_and_a_failing_driver_stops_nothing(
    run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    log = connect(tmp_path, system_metrics=True)
    log.log(1, {"loss": 1.0})
    until(lambda: history(run, "loss"))
    log.close()
    assert len(history(run, "system/cpu_utilization_percentage")) == 1

    def broken() -> list[Any]:
        raise RuntimeError("driver mismatch")

    monkeypatch.setattr(tracker, "_monitors", broken)
    log = connect(tmp_path, system_metrics=True)
    log.log(2, {"loss": 1.0})
    log.close()
    assert "tracking: no system metrics (driver mismatch)" in capsys.readouterr().out
    assert len(history(run, "loss")) == 2
