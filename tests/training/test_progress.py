"""What a training tells of itself."""

import gzip
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small
import torch
from torch import Tensor, nn

from longtake.training import progress as watch
from longtake.training.models.common.causal import ResBlock


def mlp_flops(rows: int, width: int = 32, hidden: int = 8) -> int:
    """Two matrix products forward; backward one each for the weights, and one for the second layer's input."""
    product = 2 * rows * width * hidden
    return 2 * product + 3 * product


def test_a_logged_step_says_what_it_took(tmp_path: Path, group: None) -> None:
    log = small.Log()
    small.fit(tmp_path, log=log, steps=6, log_every=3, peak_tflops=0.001)
    assert [step for step, _ in log.rows] == [3, 6]
    for _, found in log.rows:
        named = {
            "loss",
            "learning_rate",
            "gradient_norm_generator",
            "gradient_norm_generator/0",
            "gradient_norm_generator/2",
        }
        named |= {"host_memory_gb", "updates_left_out", "data_wait_share"}
        assert named <= found.keys()
        parts = [found[f"seconds_{part}"] for part in ("data", "forward", "backward", "update")]
        assert all(part > 0 for part in parts) and sum(parts) <= found["seconds_per_step"]
        assert found["samples_per_second"] == pytest.approx(4 / found["seconds_per_step"])
        assert found["tokens_per_second"] == pytest.approx(4 * 32 / found["seconds_per_step"])
        assert found["tflops"] == pytest.approx(mlp_flops(4) / found["seconds_per_step"] / 1e12)
        assert found["mfu"] == pytest.approx(found["tflops"] / 0.001)
        assert 0.05 < found["host_memory_gb"] < 64


def test_the_shares_of_the_time_add_up_and_what_is_no_step_is_among_them(tmp_path: Path, group: None) -> None:
    log = small.Log()
    made = replace(small.objective(heldout=2), sample=lambda *_: {"one": np.zeros((1, 2, 2, 3), np.uint8)})
    small.fit(tmp_path, made, log=log, steps=6, log_every=3, checkpoint_every=2, sample_every=1, heldout_every=1)
    figures = [found for _, found in log.rows if "seconds_elapsed" in found]
    assert len(figures) == 2
    for found in figures:
        parts = {name.removeprefix("share/"): value for name, value in found.items() if name.startswith("share/")}
        assert {"compute", "data", "exchange", "checkpoint", "sample", "heldout", "log", "other"} == parts.keys()
        assert sum(parts.values()) == pytest.approx(1) and all(value > 0 for value in parts.values())
        computed = sum(found[f"seconds_{name}"] for name in ("forward", "backward", "update"))
        assert parts["compute"] == pytest.approx(3 * computed / found["seconds_elapsed"])
        assert parts["checkpoint"] == pytest.approx(3 * found["seconds_checkpoint"] / found["seconds_elapsed"])
        assert found["seconds_elapsed"] > 3 * found["seconds_per_step"]  # samples and held-out clips are no steps


def test_every_accumulated_pass_counts(tmp_path: Path, group: None) -> None:
    log = small.Log()
    small.fit(tmp_path, log=log, steps=2, batch=8, accumulate=2)
    for _, found in log.rows:
        assert found["samples_per_second"] == pytest.approx(8 / found["seconds_per_step"])
        assert found["tokens_per_second"] == pytest.approx(8 * 32 / found["seconds_per_step"])
        assert found["tflops"] == pytest.approx(mlp_flops(8) / found["seconds_per_step"] / 1e12)


def counted(module: nn.Module, x: Tensor) -> tuple[float, float]:
    """(forward, backward)"""
    flops = watch.Flops()
    with flops.counting("k", "forward"):
        loss = module(x).square().mean()
    forward = flops.of("k")
    with flops.counting("k", "backward"):
        loss.backward()
    with flops.counting("k", "forward"):  # known now, so not counted again
        module(x)
    return forward, flops.of("k") - forward


