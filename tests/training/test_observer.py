"""The observer: what it makes of checkpoints is what the training would have made, whatever happens to it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import latent_stages
import psutil
import pytest
from flat import nested
from tats_stages import VQGAN_TINY

from longtake.datasets.errors import UserError
from longtake.training import checkpoint, observer
from longtake.training.launch.processes import Job
from longtake.training.models.tats import pretrain

pytestmark = pytest.mark.usefixtures("one_thread", "group")

# with a second module, a codebook and an average: all that is in a checkpoint
QUICK: dict[str, Any] = VQGAN_TINY | {
    "ema_half_lives": [2],
    "checkpoint_every": 1,
    "keep_checkpoints": 9,
    "sample_every": 2,
    "heldout_every": 2,
    "heldout_clips": 2,
    "eval_clips": 2,
    "promote": False,
}


class Run:
    """A run of MLflow: its metrics of held-out clips, and the files of its samples."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        self._fixture = latent_stages.mlflow_run(folder, patch)
        self._id = next(self._fixture)

    def heldout(self) -> dict[tuple[str, int], float]:
        client = self._client()
        names = [name for name in client.get_run(self._id).data.metrics if name.startswith("heldout/")]
        points = [(name, m) for name in names for m in client.get_metric_history(self._id, name)]
        found = {(name, point.step): point.value for name, point in points}
        assert len(found) == len(points), "each once"
        return found

    def metrics(self) -> set[str]:
        return set(self._client().get_run(self._id).data.metrics)

    def samples(self, folder: Path) -> dict[str, bytes]:
        root = Path(self._client().download_artifacts(self._id, "samples", str(folder)))
        return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*.*")}

    def steps(self) -> set[int]:
        return {step for _, step in self.heldout()}

    def _client(self) -> Any:
        from mlflow import MlflowClient

        return MlflowClient()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    (tmp_path / "store").mkdir()
    return Run(tmp_path / "store", monkeypatch)


