"""The launchers: the same training by each, errors as one line, stops that save, and a killed process started again."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from flat import nested

from longtake.datasets.errors import UserError
from longtake.training import checkpoint
from longtake.training.checkpoint import weights
from longtake.training.config import LaunchConfig
from longtake.training.launch import ray

BIN = Path(sys.executable).parent
LONGTAKE = [sys.executable, "-P", "-m", "longtake.infra.cli"]
# torchrun and the deepspeed launcher as one starts them by hand
TORCHRUN = [str(BIN / "torchrun"), "--standalone", "--nproc-per-node", "2", "-m", "longtake.infra.cli"]
DEEPSPEED = [str(BIN / "deepspeed"), "--hostfile", "hosts", "--no_ssh", "--node_rank", "0", "--master_addr"]
DEEPSPEED += ["127.0.0.1", "--master_port", "29517", "--no_local_rank", "--module", "longtake.infra.cli"]
STEPS = 12

STAGE = '''
"""A stage-like module that learns mean colours without randomness, so that it does not matter who sees which sample."""
import os, signal, time
from functools import partial
from pathlib import Path
import torch
from torch import nn
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.loader import Loader, to_model
from longtake.training import engines, launch
from longtake.training.config import TrainConfig
from longtake.training.loop import train
from longtake.training.objective import Objective

class Config(TrainConfig):
    fault: str = ""

calls = 0

def loss(fault, folder, turn):
    global calls
    calls += 1
    if fault not in ("", "late") and calls == 8 and torch.distributed.get_rank() == 1 and not (folder / "fault").exists():
        (folder / "fault").write_text("")
        if fault == "mistake":
            raise UserError("colours: there are none; choose some")
        if fault == "failure":
            raise Failure("colours: could not be fetched")
        if fault == "bug":
            [][1]
        os.kill(os.getpid(), signal.SIGKILL)
    colours = to_model(turn.batch["video"]).mean((3, 4)).flatten(1)
    error = (turn.engines[turn.name](colours) - colours).square().mean()
    return error, {"loss": error.detach()}

def work(config, inputs, folder):
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    (folder / f"environment-{rank}").write_bytes(Path("/proc/self/environ").read_bytes())
    loader = Loader(inputs["dataset"], columns=("video",), frames=9, size=(32, 32), batch=config.batch, rank=rank, world=world)
    objective = Objective({"model": nn.Linear(27, 27)}, partial(loss, config.fault, folder))
    train(objective, loader, config, folder, None, launch.stop_requested)
    if config.fault == "late" and rank == 1:
        time.sleep(1)
        engines.store().set("late", "1")
        assert engines.store().get("late") == b"1"
'''

START = """
import json, sys
from pathlib import Path
from longtake.datasets.errors import Failure, UserError
from longtake.training import launch
import colours

if __name__ == "__main__":
    config = colours.Config(**json.loads(sys.argv[1]))
    try:
        launch.run("colours", config, {"dataset": sys.argv[2]}, Path(sys.argv[3]))
    except (UserError, Failure) as e:
        sys.exit(f"{type(e).__name__}: {e}")
