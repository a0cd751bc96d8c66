"""`pretrain_vae`: batches of several sizes."""

from pathlib import Path
from typing import Any

import pytest

from longtake.datasets.errors import UserError
from longtake.training import checkpoint
from longtake.training.loop import train
from longtake.training.models.pv_vae import pretrain


def settings(dataset: str, steps: int) -> pretrain.Config:
    run: Any = {"workers": 0, "checkpoint_every": 1}
    return pretrain.Config(
        kind="pretrain_vae", phase="image", dataset=dataset, model={"preset": "pv_vae_tiny"}, lambda_gan=0.0,
        sizes=((16, 16), (32, 32)), batch=6, steps=steps, ema_half_lives=(), run=run,
    )  # fmt: skip


@pytest.mark.usefixtures("group")
def test_a_training_of_several_sizes_goes_on_with_its_batches_on_other_processes(dataset: str, tmp_path: Path) -> None:
    def fit(steps: int, world: int) -> list[int]:
        config = settings(dataset, steps)
        setup = pretrain.prepare(config, {"dataset": dataset}, tmp_path)
        loader = pretrain.loader(config, setup, 0, world)
        train(pretrain.objective(config, setup), loader, config, tmp_path)
        return list(loader.state_dict()["batch"])

    # as the first of three processes, then alone, which would begin with batches of 6 and 1
    assert fit(1, 3) == fit(2, 1) == fit(3, 3) == [6, 3]
    assert checkpoint.meta(tmp_path / "step-00000003")["loader"]["taken"] == 3
    with pytest.raises(
        UserError, match=r"batches of 6, 3 windows, which do not divide among 2 processes; .* divides 3"
    ):
        fit(4, 2)
