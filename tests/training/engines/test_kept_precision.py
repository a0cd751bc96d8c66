"""What a module keeps in fp32 beside bf16 is kept by an engine too: at every ZeRO stage, exactly, learning or frozen."""

from pathlib import Path
from typing import Any

import pytest
import small
import torch
from torch import Tensor, nn

from longtake.training import engines
from longtake.training.config import TrainConfig


class Kept(nn.Sequential):
    """Two layers, and between them a norm that stays fp32."""

    holds_fp32 = True

    def keep_fp32(self) -> dict[str, Tensor]:
        return {name: p for name, p in self.named_parameters() if self.holds_fp32 and name.startswith("1.")}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        held = {id(p) for p in self.keep_fp32().values()}
        return super()._apply(lambda t: t.to(fn(t).device, torch.float32) if id(t) in held else fn(t), recurse)

    def forward(self, x: Tensor) -> Tensor:
        normed: Tensor = self[1](self[0](x).to(self[1].weight.dtype))
        return self[2](normed.to(self[2].weight.dtype))  # type: ignore[no-any-return]


def module() -> Kept:
    torch.manual_seed(0)
    made = Kept(nn.Linear(small.WIDTH, 8), nn.LayerNorm(8), nn.Linear(8, small.WIDTH))
    # numbers that bf16 has not
    nn.init.normal_(made[1].weight, 1.0, 0.1)
    return made


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
@pytest.mark.parametrize("freeze", [(), ("1",)], ids=["learning", "frozen"])
def test_an_engine_keeps_in_fp32_what_its_module_keeps(group: None, zero_stage: int, freeze: tuple[str, ...]) -> None:
    made = module()
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    config = TrainConfig(precision="bf16", zero_stage=zero_stage, batch=4, lr=1e-2, freeze=freeze)
    engine = engines.engines_of({"model": made}, "model", config, 1)["model"]
    held = {fragment.name: fragment.value.clone() for fragment in engines.fragments(engine)}
    stored = {name: (p.ds_tensor if zero_stage == 3 else p).dtype for name, p in made.named_parameters()}
    # ZeRO-3 cuts all that learns from one buffer of one type
    kept = zero_stage < 3 or bool(freeze)
    assert stored["0.weight"] == torch.bfloat16 and held["0.weight"].dtype == torch.float32
    assert stored["1.weight"] == (torch.float32 if kept else torch.bfloat16) and held["1.weight"].dtype == torch.float32
    assert torch.equal(held["1.weight"], before["1.weight"]) == kept
    assert not torch.equal(held["0.weight"].flatten(), before["0.weight"].flatten())

    losses = []
    for number in range(20):
        loss = small.loss_of(engine, small.rows(0, 4), torch.bfloat16)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
        assert number or not engines.left_out(engine)
    assert losses[-1] < 0.8 * losses[0]
    learned = {fragment.name: fragment.value for fragment in engines.fragments(engine)}
    assert torch.equal(learned["1.weight"], held["1.weight"]) == bool(freeze)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_a_training_that_was_stopped_goes_on_with_the_same_weights(
    tmp_path: Path, group: None, zero_stage: int
) -> None:
    def made() -> Any:
        objective = small.objective()
        objective.modules["generator"] = module()
        return objective

    settings = {"precision": "bf16", "zero_stage": zero_stage, "ema_half_lives": [5]}
    whole = small.fit(tmp_path / "whole", made(), **settings)
    small.fit(tmp_path / "parts", made(), **settings | {"steps": 3})
    assert small.same(small.fit(tmp_path / "parts", made(), **settings), whole)
    average = small.weights(tmp_path / "whole", "5")
    assert {value.dtype for value in average.values()} == {torch.float32}
    assert not torch.equal(whole["1.weight"], module()[1].weight)
