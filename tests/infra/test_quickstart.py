"""The whole way, as a user goes it: the quickstart recipe in its own processes, undisturbed and killed; and that of TATS."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from importlib.resources import files
from pathlib import Path

import pytest
import yaml

from longtake.datasets import clip

pytestmark = pytest.mark.slow

SETTINGS = {
    "images": {"steps": 4, "batch": 2},
    "vae": {"steps": 30, "run.checkpoint_every": 10, "batch": 2},
    "decoder": {"steps": 4, "batch": 2},
    "latte": {"steps": 6, "batch": 2, "sample_steps": 2, "eval_videos": 2},
}
SMALL = [
    word
    for stage, values in SETTINGS.items()
    for key, value in values.items()
    for word in ("--set", f"stages.{stage}.{key}={value}")
]
SHORT = ["--set", "stages.vae.steps=30", "--set", "stages.vae.run.checkpoint_every=10", "--set", "stages.vae.batch=2"]
COMMAND = [sys.executable, "-P", "-m", "longtake.infra.cli"]


def environment(footage: Path) -> dict[str, str]:
    """The environment of a fresh shell, without other tests' variables for Ray and MLflow."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "MLFLOW_"))}
    return clean | {"VIDEOS": str(footage)}


def longtake(folder: Path, footage: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, env=environment(footage), capture_output=True, text=True, timeout=500
    )


def short(folder: Path) -> str:
    """The quickstart's way to one model, without what comes before and after it, as a recipe in `folder`."""
    content = yaml.safe_load((files("longtake.infra.recipes") / "quickstart.yaml").read_text())
    vae = content["stages"]["vae"] | {"model": {"preset": "pv_vae_tiny"}}
    del vae["parent"]
    content["stages"] = {name: content["stages"][name] for name in ("shards", "view")} | {"vae": vae}
    path = folder / "short.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def start(folder: Path, footage: Path, more: list[str], output: int) -> subprocess.Popen[str]:
    """The short recipe in a process group of its own, to be killed."""
    command = [*COMMAND, "run", short(folder), *more]
    return subprocess.Popen(
        command,
        cwd=folder,
        env=environment(footage),
        start_new_session=True,
        # a shell's background job ignores SIGINT, and so would all that it starts
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # noqa: PLW1509
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, footage: Path, *more: str) -> str:
    done = longtake(folder, footage, "run", short(folder), *SHORT, *more)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tars(folder: Path) -> dict[str, str]:
    import hashlib

    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("shards/**/*.tar"))
    }