"""


def environment() -> dict[str, str]:
    # what a launcher needs to stand aside for, and this session's Ray, are not for the processes of a test
    unwanted = ("RAY_", "WORLD_SIZE", "RANK", "LOCAL_RANK", "MASTER_", "MLFLOW_", "OMP_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(unwanted)}
    return kept | {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}


def start(command: list[str], folder: Path) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process: "subprocess.Popen[str]") -> tuple[int, str]:
    """(exit code, all that was said)."""
    said = process.communicate(timeout=280)[0]
    return process.returncode, said


def wait_for(what: Callable[[], Any], process: "subprocess.Popen[str]") -> None:
    end = time.monotonic() + 200
    while not what() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.05)
    assert what() and process.poll() is None, finish(process) if process.poll() is not None else "never came so far"


def learned(folder: Path) -> dict[str, torch.Tensor]:
    found = checkpoint.latest(folder)
    assert found and found.name == f"step-{STEPS:08d}"
    return dict(weights.Weights(found, weights.RAW))


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return bool(one) and one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


# A stage-like module, without recipes and MLflow.


def colours(folder: Path, dataset: str, **settings: Any) -> tuple[int, str, Path]:
    (folder / "colours.py").write_text(STAGE)
    (folder / "start.py").write_text(START)
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(exist_ok=True)
    given = {"steps": STEPS, "batch": 4, "workers": 0, "checkpoint_every": 3, "lr": 1e-2, **settings}
    command = [sys.executable, "start.py", json.dumps(nested(given)), dataset, str(checkpoints)]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment() | {"PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        timeout=280,
    )
    return done.returncode, done.stderr, checkpoints


@pytest.mark.slow
def test_every_launcher_learns_what_one_process_learns_though_one_of_two_is_killed(
    dataset: str, tmp_path: Path
) -> None:
    made = {}
    torchrun = {"by": "torchrun", "processes": 2}
    ray = {"by": "ray", "processes": 2, "cpus": 0.5}
    for name, settings in {
        "alone": {},
        # rank 0 has nothing more to do while the other still needs the store that it keeps
        "two": {"launcher": torchrun, "fault": "late"},
        "killed": {"launcher": torchrun, "fault": "kill"},
        "killed under ray": {"launcher": ray, "fault": "kill"},
    }.items():
        (tmp_path / name).mkdir()
        code, said, folder = colours(tmp_path / name, dataset, **settings)
        assert code == 0, said
        assert said.count("train:   0%") == 1, said
        assert ("starting again from the last checkpoint" in said) == ("killed" in name), said
        made[name] = learned(folder)
        for environ in folder.glob("environment-*") if settings else ():
            # what the process began with, since torch reads it as it is loaded
            assert b"GOMP_SPINCOUNT=10000" in environ.read_bytes().split(b"\0"), (name, environ)
    assert same(made["two"], made["killed"]) and same(made["two"], made["killed under ray"])
    assert all(torch.allclose(made["alone"][k], made["two"][k], atol=1e-6) for k in made["alone"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("mistake", "UserError: colours: there are none; choose some"),
        ("failure", "Failure: colours: could not be fetched"),
        ("bug", "Failure: training: IndexError: list index out of range; the lines above say where"),
        ("kill", "Failure: training: process 1 was killed by signal 9"),
    ],
)
def test_what_one_process_meets_is_what_the_command_says(dataset: str, tmp_path: Path, fault: str, says: str) -> None:
    again = 3 if fault == "mistake" else 0
    launcher = {"by": "torchrun", "processes": 2, "max_failures": again}
    code, said, folder = colours(tmp_path, dataset, launcher=launcher, fault=fault)
    assert code == 1 and says in said.splitlines()[-1], said
    last = checkpoint.latest(folder)
    # a killed process may take with it the one that was being written
    whole = {"step-00000003", "step-00000006"} if fault == "kill" else {"step-00000006"}
    assert "starting again" not in said and last and last.name in whole, said
    assert ("Traceback" in said) == (fault == "bug"), said


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, "None 10000"),
        ({"OMP_WAIT_POLICY": ""}, "None 10000"),
        ({"OMP_WAIT_POLICY": "PASSIVE"}, "PASSIVE None"),
        ({"GOMP_SPINCOUNT": "5"}, "None 5"),
    ],
)
def test_a_stage_started_by_hand_lets_threads_sleep_soon_before_torch_is_loaded(
    tmp_path: Path, own: dict[str, str], expected: str
) -> None:
    script = (
        "import os, sys\nfrom longtake.infra import cli\nfrom longtake.training.launch import processes\n"
        "def spin(before=processes.spin_briefly):\n    before()\n"
        "    print(*(os.environ.get(name) for name in processes.SPINNING), 'torch' in sys.modules)\n"
        "processes.spin_briefly = spin\n"
        "try: cli.cli(['stage', 'none.yaml', 'vae'], standalone_mode=False)\nexcept Exception: pass"
    )
    command = [sys.executable, "-P", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment() | own, capture_output=True, text=True)
    assert done.stdout == f"{expected} False\n", done.stderr


# Recipes.


def recipe(folder: Path, dataset: str, launcher: dict[str, Any] | None = None, **settings: Any) -> Path:
    """Writes r.yaml in `folder`; returns the folder that checkpoints will have a part of."""
    folder.mkdir(exist_ok=True)
    checkpoints = folder / "checkpoints"
    stage = {
        "kind": "pretrain_vae",
        "dataset": dataset,
        "model": {"preset": "pv_vae_tiny"},
        "lambda_gan": 0,
        "frames": 9,
        "sizes": [[32, 32]],
        "steps": STEPS,
        "batch": 4,
        "workers": 0,
        "checkpoint_every": 2,
        "sample_every": 0,
        "eval_clips": 1,
        "checkpoints": str(checkpoints),
        **({"launcher": launcher} if launcher else {}),
        **settings,
    }
    content = {"name": "small", "workspace": str(folder / "run"), "stages": {"vae": nested(stage)}}
    (folder / "r.yaml").write_text(yaml.safe_dump(content))
    (folder / "hosts").write_text("localhost slots=2\n")
    return checkpoints


def place(checkpoints: Path) -> Path:
    """The part of a named folder that is the training's own; the folder itself before there is one."""
    return next(checkpoints.glob("*"), checkpoints)


