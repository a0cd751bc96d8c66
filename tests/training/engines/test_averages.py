"""Averages of weights at every ZeRO stage: they follow the weights where those are, and hold on to nothing else."""

from typing import Any

import pytest
import small
import torch
from torch import nn

from longtake.training import engines
from longtake.training.config import TrainConfig
from longtake.training.engines import ema


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_averages_follow_the_weights_and_keep_no_history(
    group: None, monkeypatch: pytest.MonkeyPatch, zero_stage: int
) -> None:
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3

    # as on a GPU, where DeepSpeed hands out copies of weights that are offloaded to the host
    whole = DeepSpeedZeroOptimizer_Stage3.get_local_fp32_param
    monkeypatch.setattr(
        DeepSpeedZeroOptimizer_Stage3, "get_local_fp32_param", lambda *args, **kw: whole(*args, **kw).clone()
    )
    torch.manual_seed(0)
    config = TrainConfig(batch=4, lr=1e-2, zero_stage=zero_stage, gradient_clip=0.0)
    engine: Any = engines.engines_of({"model": nn.Linear(small.WIDTH, small.WIDTH)}, "model", config, 1)["model"]
    averages, weights = ema.begin(engine, [2.0]), ema.weights_of(engine)
    (average,) = averages.values()
    begun, expected = [value.clone() for value in weights], [value.clone() for value in average.values()]

    for number in range(4):
        x = small.rows(number, 4)
        engine.backward((engine(x) - x).square().mean())
        engine.step()
        ema.move(averages, weights, number + 1)
        keep = 0.5 ** (1 / min(2.0, (number + 1) / 10))
        now = [f.value for f in engines.fragments(engine) if f.learns]
        expected = [keep * one + (1 - keep) * two for one, two in zip(expected, now, strict=True)]

    for before, wanted, value in zip(begun, expected, average.values(), strict=True):
        torch.testing.assert_close(value, wanted)
        assert not torch.equal(value, before)
        # else each step would add to what autograd remembers
        assert not value.requires_grad
