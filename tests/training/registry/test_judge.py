"""Priors measured on held-out clips, so that two of them can be compared: by the same clips, noise, times and units."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import latent_stages
import pytest
import torch
from torch import nn

from longtake.datasets import latents as column
from longtake.datasets.errors import UserError
from longtake.training.models.latte import model as lattes
from longtake.training.models.latte.model import Latte
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import config_from_preset
from longtake.training.registry import disk, judge
from longtake.training.registry.gate import Gate

pytestmark = pytest.mark.usefixtures("one_thread")

GATE = Gate(metrics={"loss": {"better": "lower"}}, samples=4)  # type: ignore[dict-item]


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Read them, do not change them."""
    return dict(latent_stages.inputs(tmp_path_factory.mktemp("judge"), dataset, join=0.0))


def awake(model: nn.Module, seed: int = 0) -> nn.Module:
    rng = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1, generator=rng)
    return model.eval()


def statistics(inputs: dict[str, str], times: float = 1.0, field: str = "latents") -> tuple[torch.Tensor, torch.Tensor]:
    made = column.read_latents(inputs[field])
    return torch.tensor(made.mean), times * torch.tensor(made.std)


def judged(folder: Path, inputs: dict[str, str], model: Any, **changes: Any) -> judge.Judged:
    """A model as its training stage would have registered it."""
    made = column.read_latents(inputs["latents"])
    facts = {
        "lineage": {},
        "vae": {"uri": "vae", "encoder": made.encoder["digest"]},
        "classes": ["a", "b"] if model.config.classes else [],
        "window": {"frames": 9, "size": [32, 32], "fps": 12.0},
    }
    if isinstance(model, MemoryDiT):
        facts |= {"history": {"seconds": 2.0, "steps": 6}, "stage": "generation"}
    kind = "latte" if isinstance(model, Latte) else "memory_dit"
    disk.save(folder, kind, model.config.model_dump(mode="json"), model.state_dict(), facts | changes)
    return judge.load(str(folder))


def latte(inputs: dict[str, str], seed: int = 0, times: float = 1.0, **changes: Any) -> Latte:
    config = {"depth": 2, "width": 32, "heads": 2, "channels": 8, "shape": (3, 2, 2)}
    model = awake(Latte(lattes.config_from_preset("latte_tiny", **config | changes)), seed)
    assert isinstance(model, Latte)
    model.set_statistics(*statistics(inputs, times))
    return model


def memory(inputs: dict[str, str], **changes: Any) -> MemoryDiT:
    config = {**latent_stages.TINY, "channels": 8, "shape": (3, 2, 2), "history": 6} | changes
    model = awake(MemoryDiT(config_from_preset(**config)))
    assert isinstance(model, MemoryDiT)
    low = statistics(inputs, field="low_latents") if model.config.shrink else ()
    model.set_statistics(*statistics(inputs), *low)
    return model


def losses(rows: Any) -> dict[str, float]:
    return {key: found["loss"] for (_, key), found in rows.items()}


def test_two_priors_see_the_same_and_the_same_prior_gives_the_same(inputs: dict[str, str], tmp_path: Path) -> None:
    one, two = judged(tmp_path / "a", inputs, latte(inputs)), judged(tmp_path / "b", inputs, latte(inputs, seed=1))
    ours, theirs = judge.rows_of(one, two, inputs, GATE)
    assert theirs and ours.keys() == theirs.keys() and len(ours) == 4 and losses(ours) != losses(theirs)
    assert all(key.startswith(f"{source}-") for source, key in ours)
    again, _ = judge.rows_of(one, None, inputs, GATE)
    assert again == ours
    fewer, _ = judge.rows_of(one, None, inputs, GATE.model_copy(update={"samples": 2}))
    assert fewer.items() <= ours.items(), "a clip's figures do not depend on how many others there are"
    other, _ = judge.rows_of(one, None, inputs, GATE.model_copy(update={"seed": 1}))
    assert set(losses(other).values()).isdisjoint(losses(ours).values())


def test_a_prior_gains_nothing_by_normalising_to_smaller_numbers(inputs: dict[str, str], tmp_path: Path) -> None:
    """One that always says 0 is wrong by the latents themselves and by noise of their size."""

    def mute(times: float) -> Latte:
        model = latte(inputs, times=times)
        for parameter in model.parameters():
            nn.init.zeros_(parameter)
        return model

    small, true = judged(tmp_path / "a", inputs, mute(1000.0)), judged(tmp_path / "b", inputs, mute(1.0))
    ours, theirs = judge.rows_of(small, true, inputs, GATE)
    assert theirs and min(losses(ours).values()) > 100 * max(losses(theirs).values())
    alone, _ = judge.rows_of(small, None, inputs, GATE)
    assert max(losses(alone).values()) < min(losses(theirs).values()), (
        "without the champion's units it would seem better"
    )