@pytest.fixture(scope="module")
def by_hand(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """What two processes learn that torchrun has started by hand."""
    folder = tmp_path_factory.mktemp("by_hand")
    checkpoints = recipe(folder, dataset)
    code, said = finish(start([*TORCHRUN, "stage", "r.yaml", "vae"], folder))
    assert code == 0, said
    assert said.count("vae: models:/pv-vae/1") == 1 and said.count("train:   0%") == 1, said
    code, said = finish(start([*TORCHRUN, "stage", "r.yaml", "vae"], folder))
    assert code == 0 and said.count("vae: models:/pv-vae/1") == 1 and "train:" not in said, said
    return learned(place(checkpoints))


@pytest.mark.soak
def test_a_deepspeed_hostfile_gives_what_torchrun_gives(
    dataset: str, tmp_path: Path, by_hand: dict[str, torch.Tensor]
) -> None:
    checkpoints = recipe(tmp_path, dataset)
    code, said = finish(start([*DEEPSPEED, "stage", "r.yaml", "vae"], tmp_path))
    assert code == 0 and said.count("vae: models:/pv-vae/1") == 1, said
    assert same(learned(place(checkpoints)), by_hand)


@pytest.mark.slow
def test_sigterm_under_torchrun_saves_exits_0_and_the_same_command_goes_on(
    dataset: str, tmp_path: Path, by_hand: dict[str, torch.Tensor]
) -> None:
    checkpoints = recipe(tmp_path, dataset, {"by": "torchrun", "processes": 2})
    run = [*LONGTAKE, "run", "r.yaml"]
    process = start(run, tmp_path)
    wait_for(lambda: checkpoint.latest(place(checkpoints)), process)
    process.terminate()
    code, said = finish(process)
    assert code == 0 and "Traceback" not in said, said
    assert said.count("state saved; run the same command again to go on") == 1, said
    assert "done in" not in said and not list(tmp_path.glob("run/report.html")), said
    code, said = finish(start(run, tmp_path))
    assert code == 0 and "done in" in said, said
    assert same(learned(place(checkpoints)), by_hand)


@pytest.mark.soak
def test_sigterm_under_ray_saves_exits_0_and_the_same_command_goes_on(
    dataset: str, tmp_path: Path, by_hand: dict[str, torch.Tensor]
) -> None:
    checkpoints = recipe(tmp_path, dataset, {"by": "ray", "processes": 2, "cpus": 0.5})
    run = [*LONGTAKE, "run", "r.yaml"]
    process = start(run, tmp_path)
    wait_for(lambda: checkpoint.latest(place(checkpoints)), process)
    process.terminate()
    code, said = finish(process)
    assert code == 0 and said.count("state saved; run the same command again to go on") == 1, said
    assert "done in" not in said and "Traceback" not in said, said
    code, said = finish(start(run, tmp_path))
    assert code == 0 and "done in" in said, said
    assert same(learned(place(checkpoints)), by_hand)
    assert not list(checkpoints.glob("*/ray"))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "launcher", "settings", "says"),
    [
        (LONGTAKE, {"by": "torchrun", "processes": 2}, {"batch": 3}, "divide among 2 processes"),
        # a Ray is started for it
        pytest.param(
            LONGTAKE,
            {"by": "ray", "processes": 2, "cpus": 0.5},
            {"batch": 3},
            "divide among 2 processes",
            marks=pytest.mark.soak,
        ),
        pytest.param(TORCHRUN, None, {"batch": 3}, "divide among 2 processes", marks=pytest.mark.soak),
        pytest.param(
            TORCHRUN, {"by": "torchrun", "processes": 2}, {}, "leave run.launcher out", marks=pytest.mark.soak
        ),
        (TORCHRUN, None, {"kind": "curate"}, "stage vae: curate does not train"),
        (TORCHRUN, None, {"view": "other"}, "its input other has no finished run"),
    ],
    ids=["torchrun", "ray", "torchrun by hand", "two launchers", "no training", "input"],
)
def test_a_users_mistake_is_one_line(
    dataset: str,
    tmp_path: Path,
    command: list[str],
    launcher: dict[str, Any] | None,
    settings: dict[str, Any],
    says: str,
) -> None:
    recipe(tmp_path, dataset, launcher, **settings)
    content = yaml.safe_load((tmp_path / "r.yaml").read_text())
    if settings.get("kind"):
        content["stages"]["vae"] = {"kind": "curate", "dataset": dataset}
    if settings.get("view"):
        content["stages"]["other"] = {"kind": "curate", "dataset": dataset}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content))
    code, said = finish(start([*command, "stage", "r.yaml", "vae"], tmp_path))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and says in errors[0], said
    if command is LONGTAKE:
        # torchrun by hand adds its own account, and exits with 1
        assert code == 2 and "Traceback" not in said and "starting again" not in said, said


