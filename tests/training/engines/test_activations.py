"""What the backward pass needs, on the host: the same gradients, and little left on the device."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training.config import TrainConfig
from longtake.training.engines.activations import offloaded, on_host
from longtake.training.objective import Objective

WIDTH = 512
ROWS = 1024  # rows of 2 MiB: more than what stays where it is


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))


def loss(made: nn.Module, turn: Any) -> tuple[Tensor, dict[str, Tensor]]:
    value = made(turn).square().mean()
    return value, {}


def test_gradients_are_the_same_and_weights_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    x, gradients, copies = torch.randn(ROWS, WIDTH), [], list[tuple[int, ...]]()
    empty_like = torch.empty_like

    def counted(t: Tensor, **options: Any) -> Tensor:
        copies.append(tuple(t.shape))
        return empty_like(t, **options)

    monkeypatch.setattr(torch, "empty_like", counted)
    for moved in (False, True):
        made = model()

        def plain(turn: Any, made: nn.Module = made) -> tuple[Tensor, dict[str, Tensor]]:
            return loss(made, turn)

        value, _ = (on_host(plain, {"model": made}) if moved else plain)(x)
        assert bool(copies) == moved
        value.backward()
        gradients.append([p.grad for p in made.parameters()])
    assert set(copies) == {(ROWS, WIDTH)}
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_without_a_gpu_and_at_zero_3_it_is_refused() -> None:
    objective = Objective({"model": model()}, lambda turn: (torch.zeros(()), {}))
    assert offloaded(objective, TrainConfig()) is objective
    with pytest.raises(UserError, match=r"^offload_activations: this training is in the host's memory already"):
        offloaded(objective, TrainConfig(offload_activations=True))
    with pytest.raises(ValueError, match="offload_activations needs zero_stage 0 to 2"):
        TrainConfig(offload_activations=True, zero_stage=3)
