"""The loop with a small objective: what it promises whatever is trained."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import small
import torch
from flat import nested
from torch import Tensor, nn

from longtake.datasets.errors import Failure, Interrupted, UserError
from longtake.datasets.loader import Loader, to_model
from longtake.datasets.stage import content
from longtake.training import checkpoint, engines
from longtake.training.asides import pass_seed
from longtake.training.config import TrainConfig
from longtake.training.loop import learning_rate, train
from longtake.training.objective import Objective, Turn

SETTINGS: dict[str, Any] = {
    "steps": 6,
    "batch": 2,
    "lr": 1e-2,
    "workers": 0,
    "log_every": 2,
    "checkpoint_every": 3,
    "ema_half_lives": [2],
}


def tiny(fault_at: int | None = None) -> Objective:
    """An autoencoder of mean colours with dropout, so that randomness matters."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(27, 8), nn.Dropout(0.2), nn.Linear(8, 27))
    calls = 0

    def loss(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        nonlocal calls
        calls += 1
        colours = to_model(turn.batch["video"]).mean((3, 4)).flatten(1)
        noisy = colours + 0.1 * torch.randn(colours.shape, generator=turn.rng)
        error = (turn.engines[turn.name](noisy.to(next(module.parameters()).dtype)).float() - colours).square().mean()
        error = error * (float("nan") if calls == fault_at else 1.0)
        return error, {"loss": error.detach()}

    return Objective({"model": module}, loss)


def loader(dataset: str, **options: Any) -> Loader:
    return Loader(dataset, columns=("video",), frames=9, size=(32, 32), batch=2, **options)


def run(dataset: str, folder: Path, objective: Objective | None = None, **changes: Any) -> dict[str, Tensor]:
    config = TrainConfig(**nested(SETTINGS | changes))
    train(objective or tiny(), loader(dataset), config, folder)
    return checkpoint.trained(folder, config)


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def test_a_process_trains_in_one_group_after_another(tmp_path: Path) -> None:
    learned = []
    for number in range(2):
        with engines.process_group():
            learned.append(small.fit(tmp_path / str(number), zero_stage=1))
    assert small.same(*learned)


def test_a_group_leaves_pytorch_as_it_was(tmp_path: Path) -> None:
    """ZeRO 3 gives PyTorch another linear function."""
    linear = torch.nn.functional.linear
    with engines.process_group():
        with engines.process_group():
            small.fit(tmp_path / "inner", zero_stage=3)
            assert torch.nn.functional.linear is not linear
        assert torch.nn.functional.linear is linear
        small.fit(tmp_path / "outer", zero_stage=3)
    assert torch.nn.functional.linear is linear


def test_engines_hide_no_module_from_a_tracker_that_imports_it(
    tmp_path: Path, group: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    # the group hides MLflow while it loads DeepSpeed; with a tracker's thread at work that ended trainings
    monkeypatch.setattr(engines.group, "without", None)
    assert small.fit(tmp_path, steps=1)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_stopped_and_resumed_is_bit_for_bit_straight_through(
    dataset: str, tmp_path: Path, group: None, zero_stage: int, precision: str
) -> None:
    straight = run(dataset, tmp_path / "a", zero_stage=zero_stage, precision=precision)
    # the schedule belongs to the whole run, so the first half ends by a stop, not by fewer steps
    stopping = tiny()

    def loss(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        seen.append(turn.batch["key"])
        return stopping.loss(turn)

    seen: list[list[str]] = []
    with pytest.raises(Interrupted, match="stopped at step 4, state saved"):
        run(dataset, tmp_path / "b", replace(stopping, loss=loss), zero_stage=zero_stage, precision=precision)
    resumed = run(dataset, tmp_path / "b", zero_stage=zero_stage, precision=precision)
    assert same(straight, resumed)
    assert not same(straight, engines_weights(tiny()))


def engines_weights(objective: Objective) -> dict[str, Tensor]:
    return {k: v.float() for k, v in objective.modules["model"].state_dict().items()}


def test_training_learns(dataset: str, tmp_path: Path, group: None) -> None:
    class Recorder:
        def __init__(self) -> None:
            self.losses: list[float] = []
            self.names: set[str] = set()

        def log(self, step: int, metrics: dict[str, float]) -> None:
            self.losses.append(metrics["loss"])
            self.names |= set(metrics)
            self.last = metrics

    recorder: Any = Recorder()
    train(tiny(), loader(dataset), TrainConfig(**nested(SETTINGS | {"steps": 60})), tmp_path, recorder)
    assert recorder.losses[-1] < 0.7 * recorder.losses[0]
    assert {"loss", "learning_rate", "seconds_per_step", "samples_per_second", "data_wait_share"} <= recorder.names


def test_a_loss_that_is_not_finite_stops_and_names_the_batch(dataset: str, tmp_path: Path, group: None) -> None:
    with pytest.raises(Failure, match="loss of model is not finite at step 5"):
        run(dataset, tmp_path, tiny(fault_at=5))
    keys = json.loads((tmp_path / "nonfinite-0.json").read_text())["keys"]
    assert len(keys) == 2 and all("-" in k for k in keys)
    assert (tmp_path / "latest").read_text() == "step-00000003"


def test_accumulated_passes_equal_one_large_batch(dataset: str, tmp_path: Path, group: None) -> None:
    def plain(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        colours = to_model(turn.batch["video"]).mean((3, 4)).flatten(1)
        error = (turn.engines[turn.name](colours) - colours).square().mean()
        return error, {"loss": error.detach()}

    def module() -> nn.Module:
        torch.manual_seed(1)
        return nn.Linear(27, 27)

    one = Loader(dataset, columns=("video",), frames=9, size=(32, 32), batch=4, shuffle=False)
    two = Loader(dataset, columns=("video",), frames=9, size=(32, 32), batch=2, shuffle=False)
    results = []
    for n, stream in ((1, one), (2, two)):
        config = TrainConfig(**nested(SETTINGS | {"steps": 1, "batch": 4, "accumulate": n}))
        train(Objective({"model": module()}, plain), stream, config, tmp_path / str(n))
        results.append(checkpoint.trained(tmp_path / str(n), config))
    assert all(torch.allclose(results[0][k], results[1][k], atol=1e-6) for k in results[0])


def test_a_batch_that_does_not_fit_is_named_with_what_to_lower(dataset: str, tmp_path: Path, group: None) -> None:
    plain = tiny()

    def loss(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    with pytest.raises(Failure, match=r"at step 0 with video \(2, 3, 9, 32, 32\) on this process; lower batch"):
        run(dataset, tmp_path, replace(plain, loss=loss))


def test_old_checkpoints_go_and_a_damaged_one_is_named(dataset: str, tmp_path: Path, group: None) -> None:
    run(dataset, tmp_path, steps=5, checkpoint_every=1, keep_checkpoints=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000004", "step-00000005"]
    assert not list(tmp_path.glob(".*"))
    (tmp_path / "step-00000005" / "weights-00000.safetensors").write_bytes(b"damaged")
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
            "WORLD_SIZE": "2",
            "LOCAL_RANK": "0",
        }
        done = subprocess.run(
            [sys.executable, "-P", "-c", script], env=os.environ | launched, capture_output=True, text=True
        )
    assert f"MASTER_PORT={port}: cannot be used" in done.stdout, done.stderr


def test_no_compiler_runs_at_the_start(group: None) -> None:
    import deepspeed

    engines.engines_of({"x": nn.Linear(2, 2)}, "x", TrainConfig(**nested(SETTINGS)), 1)
    assert deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] is False


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_buckets_for_gradients_are_no_larger_than_what_learns(tmp_path: Path, group: None, zero_stage: int) -> None:
    """DeepSpeed's own are of 2 GB, on a GPU beside any model, and at ZeRO 3 never given back."""
    small.fit(tmp_path / "warm", zero_stage=zero_stage)
    before = psutil.Process().memory_info().vms
    small.fit(tmp_path / "again", zero_stage=zero_stage)
    assert psutil.Process().memory_info().vms - before < 500 << 20


def test_the_schedule_warms_up_and_ends_where_it_should() -> None:
    config = TrainConfig(steps=110, lr=1.0, warmup_steps=10, final_lr=0.1)
    rates = [learning_rate(config, s) for s in range(110)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == rates[10] == 1.0
    assert rates == sorted(rates[:10]) + sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)
    assert learning_rate(TrainConfig(steps=10, lr=2.0, schedule="constant"), 9) == 2.0


@pytest.mark.parametrize(
    ("asked", "steps", "expected"),
    [(None, 50_000, 1000), (None, 400, 40), (None, 4, 0), (0, 400, 0), (40, 400, 40), (400, 400, 400), (1000, 400, 40)],
)
def test_a_warm_up_is_no_longer_than_its_training(asked: int | None, steps: int, expected: int) -> None:
    config = TrainConfig(steps=steps, lr=1.0, schedule="constant", warmup_steps=asked)
    assert config.warmup == expected
    assert learning_rate(config, 0) == 1 / max(1, expected) and learning_rate(config, steps - 1) == 1.0


def test_a_warm_up_that_was_shortened_is_told(tmp_path: Path, group: None, capsys: pytest.CaptureFixture[str]) -> None:
    small.fit(tmp_path / "a", steps=4, warmup_steps=40)
    assert "warmup_steps: 40 are more than all 4 steps; warming up for 0" in capsys.readouterr().out
    small.fit(tmp_path / "b", steps=4)
    assert "warmup_steps" not in capsys.readouterr().out


def test_a_low_rank_change_of_random_weights_is_refused() -> None:
    from longtake.training.models.pv_vae import pretrain as pretrain_vae

    with pytest.raises(ValueError, match="lora: without a parent all else would stay random"):
        pretrain_vae.Config(kind="pretrain_vae", dataset="d", lora={"rank": 2})
    assert pretrain_vae.Config(kind="pretrain_vae", dataset="d", parent="vae", lora={"rank": 2}).lora


def test_each_kind_of_training_warms_up_as_its_paper_does() -> None:
    from longtake.training.models.latte import finetune as finetune_latte
    from longtake.training.models.memory import pretrain as pretrain_memory
    from longtake.training.models.pv_vae import pretrain as pretrain_vae

    vae = pretrain_vae.Config(kind="pretrain_vae", dataset="d")
    latte = finetune_latte.Config(kind="finetune_latte", dataset="d", latents="l")
    memory = pretrain_memory.Config(kind="pretrain_memory", dataset="d", latents="l", low_latents="low")
    assert (vae.warmup, latte.warmup, memory.warmup) == (1000, 0, 100)


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


STAGES = pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])


def plainly(steps: int, clip: float = 0.0) -> tuple[list[dict[str, Tensor]], list[dict[str, float]]]:
    """The small training by hand in plain PyTorch: the weights before and after each step, and the gradients' norms."""
    module = small.module()
    optimizer = small.adamw(module)
    weights, norms = [{k: v.clone() for k, v in module.state_dict().items()}], []
    for step in range(steps):
        x = small.rows(step, 4)
        rng = torch.Generator().manual_seed(pass_seed(0, step, 0, 0))
        optimizer.zero_grad()
        small.loss_of(module, x + 0.01 * torch.randn(x.shape, generator=rng)).backward()
        gradients = {k: [p.grad for p in child.parameters()] for k, child in module.named_children() if k != "1"}
        found = {f"/{k}": float(torch.nn.utils.get_total_norm(g)) for k, g in gradients.items()}
        if clip:
            found[""] = float(torch.nn.utils.clip_grad_norm_(module.parameters(), clip))
        else:
            found[""] = float(torch.nn.utils.get_total_norm([g for each in gradients.values() for g in each]))
        norms.append({f"gradient_norm_generator{k}": v for k, v in found.items()})
        optimizer.step()
        weights.append({k: v.clone() for k, v in module.state_dict().items()})
    return weights, norms


def averaged(weights: list[dict[str, Tensor]], half_life: float) -> dict[str, Tensor]:
    """EDM2's average by its definition: each step forgets by the half-life, early on by a tenth of the steps so far."""
    mean = weights[0]
    for step, now in enumerate(weights[1:], 1):
        keep = 2.0 ** (-1 / min(half_life, step / 10))
        mean = {k: keep * mean[k] + (1 - keep) * now[k] for k in now}
    return mean


@STAGES
def test_weights_and_several_averages_are_those_of_plain_pytorch(tmp_path: Path, group: None, zero_stage: int) -> None:
    expected, _ = plainly(30)
    lives = [0.5, 2, 1000]
    settings = {"gradient_clip": 0, "zero_stage": zero_stage}
    raw = small.fit(tmp_path, steps=30, ema_half_lives=lives, checkpoint_every=11, **settings)
    assert small.close(raw, expected[-1])
    for life in lives:
        assert small.close(small.weights(tmp_path, f"{life:g}"), averaged(expected, life)), life
    assert not small.close(small.weights(tmp_path, "0.5"), small.weights(tmp_path, "1000"), atol=1e-4)


@STAGES
def test_without_a_gradient_weights_decay_and_biases_stand_still(tmp_path: Path, group: None, zero_stage: int) -> None:
    made, start = small.objective(starts=0), small.module().state_dict()

    def loss(*arguments: Any) -> tuple[Tensor, dict[str, Tensor]]:
        value, metrics = made.loss(*arguments)
        return 0 * value, metrics

    settings = {"steps": 4, "weight_decay": 0.5, "zero_stage": zero_stage}
    found = small.fit(tmp_path, replace(made, loss=loss), **settings)
    kept = {k: (1 - 1e-2 * 0.5) ** 4 if k.endswith("weight") else 1 for k in start}
    assert small.close(found, {k: kept[k] * v for k, v in start.items()})


def test_of_every_family_linear_and_convolution_weights_decay_and_nothing_else() -> None:
    from longtake.training.engines.lora import attach
    from longtake.training.models.common import patchgan
    from longtake.training.models.latte import model as latte
    from longtake.training.models.memory.dit import MemoryDiT
    from longtake.training.models.memory.dit_config import config_from_preset as memory_config
    from longtake.training.models.pv_vae import model as pv_vae

    changed = pv_vae.PVVAE(pv_vae.config_from_preset("pv_vae_tiny"))
    attach(changed, TrainConfig(lora={"rank": 2, "full": ["decoder.conv_out"]}).lora)  # type: ignore[arg-type]
    known: dict[str, Any] = {"classes": 3, "shape": (3, 4, 4)}
    families = [
        pv_vae.PVVAE(pv_vae.config_from_preset("pv_vae_tiny")),
        changed,
        patchgan.PatchGAN(patchgan.config_from_preset("patchgan_tiny")),
        latte.Latte(latte.config_from_preset("latte_tiny", channels=4, **known)),
        MemoryDiT(memory_config("memory_dit_tiny", channels=4, **known, history=8)),
    ]
    for module in families:
        names = {id(p): name for name, p in module.named_parameters() if p.requires_grad}
        decays, others = (
            [names.pop(id(p)) for p in group["params"]] for group in engines.parameter_groups(module, 0.1)
        )
        still = re.compile(
            r"bias$|norm|\btoken$|class_in|shift$|steps\.[36]\."
        )  # the last are the discriminator's norms
        assert not names, "each parameter is in one group"
        assert not [name for name in decays if still.search(name)]
        assert not [name for name in others if not still.search(name)]


@STAGES
def test_in_bf16_weights_and_averages_are_those_of_the_fp32_masters(
    tmp_path: Path, group: None, zero_stage: int
) -> None:
    made, seen = small.objective(), []

    def loss(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        if zero_stage < 3:
            seen.append({k: v.clone() for k, v in made.modules["generator"].state_dict().items()})
        return made.loss(turn)

    settings = {"zero_stage": zero_stage, "precision": "bf16", "ema_half_lives": [0.5], "checkpoint_every": 1}
    small.fit(tmp_path, replace(made, loss=loss), steps=8, lr=1e-4, keep_checkpoints=99, **settings)
    masters = [small.weights(tmp_path, step=step) for step in range(1, 9)]
    for master, low in zip(masters, seen[1:], strict=False):
        assert all(low[k].dtype == torch.bfloat16 and torch.equal(master[k].bfloat16(), low[k]) for k in master)
    start = {k: v.bfloat16().float() for k, v in small.module().state_dict().items()}
    assert small.close(small.weights(tmp_path, "0.5"), averaged([start, *masters], 0.5))
    rounded = [{k: v.bfloat16().float() for k, v in each.items()} for each in masters]
    assert not small.close(small.weights(tmp_path, "0.5"), averaged([start, *rounded], 0.5), atol=1e-5)


WAYS = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (1, "optimizer"), (2, "optimizer"), (3, "optimizer")]


@pytest.mark.parametrize(("zero_stage", "offload"), WAYS)
def test_in_bf16_gradients_of_many_passes_are_added_up_in_fp32_unless_it_is_asked_for(
    group: None, zero_stage: int, offload: str
) -> None:
    passes, inputs = 64, torch.randn(64, 8, 32, generator=torch.Generator().manual_seed(0)).bfloat16()

    def of(module: Any, x: Tensor) -> Tensor:
        return module(x).float().square().mean()

    def error(precision: str) -> float:
        """Of what AdamW is given, at most; in shares of the largest gradient."""
        torch.manual_seed(0)
        module = nn.Linear(32, 32, bias=False)
        settings = {"batch": 512, "accumulate": passes, "precision": "bf16", "gradient_clip": 0, "lr": 1e-9}
        settings |= {"zero_stage": zero_stage, "offload": offload, "gradient_precision": precision}
        plain = nn.Linear(32, 32, bias=False).bfloat16()
        plain.load_state_dict(module.state_dict())
        engine = engines.engines_of({"x": module}, "x", TrainConfig(**nested(settings)), 1)["x"]
        seen: list[Tensor] = []
        engine.basic_optimizer.register_step_pre_hook(
            lambda optimizer, *_: seen.extend(
                p.grad.flatten().clone() for g in optimizer.param_groups for p in g["params"]
            )
        )
        total = torch.zeros(1024)
        for x in inputs:
            engine.backward(of(engine, x))
            engine.step()
            plain.zero_grad()
            (of(plain, x) / passes).backward()
            assert plain.weight.grad is not None
            total += plain.weight.grad.float().flatten()
        return float((torch.cat(seen)[:1024].float() - total).abs().max() / total.abs().max())

    assert error("fp32") < 1e-6 and error("bf16") > 1e-3


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", [0.0, 0.05])
@STAGES
def test_gradient_norms_and_clipping_are_those_of_plain_pytorch(
    tmp_path: Path, group: None, zero_stage: int, clip: float, precision: str
) -> None:
    weights, norms = plainly(4, clip)
    log = small.Log()
    settings = {"steps": 4, "gradient_clip": clip, "zero_stage": zero_stage, "precision": precision}
    raw = small.fit(tmp_path, log=log, **settings)
    tolerance = 1e-5 if precision == "fp32" else 0.05
    for (_, found), expected in zip(log.rows, norms, strict=True):
        assert {k: v for k, v in found.items() if k.startswith("gradient_norm")} == pytest.approx(
            expected, rel=tolerance
        )
    if precision == "fp32":
        assert small.close(raw, weights[-1])


@STAGES
def test_gradient_norms_are_those_of_all_accumulated_passes(tmp_path: Path, group: None, zero_stage: int) -> None:
    log = small.Log()
    small.fit(tmp_path, log=log, steps=1, batch=8, accumulate=2, zero_stage=zero_stage)
    module = small.module()
    for number in range(2):
        x = small.rows(number, 4)
        rng = torch.Generator().manual_seed(pass_seed(0, 0, number, 0))
        (small.loss_of(module, x + 0.01 * torch.randn(x.shape, generator=rng)) / 2).backward()
    for child in ("0", "2"):
        expected = float(torch.nn.utils.get_total_norm([p.grad for p in module[int(child)].parameters()]))
        assert log.rows[0][1][f"gradient_norm_generator/{child}"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    ("zero_stage", "offload"), [(1, "optimizer"), (2, "optimizer"), (3, "optimizer"), (3, "parameters")]
)
def test_what_is_offloaded_learns_the_same(tmp_path: Path, group: None, zero_stage: int, offload: str) -> None:
    logs = [small.Log(), small.Log()]
    settings = {"zero_stage": zero_stage, "ema_half_lives": [2], "gradient_clip": 0.05}
    here = small.fit(tmp_path / "here", log=logs[0], **settings)
    assert small.close(small.fit(tmp_path / "there", log=logs[1], offload=offload, **settings), here)
    assert small.close(small.weights(tmp_path / "there", "2"), small.weights(tmp_path / "here", "2"))
    for (_, one), (_, two) in zip(logs[0].rows, logs[1].rows, strict=True):
        norms = {k: v for k, v in one.items() if "norm" in k}
        assert {k: v for k, v in two.items() if "norm" in k} == pytest.approx(norms, rel=1e-4)
    small.fit(tmp_path / "resumed", offload=offload, **settings | {"steps": 3})
    resumed = small.fit(tmp_path / "resumed", offload=offload, **settings)
    assert small.same(resumed, small.weights(tmp_path / "there"))


@STAGES
def test_an_engine_that_starts_later_stands_still_until_then_and_resumes_exactly(
    tmp_path: Path, group: None, zero_stage: int
) -> None:
    made, before = small.objective(starts=4), []

    def loss(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        held = [f.value.clone() for f in engines.fragments(turn.engines["adversary"])]
        before.append((turn.name, held))
        return made.loss(turn)

    log = small.Log()
    settings = {"zero_stage": zero_stage, "checkpoint_every": 1, "keep_checkpoints": 99}
    small.fit(tmp_path / "a", replace(made, loss=loss), log=log, **settings)
    assert [name for name, _ in before] == ["generator"] * 4 + ["generator", "adversary"] * 2
    held = [torch.cat(values) for _, values in before]
    assert all(torch.equal(held[0], each) for each in held[:6]) and not torch.allclose(held[0], held[6], atol=1e-3)
    assert ["gradient_norm_adversary" in m for _, m in log.rows] == [False] * 4 + [True] * 2

    def end(folder: Path, steps: int) -> list[float]:
        log = small.Log()
        small.fit(folder, small.objective(starts=4), log=log, **settings | {"steps": steps})
        return [m.get("adversary", 0.0) for _, m in log.rows]

    assert end(tmp_path / "b", 3) + end(tmp_path / "b", 5) + end(tmp_path / "b", 6) == [
        m.get("adversary", 0.0) for _, m in log.rows
    ]
    assert small.same(small.weights(tmp_path / "a"), small.weights(tmp_path / "b"))


class Counted(nn.Module):
    """A layer that counts how often what was compiled of it, or its like, runs."""

    runs = 0

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.layer(x))

    def compile(self, **_: Any) -> None:
        super().compile(backend=self.counting)

    @staticmethod
    def counting(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(*inputs: Any) -> Any:
            Counted.runs += 1
            return graph(*inputs)

        return run


@pytest.mark.parametrize("order", [[0, 1, 2], [2, 0, 1]])
def test_every_block_runs_compiled_whatever_shapes_come_first(tmp_path: Path, group: None, order: list[int]) -> None:
    torch._dynamo.reset()
    blocks = [Counted(width) for width in range(2, 14)]
    module = nn.ModuleList([nn.Linear(small.WIDTH, sum(range(2, 14))), *blocks])
    shapes = [(4,), (4, 1), (4, 1, 1)]

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = module

        def forward(self, x: Tensor) -> Tensor:
            first, *rest = self.parts
            pieces = first(x).split(list(range(2, 14)), dim=-1)
            return torch.cat([block(piece) for block, piece in zip(rest, pieces, strict=True)], dim=-1)

    def loss(turn: Turn) -> tuple[Tensor, dict[str, Tensor]]:
        value = turn.engines[turn.name](turn.batch["x"]).square().mean()
        return value, {"loss": value.detach()}

    class Shapes(small.Rows):  # type: ignore[misc]
        def __iter__(self) -> Any:
            for number, batch in enumerate(super().__iter__()):
                yield batch | {"x": batch["x"].view(*shapes[order[number % 3]], small.WIDTH)}

    Counted.runs = 0
    made = Objective({"model": Whole()}, loss, blocks=blocks)
    # as torch has them, and again after
    with torch._dynamo.config.patch(recompile_limit=8, accumulated_recompile_limit=256):
        small.fit(tmp_path, made, Shapes(), steps=9, compile=True)
    # a shape's first step is run as it is, to count its operations
    assert Counted.runs == len(blocks) * (9 - len(shapes))


@STAGES
def test_convolutions_with_channels_last_learn_the_same(
    tmp_path: Path, group: None, zero_stage: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    plain = small.fit(tmp_path / "plain", small.objective("clip"), zero_stage=zero_stage)
    made, seen = small.objective("clip"), list[bool]()
    made.modules["generator"].second.register_forward_hook(
        lambda _, inputs, out: seen.extend(
            x.is_contiguous(memory_format=torch.channels_last_3d) for x in (*inputs, out)
        )
    )
    turned = small.fit(tmp_path / "turned", made, zero_stage=zero_stage, channels_last=True, cudnn_benchmark=True)
    assert all(seen) and torch.backends.cudnn.benchmark
    assert small.close(plain, turned)


def heldout_by_hand(weights: dict[str, Tensor], clips: int, dtype: torch.dtype) -> float:
    module = small.module("noisy").to(dtype).eval()
    module.load_state_dict(weights)
    losses = []
    for number in range(clips):
        seed = int(np.random.SeedSequence([0, number]).generate_state(1, np.uint64)[0] >> 1)
        x = small.rows(1000 + number, 1)
        noisy = x + 0.01 * torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        losses.append(float(small.loss_of(module, noisy, dtype)))
    return float(np.mean(losses))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@STAGES
def test_the_loss_of_heldout_clips_is_that_of_the_average_and_leaves_no_trace(
    tmp_path: Path, group: None, zero_stage: int, precision: str
) -> None:
    settings = {"zero_stage": zero_stage, "precision": precision, "ema_half_lives": [2, 50], "keep_checkpoints": 9}
    settings |= {"checkpoint_every": 1, "sample_every": 0, "lr": 1e-2}
    plain = small.fit(tmp_path / "plain", small.objective("noisy"), **settings)
    log = small.Log()
    own = settings | {"heldout_every": 2, "heldout_clips": 3}
    looked = small.fit(tmp_path / "looked", small.objective("noisy", heldout=5), log=log, **own)
    assert small.same(plain, looked) and small.same(*(small.weights(tmp_path / f, "2") for f in ("plain", "looked")))
    found = {step: row["heldout/loss"] for step, row in log.rows if "heldout/loss" in row}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    expected = {s: heldout_by_hand(small.weights(tmp_path / "looked", "2", s), 3, dtype) for s in (2, 4, 6)}
    assert found == pytest.approx(expected, rel=1e-5) and len(set(found.values())) == 3
    # and over a stop
    again = small.Log()
    small.fit(tmp_path / "stopped", small.objective("noisy", heldout=5), log=again, **own | {"steps": 3})
    resumed = small.fit(tmp_path / "stopped", small.objective("noisy", heldout=5), log=again, **own)
    assert small.same(plain, resumed)
    assert found.items() <= {step: row["heldout/loss"] for step, row in again.rows if "heldout/loss" in row}.items()


@pytest.mark.slow
@STAGES
def test_a_compiled_module_learns_the_same_under_the_same_names(tmp_path: Path, group: None, zero_stage: int) -> None:
    torch._dynamo.reset()
    logs = [small.Log(), small.Log()]
    plain = small.fit(tmp_path / "plain", log=logs[0], zero_stage=zero_stage)
    made = small.objective()
    blocks = list(made.modules["generator"])
    compiled = small.fit(
        tmp_path / "compiled",
        replace(made, blocks=blocks),
        log=logs[1],
        zero_stage=zero_stage,
        compile=True,
    )
    for (_, one), (_, two) in zip(logs[0].rows, logs[1].rows, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], abs=1e-4) and two["tflops"] > 0
    assert compiled.keys() == plain.keys() and small.close(compiled, plain, atol=1e-4)


def test_what_only_says_how_the_work_is_done_may_change_in_the_middle_of_a_run() -> None:
    before = TrainConfig(steps=10)
    run = {"workers": 4, "cache": {"folder": "/x", "max_bytes": 1}, "log_every": 1, "checkpoint_every": 7}
    after = TrainConfig(steps=10, run=run)
    assert content(before) == content(after) != content(TrainConfig(steps=11))


def test_a_video_model_resumes_bit_for_bit(dataset: str, tmp_path: Path, group: None) -> None:
    from longtake.training.models.pv_vae import pretrain as pretrain_vae

    def fit(folder: Path, stop: Callable[[], bool] = lambda: False) -> dict[str, Tensor]:
        settings: dict[str, Any] = {
            "model": {"preset": "pv_vae_tiny"},
            "frames": 9,
            "sizes": [[32, 32]],
            "steps": 6,
            "batch": 2,
        }
        settings |= {"lambda_gan": 0.1, "gan_start": 1, "gan_warmup": 1, "discriminator": {"preset": "patchgan_tiny"}}
        config = pretrain_vae.Config(
            kind="pretrain_vae", dataset=dataset, run={"sample_every": 0, "workers": 0}, **settings
        )
        torch.manual_seed(0)
        setup = pretrain_vae.Setup({"dataset": dataset}, pretrain_vae.begin(config, {}), None)
        made = replace(pretrain_vae.objective(config, setup), heldout=list(islice(iter(loader(dataset)), 2)))
        train(made, loader(dataset), config, folder, log, stop)
        return checkpoint.trained(folder, config)

    def kept(folder: Path) -> dict[str, Any]:
        return checkpoint.beside(folder, "discriminator")[1]

    log = small.Log()
    straight, asked = fit(tmp_path / "a"), iter(range(9))
    # held-out clips have no opponent
    names = {name for _, row in log.rows for name in row if name.startswith("heldout/")}
    assert {"heldout/loss", "heldout/reconstruction", "heldout/kl"} <= names and "heldout/gan" not in names
    with pytest.raises(Interrupted):
        fit(tmp_path / "b", lambda: next(asked) == 3)
    assert kept(tmp_path / "b")["gan_squares"][1] > 0, "the discriminator is heard before the stop"
    assert same(straight, fit(tmp_path / "b"))
    assert kept(tmp_path / "a") == kept(tmp_path / "b")