@pytest.fixture(scope="module")
def trained(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a training that has stopped for no sample: read it, do not change it."""
    folder = tmp_path_factory.mktemp("trained") / "checkpoints"
    latent_stages.fit(pretrain, config(), {"dataset": dataset}, folder)
    return folder


def config(**changes: Any) -> pretrain.Config:
    return pretrain.Config(**nested(QUICK | {"observer": "cpu"} | changes))


def observe(folder: Path, dataset: str, **changes: Any) -> None:
    """Observe what is in the folder of a training that has ended."""
    ended = threading.Event()
    ended.set()
    observer.observe(Job.of(pretrain.__name__, config(**changes), {"dataset": dataset}, folder), ended)


@pytest.fixture
def copy(trained: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "checkpoints"))


@pytest.mark.slow
def test_it_makes_what_the_training_would_have_made_and_the_training_stops_for_nothing(
    dataset: str, tmp_path: Path
) -> None:
    found = {}
    for name, place in (("aside", None), ("beside", "cpu")):
        (tmp_path / name).mkdir()
        with pytest.MonkeyPatch.context() as patch:
            run = Run(tmp_path / name, patch)
            pretrain.run(config(observer=place), {"dataset": dataset}, str(tmp_path / name / "out"))
            found[name] = run.heldout(), run.samples(tmp_path / name), run.metrics()
    (losses, videos, metrics), (observed, shown, others) = found["aside"], found["beside"]
    assert observed == pytest.approx(losses, abs=1e-6) and {step for _, step in losses} == {2, 4}
    assert shown == videos and len(videos) == 2
    assert metrics >= {"share/sample", "share/heldout"} and others.isdisjoint({"share/sample", "share/heldout"})


@pytest.mark.slow
def test_one_that_is_killed_is_started_again_and_leaves_nothing_out(
    dataset: str, run: Run, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder, ended = tmp_path / "out" / "checkpoints", threading.Event()

    def kill() -> None:
        record = folder / "observer" / "observed.json"
        while not ended.wait(0.005):
            if record.exists() and json.loads(record.read_bytes())["step"] >= 1:
                beside = [p for p in psutil.Process().children() if "longtake.training.observer" in p.cmdline()]
                for process in beside:
                    os.kill(process.pid, signal.SIGKILL)
                return

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        pretrain.run(config(sample_every=1, heldout_every=1), {"dataset": dataset}, str(tmp_path / "out"))
    finally:
        ended.set()
        killer.join()
    assert "the observer has ended with exit code -9; it is started again" in capfd.readouterr().err
    assert run.steps() == {1, 2, 3, 4}
    assert len(run.samples(tmp_path)) == 4
    assert not [p for p in psutil.Process().children() if "longtake.training.observer" in p.cmdline()]


def test_what_is_due_since_the_last_checkpoint_is_made_once(copy: Path, dataset: str, run: Run, tmp_path: Path) -> None:
    shutil.rmtree(copy / "step-00000002")
    observe(copy, dataset, sample_every=2, heldout_every=3)
    # 2 is gone, and 3 is the first after it; 4 is the last, whose loss is always measured
    assert {Path(name).parts[0] for name in run.samples(tmp_path)} == {"step-00000003", "step-00000004"}
    assert run.steps() == {3, 4}
    before = run.heldout()
    observe(copy, dataset, sample_every=2, heldout_every=3)
    assert run.heldout() == before


def test_what_is_left_of_a_training_that_went_back_is_not_observed(copy: Path, dataset: str, run: Run) -> None:
    (copy / "latest").write_text("step-00000002")
    observe(copy, dataset, sample_every=0, heldout_every=1)
    assert run.steps() == {1, 2}


@pytest.mark.parametrize(("latest", "observed", "begins"), [(4, None, 4), (2, 4, 2), (4, 1, 1), (None, 4, 0)])
def test_it_begins_where_the_training_does(copy: Path, latest: int | None, observed: int | None, begins: int) -> None:
    """Steps behind the training are not made up for where it had no observer, and are made again where it goes back."""
    record = copy / "observer" / "observed.json"
    record.parent.mkdir()
    if observed is not None:
        record.write_text(json.dumps({"step": observed}))
    (copy / "latest").write_text(f"step-{latest:08d}") if latest else (copy / "latest").unlink()
    with pytest.raises(KeyError), observer.beside(pretrain.__name__, config(), {}, copy):
        raise KeyError("the training fails at once")
    assert json.loads(record.read_bytes())["step"] == begins
    with observer.beside(pretrain.__name__, config(observer=None), {}, copy):
        pass
    assert not record.exists()


@pytest.mark.parametrize("there", [False, True])
def test_a_checkpoint_that_is_fetched_is_not_observed_again(copy: Path, tmp_path: Path, there: bool) -> None:
    far, folder = tmp_path / "far", tmp_path / "new"
    far.mkdir()
    if there:
        shutil.copytree(copy / "step-00000003", far / "step-00000003")
        (far / "latest").write_text("step-00000003")
    with pytest.raises(KeyError), observer.beside(pretrain.__name__, config(upload=str(far)), {}, folder):
        raise KeyError("the training fails at once")
    assert json.loads((folder / "observer" / "observed.json").read_bytes())["step"] == (3 if there else 0)


@pytest.mark.parametrize(("every", "made", "left_out"), [(1, {1, 3, 4}, True), (2, {3, 4}, False)])
def test_what_is_due_of_a_checkpoint_that_is_removed_meanwhile_is_made_of_the_next(
    copy: Path,
    dataset: str,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    every: int,
    made: set[int],
    left_out: bool,
) -> None:
    weights = checkpoint.Weights

    def removed(path: Path, *arguments: Any) -> Any:
        if path.name == "step-00000002":
            shutil.rmtree(path)
        return weights(path, *arguments)

    monkeypatch.setattr(checkpoint, "Weights", removed)
    observe(copy, dataset, sample_every=0, heldout_every=every)
    assert run.steps() == made
    # the next one has its own, where each has one
    assert ("warning: 1 samples and held-out losses were due" in capfd.readouterr().err) == left_out


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_changes_of_lora_are_part_of_the_weights(dataset: str, run: Run, tmp_path: Path, precision: str) -> None:
    parent = latent_stages.saved(latent_stages.vae(), tmp_path / "parent")
    from longtake.training.models.pv_vae import pretrain as pretrain_vae

    settings = {
        "kind": "pretrain_vae",
        "dataset": "d",
        "parent": "p",
        "frames": 5,
        "sizes": [[32, 32]],
        "steps": 2,
        "batch": 2,
    }
    settings |= {"lora": {"rank": 2, "targets": ["decoder.*"]}, "lr": 0.1, "lambda_gan": 0, "ema_half_lives": []}
    settings |= {"precision": precision}
    settings |= {"warmup_steps": 0, "workers": 0, "checkpoint_every": 2, "sample_every": 0, "heldout_every": 2}
    chosen, given = pretrain_vae.Config(**nested(settings)), {"dataset": dataset, "parent": parent}
    log = latent_stages.Log()
    latent_stages.fit(pretrain_vae, chosen, given, tmp_path / "checkpoints", log=log)
    expected = next(row["heldout/loss"] for row in log.rows if "heldout/loss" in row)
    ended = threading.Event()
    ended.set()
    observer.observe(Job.of(pretrain_vae.__name__, chosen, given, tmp_path / "checkpoints"), ended)
    assert run.heldout()["heldout/loss", 2] == pytest.approx(expected, rel=1e-5 if precision == "fp32" else 0.02)


@pytest.fixture
def _no_gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(observer.torch.cuda, "device_count", lambda: 2)
    yield


@pytest.mark.usefixtures("_no_gpus")
def test_a_device_that_is_not_there_is_a_mistake_before_the_first_step(dataset: str, tmp_path: Path) -> None:
    with (
        pytest.raises(UserError, match=r"run\.observer: cuda:2, but this machine has 2 GPUs for it"),
        observer.beside(pretrain.__name__, config(observer="cuda:2"), {"dataset": dataset}, tmp_path),
    ):
        raise AssertionError("no step")
    with pytest.raises(ValueError, match="observer"):
        config(observer="gpu")
    for launcher, first in (("process", 1), ({"by": "torchrun", "processes": 2}, 2)):
        with (
            pytest.raises(
                UserError,
                match=rf"run\.observer: cuda:{first - 1} is the device of a training process; name cuda:{first}",
            ),
            observer.beside(pretrain.__name__, config(observer=f"cuda:{first - 1}", launcher=launcher), {}, tmp_path),
        ):
            raise AssertionError("no step")


def test_its_device_is_the_only_one_it_sees(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observer.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert observer._environment(config(observer="cuda:1"))["CUDA_VISIBLE_DEVICES"] == "1"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,7")
    variables = observer._environment(config(observer="cuda:1"))
    assert variables["CUDA_VISIBLE_DEVICES"] == "7" and "RANK" not in variables
    assert observer._environment(config())["CUDA_VISIBLE_DEVICES"] == ""