def test_labels_are_told_by_their_names(inputs: dict[str, str], tmp_path: Path) -> None:
    """A dataset's numbers move when it gets more classes; the model keeps its own."""
    model = latte(inputs, classes=2)
    known, _ = judge.rows_of(judged(tmp_path / "a", inputs, model), None, inputs, GATE)
    turned, _ = judge.rows_of(judged(tmp_path / "b", inputs, model, classes=["b", "a"]), None, inputs, GATE)
    strange, _ = judge.rows_of(judged(tmp_path / "c", inputs, model, classes=["x", "y"]), None, inputs, GATE)
    free, _ = judge.rows_of(judged(tmp_path / "d", inputs, model, classes=[]), None, inputs, GATE)
    assert losses(known) != losses(turned) and losses(strange) == losses(free) != losses(known)


@pytest.mark.parametrize("stage", ["generation", "retrieval"])
@pytest.mark.parametrize("changes", [{}, {"branches": "high"}])
def test_a_model_with_a_memory_is_measured_by_what_it_does(
    inputs: dict[str, str], tmp_path: Path, stage: str, changes: dict[str, Any]
) -> None:
    one = judged(tmp_path / "a", inputs, memory(inputs, **changes), stage=stage)
    ours, theirs = judge.rows_of(one, one, inputs, GATE)
    assert ours == theirs and len(ours) == 4 and all(0 < loss < 1e6 for loss in losses(ours).values())
    other = judged(tmp_path / "b", inputs, memory(inputs, **changes), stage="generation")
    same, _ = judge.rows_of(other, None, inputs, GATE)
    assert (losses(same) == losses(ours)) == (stage == "generation")


def test_a_memory_with_one_branch_and_one_with_two_compare(inputs: dict[str, str], tmp_path: Path) -> None:
    both, high = memory(inputs), memory(inputs, branches="high")
    ours, theirs = judge.rows_of(
        judged(tmp_path / "a", inputs, both), judged(tmp_path / "b", inputs, high), inputs, GATE
    )
    assert theirs and ours.keys() == theirs.keys()


def test_what_does_not_compare_is_one_line(inputs: dict[str, str], tmp_path: Path) -> None:
    prior, model = judged(tmp_path / "prior", inputs, latte(inputs)), memory(inputs)
    goes_on = judged(tmp_path / "goes_on", inputs, model)
    retrieves = judged(tmp_path / "retrieves", inputs, model, stage="retrieval")
    foreign = judged(tmp_path / "foreign", inputs, latte(inputs), vae={"uri": "x", "encoder": "other"})
    longer = judged(tmp_path / "longer", inputs, latte(inputs), window={"frames": 13})
    nothing = judged(tmp_path / "nothing", inputs, latte(inputs), window={})
    for candidate, champion, given, told in (
        (retrieves, goes_on, inputs, "register them by different names"),
        (foreign, prior, inputs, "has learned latents of another autoencoder than"),
        (foreign, None, inputs, "are of another autoencoder than"),
        (longer, prior, inputs, r"was made for frames 13, its champion for 9; .* window: \{frames: 13\}"),
        (nothing, None, inputs, "has no window; give the gate one"),
        (prior, None, {"dataset": inputs["dataset"]}, "latents: .* has learned latents; name what"),
        (
            goes_on,
            None,
            {k: v for k, v in inputs.items() if k != "low_latents"},
            "low_latents: .* needs those with shrink",
        ),
        (goes_on, None, inputs | {"low_latents": inputs["latents"]}, "low_latents: are shrunk by 1x1"),
    ):
        with pytest.raises(UserError, match=told) as e:
            judge.rows_of(candidate, champion, given, GATE)
        assert "\n" not in str(e.value)
    for window, told in (
        ({"size": (32, 32)}, "sees latents"),
        ({"history_least": 1.0}, "has no memory"),
        ({"frames": 8}, "frames: 8"),
    ):
        asked = Gate(metrics=GATE.metrics, window=window)  # type: ignore[arg-type]
        with pytest.raises(UserError, match=told):
            judge.rows_of(prior, None, inputs, asked)
    with pytest.raises(UserError, match="unknown metric psnr_all; this model has loss"):
        judge.rows_of(prior, None, inputs, Gate(metrics={"psnr_all": {"better": "higher"}}))  # type: ignore[dict-item]
