"""Optimizers beside plain AdamW. Muon: what it moves, that it is torch's, that it resumes; a fused AdamW is AdamW."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.stage import content
from longtake.training import engines
from longtake.training.config import TrainConfig
from longtake.training.engines.muon import matrices_of


class Blocks(nn.Module):
    """Rows through two blocks between an input and an output layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = small.WIDTH
        self.first, self.last = nn.Linear(width, 8), nn.Linear(8, width)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)) for _ in range(2))

    def blocks(self) -> Any:
        yield from self.layers

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x.to(self.first.weight.dtype))
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        out: Tensor = self.last(x)
        return out


def config(**changes: Any) -> TrainConfig:
    settings = {"optimizer": "muon", "batch": 4, "lr": 1e-2, "ema_half_lives": [], "gradient_clip": 0.0}
    return TrainConfig(**settings | changes)


def steps(engine: Any, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        x = small.rows(number, 4)
        engine.backward((engine(x).float() - x).square().mean())
        engine.step()


def test_the_linear_weights_of_blocks_are_its_matrices() -> None:
    model = Blocks()
    weights = [layer[0].weight for layer in model.layers]  # type: ignore[index]
    assert [id(p) for p in matrices_of(model)] == [id(p) for p in weights]
    weights[0].requires_grad_(False)
    assert [id(p) for p in matrices_of(model)] == [id(weights[1])]
    assert not matrices_of(nn.Linear(2, 2))


def test_matrices_move_as_torchs_muon_moves_them_and_all_else_as_adamw(group: None) -> None:
    made, bare = Blocks(), Blocks()
    engine = engines.engines_of({"model": made}, "model", config(weight_decay=0.1), 1)["model"]
    steps(engine, 3)
    matrices = matrices_of(bare)
    others = [p for p in bare.parameters() if all(p is not matrix for matrix in matrices)]
    decaying = [bare.first.weight, bare.last.weight]
    groups = [
        {"params": decaying, "weight_decay": 0.1},
        {"params": [p for p in others if all(p is not d for d in decaying)], "weight_decay": 0.0},
    ]
    muon = torch.optim.Muon(matrices, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = torch.optim.AdamW(groups, lr=1e-2)
    for number in range(3):
        x = small.rows(number, 4)
        (bare(x) - x).square().mean().backward()
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(made.parameters(), bare.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=0, atol=0)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_before_its_first_update_an_engine_has_moved_nothing(group: None, optimizer: str) -> None:
    model = Blocks()
    before = {name: p.detach().bfloat16().float() for name, p in model.named_parameters()}
    chosen = config(optimizer=optimizer, precision="bf16", weight_decay=0.5)
    engine = engines.engines_of({"model": model}, "model", chosen, 1)["model"]
    assert {group["lr"] for group in engine.optimizer.param_groups} == {chosen.lr}
    assert all(torch.equal(each.value.view(each.shape), before[each.name]) for each in engines.fragments(engine))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_from_a_checkpoint_it_goes_on_bit_for_bit(group: None, tmp_path: Path, precision: str) -> None:
    made = [engines.engines_of({"model": Blocks()}, "model", config(precision=precision), 1)["model"] for _ in range(2)]
    steps(made[0], 2)
    made[0].save_checkpoint(str(tmp_path), tag="half")
    made[1].load_checkpoint(str(tmp_path), tag="half")
    for engine in made:
        steps(engine, 2, start=2)
    weights = [[p.detach() for p in engine.module.parameters()] for engine in made]
    begun = [p.detach() for p in Blocks().to(made[0].module.first.weight.dtype).parameters()]
    assert all(torch.equal(one, two) for one, two in zip(*weights, strict=True))
    assert not any(torch.equal(one, two) for one, two in zip(weights[0], begun, strict=True) if one.ndim == 2)


@pytest.mark.parametrize(
    ("zero_stage", "precision"), [(0, "fp32"), (1, "fp32"), (2, "fp32"), (3, "fp32"), (0, "bf16"), (2, "bf16")]
)
def test_a_fused_adamw_is_adamw_and_goes_on_bit_for_bit(
    group: None, tmp_path: Path, zero_stage: int, precision: str
) -> None:
    def engine(fused: bool) -> Any:
        # gradients are larger: they are clipped
        settings = {"optimizer": "adamw", "fused_optimizer": fused, "gradient_clip": 0.05}
        settings |= {"zero_stage": zero_stage, "precision": precision}
        return engines.engines_of({"model": Blocks()}, "model", config(**settings), 1)["model"]

    def weights(engine: Any) -> list[Tensor]:
        return [p.ds_tensor if zero_stage == 3 else p.detach() for p in engine.module.parameters()]  # type: ignore[attr-defined]

    plain, fused, resumed = engine(False), engine(True), engine(True)
    assert all(group["fused"] for group in fused.basic_optimizer.param_groups)
    steps(plain, 4)
    steps(fused, 2)
    fused.save_checkpoint(str(tmp_path), tag="half")
    resumed.load_checkpoint(str(tmp_path), tag="half")
    for each in (fused, resumed):
        steps(each, 2, start=2)
    assert all(torch.equal(one, two) for one, two in zip(weights(fused), weights(resumed), strict=True))
    # last bits differ, of bf16 in its precision
    relative, absolute = (1e-4, 1e-6) if precision == "fp32" else (1e-2, 1e-3)
    for one, two in zip(weights(plain), weights(fused), strict=True):
        torch.testing.assert_close(one, two, rtol=relative, atol=absolute)
    norms = [float(engines.gradient_norm(each)) for each in (plain, fused)]
    assert norms[0] > 0.05 and norms[1] == pytest.approx(norms[0], rel=relative)


def test_null_is_one_kernel_where_states_are_on_a_gpu() -> None:
    assert config(optimizer="adamw").fused(on_gpu=True) and not config(optimizer="adamw").fused(on_gpu=False)
    offloaded = config(optimizer="adamw", zero_stage=1, offload="optimizer")
    assert not offloaded.fused(on_gpu=True)
    for chosen in (True, False):
        assert config(fused_optimizer=chosen).fused(on_gpu=not chosen) is chosen


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_checkpoint_goes_on_with_the_other_kernel(
    group: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    calls, kernel = list[int](), torch._fused_adamw_
    monkeypatch.setattr(torch, "_fused_adamw_", lambda *a, **k: calls.append(1) or kernel(*a, **k))

    def trained(folder: str, steps: int, gpu: bool, **settings: Any) -> tuple[dict[str, Tensor], bool]:
        calls.clear()
        # as by default where the device is a GPU, and where it is none
        monkeypatch.setattr(TrainConfig, "fused", lambda self, on_gpu: gpu)
        return small.fit(tmp_path / folder, steps=steps, zero_stage=zero_stage, **settings), bool(calls)

    straight, fused = trained("straight", 9, gpu=False)
    assert not fused
    for steps, gpu in ((3, False), (6, True), (9, False)):
        moved, fused = trained("moved", steps, gpu, **({} if gpu else {"fused_optimizer": False}))
        assert fused == gpu
    assert small.close(moved, straight, atol=1e-4)


def test_null_and_false_are_the_same_settings() -> None:
    assert all("fused_optimizer" not in content(config(fused_optimizer=value)) for value in (None, False))
    assert content(config(fused_optimizer=True))["fused_optimizer"] is True


def test_what_muon_is_not_for_is_refused(group: None) -> None:
    with pytest.raises(ValueError, match="optimizer: muon needs zero_stage: 0"):
        config(zero_stage=1)
    with pytest.raises(ValueError, match="optimizer: muon moves whole matrices"):
        config(lora={"rank": 2})
    with pytest.raises(UserError, match=r"^optimizer: muon is for the linear layers of a model's blocks"):
        engines.engines_of({"model": nn.Linear(4, 4)}, "model", config(), 1)