@pytest.mark.slow
def test_a_cluster_without_room_is_refused_at_once(dataset: str, tmp_path: Path) -> None:
    recipe(tmp_path, dataset, {"by": "ray", "processes": 2, "gpus": 8})
    code, said = finish(start([*LONGTAKE, "stage", "r.yaml", "vae"], tmp_path))
    assert code == 2 and said.count("error: ") == 1, said
    assert "launcher: 2 processes of 1 CPU and 8 GPU and one spare CPU do not fit into the Ray cluster" in said


def test_room_is_counted_node_by_node_and_one_cpu_stays_free() -> None:
    def fits(nodes: list[dict[str, float]], **how: Any) -> bool:
        try:
            ray.check_room(LaunchConfig(by="ray", **how), nodes)
        except UserError:
            return False
        return True

    assert fits([{"CPU": 3.0}], processes=2)
    assert not fits([{"CPU": 2.0}], processes=2)
    assert fits([{"CPU": 2.0}], processes=2, cpus=0.5)
    assert fits([{"CPU": 2.0}] * 2, processes=1, cpus=2)
    assert not fits([{"CPU": 2.0}] * 4, processes=2, cpus=3)
    assert fits([{"CPU": 8.0, "GPU": 4.0}] * 2, processes=8, gpus=1)
    assert not fits([{"CPU": 8.0, "GPU": 4.0}] * 2, processes=9, gpus=1)


def test_one_process_of_a_pytorchjob_needs_neither_a_port_nor_a_local_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    from longtake.training.engines import process_group

    with socket.create_server(("127.0.0.1", 0)) as taken:
        place = {"WORLD_SIZE": "1", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(taken.getsockname()[1])}
        for name, value in place.items():
            monkeypatch.setenv(name, value)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        with process_group() as found:
            assert found == (0, 1) and os.environ["LOCAL_RANK"] == "0"
        assert {name: os.environ[name] for name in place} == place


def test_a_rank_that_waits_for_the_others_says_so_and_hears_signals(tmp_path: Path) -> None:
    """The port takes connections, and nobody answers: as a node that is not there yet."""
    code = """
import sys
from longtake.infra import cli
from longtake.training import engines
engines.group.QUIET = 0.1
def wait():
    with engines.process_group():
        pass
cli.cli = lambda **_: wait()
cli.main()
"""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = str(silent.getsockname()[1])
        place = {"WORLD_SIZE": "2", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        waiting = subprocess.Popen(
            [sys.executable, "-P", "-c", code], env=os.environ | place, stderr=subprocess.PIPE, text=True
        )
        assert waiting.stderr
        for line in waiting.stderr:
            if "training: rank 1 waits for the others of 2 at 127.0.0.1:" in line:
                break
        waiting.terminate()
        assert waiting.wait(30) == 0
        assert "run the same command again to go on" in waiting.stderr.read()