@pytest.fixture(scope="module")
def whole(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The workspace of the quickstart, run with few steps."""
    folder = tmp_path_factory.mktemp("whole")
    done = longtake(folder, footage, "run", "quickstart", *SMALL)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def finished(footage: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart")
    run(folder, footage)
    return folder


def test_it_ends_with_a_dataset_a_champion_and_a_report(whole: Path, footage: Path) -> None:
    workspace = whole / "runs" / "quickstart"
    status = longtake(whole, footage, "status", "quickstart", *SMALL).stdout
    assert status.count("finished") >= 7 and "models:/pv-vae/3" in status and "models:/latte/1" in status
    script = (
        "import numpy as np, mlflow\nfrom longtake.training.registry import load\nprint(type(load('models:/pv-vae@champion')).__name__)\n"
        "served = mlflow.pyfunc.load_model('models:/pv-vae@champion')\n"
        "print(served.predict(np.zeros((1, 5, 64, 64, 3), np.uint8)).shape)"
    )
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{workspace}/mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment(footage) | store, capture_output=True, text=True
    )
    assert done.stdout.splitlines() == ["PVVAE", "(1, 5, 64, 64, 3)"], done.stderr
    page = (workspace / "report.html").read_text()
    assert page.count("<video") >= 1 and "copy" in page.lower() and "Generated videos" in page
    heldout = json.loads(next(workspace.glob("artifacts/*/artifacts/heldout/heldout.json")).read_text())
    assert heldout["summary"]["split"] == "val" and heldout["summary"]["psnr_all"] > 8


def test_a_second_run_reuses_every_stage(whole: Path, footage: Path) -> None:
    out = longtake(whole, footage, "run", "quickstart", *SMALL).stdout
    assert out.count(": reused") == out.count(": r") - out.count("report: r") >= 7


def test_a_training_setting_reruns_training_and_no_data_stage(whole: Path, footage: Path) -> None:
    dry = longtake(
        whole, footage, "run", "quickstart", *SMALL, "--set", "stages.vae.lr=2e-3", "--dry-run"
    ).stdout.splitlines()
    assert dry[:4] == [f"{stage}: would be reused" for stage in ("shards", "view", "images")] + ["vae: would run"]


def test_a_damaged_shard_is_made_again_where_it_was(finished: Path, footage: Path) -> None:
    before = tars(finished)
    broken = next(finished.glob("runs/quickstart/shards/*/train/00000.tar"))
    broken.write_bytes(broken.read_bytes()[:-700])
    found = longtake(finished, footage, "dataset", "verify", str(broken.parents[1]))
    assert found.returncode == 1 and "delete train/00000.parquet and run the `shard` stage again" in found.stdout
    broken.with_suffix(".parquet").unlink()
    out = run(finished, footage)
    assert "shards: running" in out and "vae: reused" in out
    assert tars(finished) == before
    assert longtake(finished, footage, "dataset", "verify", str(broken.parents[1])).returncode == 0


@pytest.mark.soak
def test_forced_training_starts_from_nothing(finished: Path, footage: Path) -> None:
    out = run(finished, footage, "--from", "vae")
    assert "shards: reused" in out and "vae: running" in out and "models:/pv-vae/2" in out
    outputs = [p.parent for p in finished.glob("runs/quickstart/vae/*/checkpoints")]
    assert len(outputs) == 2
    assert run(finished, footage).count("models:/pv-vae/2") == 1


def champion(folder: Path, footage: Path) -> str:
    """A digest of the weights that the registry hands out; a killed copy that was never registered does not count."""
    script = (
        "import hashlib\nfrom longtake.training.registry import load\n"
        "state = load('models:/pv-vae@champion').state_dict()\n"
        "print(hashlib.sha256(b''.join(v.numpy().tobytes() for v in state.values())).hexdigest())"
    )
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{folder}/runs/quickstart/mlflow.db"}
    done = subprocess.run(
        [sys.executable, "-P", "-c", script], env=environment(footage) | store, capture_output=True, text=True
    )
    assert len(done.stdout.strip()) == 64, done.stderr
    return done.stdout


def _marker(folder: Path, moment: str) -> bool:
    pattern, count = {
        "sharding": ("shards/*/train/*.frame_diff.tar", 1),
        "training": ("vae/*/checkpoints/step-00000010", 1),
        "registering": ("artifacts/models", 1),
    }[moment]
    return len(list((folder / "runs" / "quickstart").glob(pattern))) >= count


@pytest.mark.soak
def test_killed_at_its_worst_moments_it_ends_the_same(finished: Path, footage: Path, tmp_path: Path) -> None:
    for moment in ("sharding", "training", "registering"):
        child = start(tmp_path, footage, SHORT, subprocess.DEVNULL)
        deadline = time.time() + 200
        while not _marker(tmp_path, moment) and time.time() < deadline and child.poll() is None:
            time.sleep(0.02)
        assert child.poll() is None and _marker(tmp_path, moment), f"never caught it {moment}"
        os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    run(tmp_path, footage)
    assert tars(tmp_path / "runs" / "quickstart").values() and set(tars(tmp_path).values()) == set(
        tars(finished).values()
    )
    weights = {folder: champion(folder, footage) for folder in (finished, tmp_path)}
    assert weights[finished] == weights[tmp_path], "the interrupted training ends with the same weights"


def test_ctrl_c_saves_says_how_to_go_on_and_goes_on(finished: Path, footage: Path) -> None:
    """A training that has finished and goes on, on the data that is there."""
    more = [*SHORT, "--set", "stages.vae.steps=2000", "--set", "stages.vae.run.checkpoint_every=1000"]
    folders = set(finished.glob("runs/quickstart/vae/*"))
    child = start(finished, footage, more, subprocess.PIPE)
    assert child.stdout
    deadline = time.time() + 200
    said = ""
    # some steps of the training are done
    while not re.search(r"train: .*\| (?!30/)\d+/2000 ", said.partition("vae: running")[2]) and time.time() < deadline:
        said += os.read(child.stdout.fileno(), 1 << 16).decode(errors="replace")
    assert "shards: reused" in said, said
    os.killpg(child.pid, signal.SIGINT)
    rest = child.communicate(timeout=60)[0]
    assert child.returncode == 130 and "run the same command again" in rest and "Traceback" not in rest, rest
    (place,) = re.findall(r"^vae: goes on in (\S+); --force begins anew", said, re.MULTILINE)
    assert set(finished.glob("runs/quickstart/vae/*")) == folders
    assert max(path.name for path in Path(place).glob("checkpoints/step-*")) > "step-00000030", rest
    assert "killed" in longtake(finished, footage, "status", short(finished), *more).stdout


@pytest.mark.soak
def test_the_tiny_recipe_of_tats_ends_with_a_video_of_256_frames_in_the_report(footage: Path, tmp_path: Path) -> None:
    few = {"far.frames": 20, "vqgan.steps": 6, "vqgan.warm_steps": 2}
    few |= {f"{stage}.{name}": 2 for stage in ("base", "anchors", "tats") for name in ("steps", "batch")}
    settings = [word for name, value in few.items() for word in ("--set", f"stages.{name}={value}")]
    done = longtake(tmp_path, footage, "run", "tats_tiny", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    workspace = tmp_path / "runs" / "tats_tiny"
    drawn = [json.loads(path.read_text()) for path in workspace.glob("artifacts/*/artifacts/heldout/drawn.json")]
    assert sorted(len(record["videos"]) for record in drawn) == [0, 5, 5]
    frames = [
        len(clip.decode(path.read_bytes())) for path in workspace.glob("artifacts/*/artifacts/heldout/longer.mp4")
    ]
    assert sorted(frames) == [64, 256]
    page = (workspace / "report.html").read_text()
    assert "256 frames" in page and page.count("<video") >= 10
