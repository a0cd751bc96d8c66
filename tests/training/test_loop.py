"""The loop with a small objective: what it promises whatever is trained."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.stage import content
from longtake.training import checkpoint, engines
from longtake.training.config import TrainConfig
from longtake.training.loop import Batch, Engines, Objective, learning_rate, train

SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch": 2,
    "lr": 1e-2,
    "workers": 0,
    "log_every": 2,
    "checkpoint_every": 3,
    "ema_half_life": 2,
}


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    with engines.process_group():
        yield


def tiny(fault_at: int | None = None) -> Objective:
    """An autoencoder of mean colours with dropout, so that randomness matters."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(27, 8), nn.Dropout(0.2), nn.Linear(8, 27))
    calls = 0

    def loss(name: str, made: Engines, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        colours = to_model(batch["video"]).mean((3, 4)).flatten(1)
        noisy = colours + 0.1 * torch.randn(colours.shape, generator=generator)
        error = (made[name](noisy.to(next(module.parameters()).dtype)).float() - colours).square().mean()
        error = error * (float("nan") if calls == fault_at else 1.0)
        return error, {"loss": error.detach()}

    return Objective({"generator": module}, loss)


def loader(dataset: str, **options: Any) -> Loader:
    return Loader(dataset, columns=("video",), frames=9, size=(32, 32), batch=2, **options)


def run(dataset: str, folder: Path, objective: Objective | None = None, **changes: Any) -> dict[str, Tensor]:
    config = TrainConfig(**SETTINGS | changes)
    return train(objective or tiny(), loader(dataset), config, folder, None, 0, 1)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_stopped_and_resumed_is_bit_for_bit_straight_through(
    dataset: str, tmp_path: Path, group: None, zero_stage: int, precision: str
) -> None:
    straight = run(dataset, tmp_path / "a", zero_stage=zero_stage, precision=precision)
    # the schedule belongs to the whole run, so the first half ends by a stop, not by fewer steps
    stopping = tiny()

    def loss(name: str, made: Engines, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(batch["key"])
        return stopping.loss(name, made, batch, generator)

    seen: list[list[str]] = []
    with pytest.raises(Interrupted, match="stopped at step 4, state saved"):
        run(dataset, tmp_path / "b", Objective(stopping.modules, loss), zero_stage=zero_stage, precision=precision)
    resumed = run(dataset, tmp_path / "b", zero_stage=zero_stage, precision=precision)
    assert same(straight, resumed)
    assert not same(straight, engines_weights(tiny()))


def engines_weights(objective: Objective) -> dict[str, Tensor]:
    return {k: v.float() for k, v in objective.modules["generator"].state_dict().items()}


def test_training_learns(dataset: str, tmp_path: Path, group: None) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.names: set[str] = set()

        def log(self, step: int, metrics: dict[str, float]) -> None:
            self.losses.append(metrics["loss"])
            self.names |= set(metrics)

    recorder: Any = Recorder()
    train(tiny(), loader(dataset), TrainConfig(**SETTINGS | {"steps": 60}), tmp_path, recorder, 0, 1)
    assert recorder.losses[-1] < 0.7 * recorder.losses[0]
    assert {"loss", "learning_rate", "seconds_per_step", "samples_per_second", "data_wait_share"} <= recorder.names


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(dataset: str, tmp_path: Path, group: None) -> None:
    with pytest.raises(Failure, match="loss of generator is not finite at step 4"):
        run(dataset, tmp_path, tiny(fault_at=5))
    keys = json.loads((tmp_path / "nonfinite-0.json").read_text())["keys"]
    assert len(keys) == 2 and all("-" in k for k in keys)
    assert (tmp_path / "latest").read_text() == "step-00000003"


def test_accumulated_passes_equal_one_large_batch(dataset: str, tmp_path: Path, group: None) -> None:
    def plain(name: str, made: Engines, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        colours = to_model(batch["video"]).mean((3, 4)).flatten(1)
        error = (made[name](colours) - colours).square().mean()
        return error, {"loss": error.detach()}

    def module() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(27, 27)

    one = Loader(dataset, columns=("video",), frames=9, size=(32, 32), batch=4, shuffle=False)
    two = Loader(dataset, columns=("video",), frames=9, size=(32, 32), batch=2, shuffle=False)
    results = [
        train(
            Objective({"generator": module()}, plain),
            stream,
            TrainConfig(**SETTINGS | {"steps": 1, "batch": 4, "accumulate": n}),
            tmp_path / str(n),
            None,
            0,
            1,
        )
        for n, stream in ((1, one), (2, two))
    ]
    assert all(torch.allclose(results[0][k], results[1][k], atol=1e-6) for k in results[0])


def test_a_batch_that_does_not_fit_is_named_with_what_to_lower(dataset: str, tmp_path: Path, group: None) -> None:
    plain = tiny()

    def loss(name: str, made: Engines, batch: Batch, generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(Failure, match=r"at step 0 with video \(2, 3, 9, 32, 32\) on this process; lower batch"):
        run(dataset, tmp_path, Objective(plain.modules, loss))


def test_old_checkpoints_go_and_a_damaged_one_is_named(dataset: str, tmp_path: Path, group: None) -> None:
    run(dataset, tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004", "step-00000005"]
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "step-00000005" / "ema.safetensors").write_bytes(b"damaged")
    with pytest.raises(Failure, match="step-00000005: damaged checkpoint"):
        run(dataset, tmp_path, steps=5)


def test_a_second_process_does_not_train_into_the_same_folder(tmp_path: Path) -> None:
    with checkpoint.locked(tmp_path):
        script = (
            "import sys\nfrom pathlib import Path\nfrom longtake.training.checkpoint import locked\n"
            "with locked(Path(sys.argv[1])): pass"
        )
        done = subprocess.run([sys.executable, "-P", "-c", script, str(tmp_path)], capture_output=True, text=True)
        assert done.returncode != 0 and f"process {os.getpid()} is training here already" in done.stderr
    with checkpoint.locked(tmp_path):
        pass


def test_a_port_in_use_is_one_line(tmp_path: Path) -> None:
    import socket

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        script = (
            "from longtake.training.engines import process_group\nfrom longtake.datasets.errors import UserError\n"
            "try:\n    with process_group(): pass\nexcept UserError as e: print(e)"
        )
        launched = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            "RANK": "0",
            "WORLD_SIZE": "1",
            "LOCAL_RANK": "0",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", script], env=os.environ | launched, capture_output=True, text=True
        )
    assert f"MASTER_PORT={port}: cannot be used" in done.stdout, done.stderr


def test_no_compiler_runs_at_the_start(group: None) -> None:
    import deepspeed

    engines.engines_of({"x": nn.Linear(2, 2)}, TrainConfig(**SETTINGS), 1)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


def test_the_schedule_warms_up_and_ends_where_it_should() -> None:
    config = TrainConfig(steps=110, lr=1.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(config, s) for s in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rate(TrainConfig(steps=10, lr=2.0, schedule="constant"), 9) == 2.0


def test_a_batch_that_does_not_divide_is_refused() -> None:
    with pytest.raises(UserError, match="batch: 6 does not divide among 4 processes"):
        engines.deepspeed_config(TrainConfig(batch=6), 4)


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("mount"), reason="making a small disk needs root")
def test_a_full_disk_while_saving_is_one_line_and_costs_no_older_checkpoint(
    dataset: str, tmp_path: Path, group: None
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(disk)], check=True)
    try:
        with pytest.raises(Failure, match="free some space, then run the same command again"):
            run(dataset, disk, steps=6, checkpoint_every=1, keep_checkpoints=9)
        last = (disk / "latest").read_text()
        assert (disk / last / "meta.json").exists() and not list(disk.glob(".*"))
        subprocess.run(["mount", "-o", "remount,size=4m", str(disk)], check=True)
        assert same(run(dataset, disk, steps=6), run(dataset, tmp_path / "straight", steps=6))
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_what_only_says_how_the_work_is_done_may_change_in_the_middle_of_a_run() -> None:
    before = TrainConfig(steps=10)
    after = TrainConfig(steps=10, workers=4, cache={"folder": "/x", "max_bytes": 1}, log_every=1, checkpoint_every=7)
    assert content(before) == content(after) != content(TrainConfig(steps=11))