def test_operations_are_counted_as_the_closed_form_says() -> None:
    layer = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))
    forward, backward = counted(layer, torch.randn(7, 10))
    assert forward == 2 * 7 * (10 * 20 + 20 * 5)
    assert backward == 2 * 7 * (10 * 20 + 2 * 20 * 5)  # the input needs no gradient


def test_what_activation_checkpointing_computes_again_does_not_count() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 4, 4, requires_grad=True)
    plain, again = ResBlock(8), ResBlock(8, checkpointing=True)
    assert counted(plain, x) == counted(again, x)
    assert counted(plain, x)[1] == 2 * counted(plain, x)[0] > 0


@pytest.mark.slow
def test_a_compiled_block_counts_as_it_is() -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(10, 20), nn.Tanh(), nn.Linear(20, 5))
    block.compile()
    x = torch.randn(7, 10)
    block(x)
    assert counted(block, x) == (2 * 7 * 300, 2 * 7 * 400)


def test_the_profiler_records_the_steps_asked_for(tmp_path: Path, group: None) -> None:
    log = small.Log()
    small.fit(tmp_path, log=log, profile=(2, 4))
    ((folder, name),) = log.folders
    assert folder == tmp_path / "profile" and name == "profile"
    assert "aten::addmm" in (folder / "operators.txt").read_text()
    events = json.loads(gzip.decompress((folder / "trace.json.gz").read_bytes()))["traceEvents"]
    steps = [e for e in events if e.get("name", "").startswith("Optimizer.step#AdamW")]
    assert len(steps) == 3


def test_a_profile_that_would_end_after_the_training_ends_with_it(tmp_path: Path, group: None) -> None:
    log = small.Log()
    small.fit(tmp_path, log=log, steps=3, profile=(2, 50))
    assert len(log.folders) == 1 and (tmp_path / "profile" / "trace.json.gz").exists()


@pytest.mark.parametrize("zero_stage", [0, 3])
def test_sample_videos_do_not_change_what_is_learned(tmp_path: Path, group: None, zero_stage: int) -> None:
    def sampled(every: int, folder: Path) -> tuple[dict[str, Tensor], Any]:
        made = small.objective("noisy")
        resting = made.modules["generator"][1] = nn.Sequential(nn.Dropout(0.2), nn.Dropout(0.5).eval())
        modes = []

        def sample(engines: Any, rng: torch.Generator) -> dict[str, np.ndarray]:
            modes.append(any(m.training for m in engines["generator"].module.modules()))
            x = torch.randn(4, small.WIDTH, generator=rng)
            torch.rand(3)
            pixels = engines["generator"].module(x).sigmoid().mul(255).byte()
            return {"dream": pixels.view(4, 4, 8, 1).expand(-1, -1, -1, 3).numpy()}

        log = small.Log()
        learned = small.fit(folder, replace(made, sample=sample), log=log, sample_every=every, zero_stage=zero_stage)
        assert not any(modes) and not resting[1].training and resting[0].training
        return learned, log

    without, silent = sampled(0, tmp_path / "a")
    learned, log = sampled(2, tmp_path / "b")
    assert small.same(without, learned) and not silent.videos
    assert [(step, name) for step, name, _ in log.videos] == [(2, "dream"), (4, "dream"), (6, "dream")]
    first, second = (video for _, _, video in log.videos[:2])
    assert first.shape == (4, 4, 8, 3) and first.dtype == np.uint8 and (first != second).any()


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA L40", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_the_peak_of_a_known_gpu_is_known(monkeypatch: pytest.MonkeyPatch, name: str, expected: int | None) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert watch.peak_flops(None) == (expected and expected * 1e12)
    assert watch.peak_flops(5.0) == 5e12


def test_a_mean_leaves_out_what_is_not_finite_and_knows_when_nothing_is() -> None:
    rows = [{"a": 1.0, "b": torch.tensor(float("nan"))}, {"a": float("inf")}, {"a": torch.tensor(3.0), "c": 5}]
    found = watch.means(rows)
    assert found["a"] == 2 and np.isnan(found["b"]) and found["c"] == 5
