"""Ranks that share windows learn what one rank learns with them: at every ZeRO stage that may, stopped and split anew."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import latent_stages
import measured
import pytest
import shared_windows
import spoken
import tats_stages
import torch
import yaml
from flat import nested
from pydantic import ValidationError

from longtake.datasets.errors import UserError
from longtake.training import engines, fit
from longtake.training.config import TrainConfig
from longtake.training.models.latte import finetune as finetune_latte
from longtake.training.models.latte.model import Latte, config_from_preset
from longtake.training.models.pv_vae.pretrain import Config as VAEConfig

COMMON: dict[str, Any] = {
    "dataset": "dataset",
    "steps": 3,
    # keys have no gradient of their bias but rounding, which Adam makes a step as large as others
    "lr": 1e-4,
    "workers": 0,
    "log_every": 1,
    "checkpoint_every": 2,
    "sample_every": 3,
    "heldout_every": 3,
    "ema_half_lives": [2],
}
LATTE: dict[str, Any] = COMMON | {
    "kind": "finetune_latte",
    "size": [24, 24],  # 9 positions, which do not divide
    "frames": 3,
    "stride": 4,
    "model": {
        "preset": "latte_tiny",
        "depth": 2,
        "width": 32,
        "heads": 4,
        "patch": 8,
        "activation_checkpointing": True,
    },
    "classes": True,
    "batch": 4,
    "accumulate": 2,
    "sample_steps": 1,
}
REMEMBERED: dict[str, Any] = COMMON | {
    "latents": "latents",
    "low_latents": "low_latents",
    "model": latent_stages.TINY | {"heads": 4},
    "frames": 9,
    "history_seconds": 2.0,
    "batch": 2,
    "sample_steps": 1,
}
MEMORY: dict[str, Any] = REMEMBERED | {"kind": "finetune_memory_prior", "no_history": 0.3}
RETRIEVAL: dict[str, Any] = REMEMBERED | {"kind": "pretrain_memory"}
TATS: dict[str, Any] = COMMON | {
    "kind": "pretrain_tats",
    "tokens": "tokens",
    "model": tats_stages.TINY | {"heads": 4},
    "batch": 2,
}
STAGES = {
    "latte": ("latte.finetune", LATTE),
    "told": ("latte.finetune", LATTE | {"text": "text"}),
    "memory": ("memory.finetune", MEMORY),
    "retrieval": ("memory.pretrain", RETRIEVAL),
    "tats": ("tats.train", TATS),
}

Trained = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="module")
def inputs(dataset: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    latents = latent_stages.inputs(tmp_path_factory.mktemp("latents"), dataset)
    tokens = tats_stages.inputs(tmp_path_factory.mktemp("tokens"), dataset)
    text = spoken.column(tmp_path_factory.mktemp("text"), latents["dataset"])
    return {
        "latte": {"dataset": latents["dataset"]},
        "told": {"dataset": latents["dataset"], "text": text},
        "memory": latents,
        "retrieval": latents,
        "tats": {name: tokens[name] for name in ("dataset", "tokens")},
    }


@pytest.fixture(scope="module")
def train(inputs: Any, tmp_path_factory: pytest.TempPathFactory, module_ranks: Any) -> Trained:
    """Trains a family on `world` ranks, `sequence` to a window; returns what each says. The same is not done twice."""
    started: dict[int, Any] = {}
    answers: dict[Any, list[dict[str, Any]]] = {}

    def of(family: str, world: int, sequence: int, folder: Path | None = None, **changes: Any) -> list[dict[str, Any]]:
        key = (family, world, sequence, folder, *sorted(changes.items()))
        if key not in answers:
            if world not in started:
                started[world] = module_ranks(world, Path(shared_windows.__file__).read_text())
            stage, settings = STAGES[family]
            settings = settings | {"launcher": {"sequence": sequence}} | changes
            where = folder or tmp_path_factory.mktemp(family) / "checkpoints"
            job = {"stage": stage, "settings": settings, "inputs": inputs[family], "folder": str(where)}
            started[world].send(job)
            answers[key] = list(started[world].answers())
        return answers[key]

    return of


def difference(one: Any, other: Any) -> float:
    return float((torch.tensor(one).double() - torch.tensor(other).double()).abs().max())


def assert_same(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """What the first ranks of two trainings say is the same, but for rounding."""
    one, other = expected[0], found[0]
    for kind, weights in one["weights"].items():
        assert weights.keys() == other["weights"][kind].keys()
        for name, value in weights.items():
            assert difference(value, other["weights"][kind][name]) < 1e-5, (kind, name)
    assert [step for step, _ in one["rows"]] == [step for step, _ in other["rows"]]
    for (_, before), (step, now) in zip(one["rows"], other["rows"], strict=True):
        assert before.keys() == now.keys()
        for name, value in before.items():
            if name.split("/")[0].startswith(("loss", "heldout", "gradient_norm")):
                assert now[name] == pytest.approx(value, rel=1e-4, abs=1e-6), (step, name)
    # pixels, of which rounding may move one
    assert one["videos"].keys() == other["videos"].keys() and one["videos"]
    assert all(difference(video, other["videos"][name]) <= 1 for name, video in one["videos"].items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, world, sequence, zero_stage",
    [
        ("latte", 2, 2, 0),
        ("latte", 4, 4, 1),
        ("latte", 4, 2, 2),
        ("told", 2, 2, 1),
        ("memory", 2, 2, 1),
        ("memory", 4, 4, 2),
        ("retrieval", 2, 2, 2),
        ("tats", 4, 4, 0),
        ("tats", 2, 2, 2),
    ],
)
def test_ranks_that_share_windows_learn_what_fewer_ranks_learn(
    train: Trained, family: str, world: int, sequence: int, zero_stage: int
) -> None:
    groups = world // sequence
    expected = train(family, groups, 1)
    found = train(family, world, sequence, zero_stage=zero_stage)
    assert_same(found, expected)

    # the ranks of a group read the same windows, and each window counts once
    assert [each["keys"] for each in found] == [expected[rank // sequence]["keys"] for rank in range(world)]
    settings = STAGES[family][1]
    assert len(found[0]["keys"]) == settings["steps"] * settings.get("accumulate", 1)
    for _, row in found[0]["rows"]:
        if "samples_per_second" in row:
            assert row["samples_per_second"] * row["seconds_per_step"] == pytest.approx(settings["batch"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "family, splits", [("latte", ((2, 2, 1), (1, 1, 2), (4, 4, 3))), ("tats", ((2, 2, 1), (4, 4, 3)))]
)
def test_a_training_goes_on_with_another_number_of_ranks_to_a_window(
    train: Trained, tmp_path: Path, family: str, splits: tuple[tuple[int, int, int], ...]
) -> None:
    expected = train(family, 1, 1)
    keys = []
    for world, sequence, steps in splits:
        found = train(family, world, sequence, tmp_path / "checkpoints", zero_stage=1, steps=steps)
        keys += found[0]["keys"]
    assert keys == expected[0]["keys"]
    for kind, weights in expected[0]["weights"].items():
        for name, value in weights.items():
            assert difference(value, found[0]["weights"][kind][name]) < 1e-5, (kind, name)


def refusal(**changes: Any) -> str:
    with pytest.raises(ValidationError) as caught:
        finetune_latte.Config(**nested(LATTE | changes))
    return caught.value.errors()[0]["msg"].removeprefix("Value error, ")


def test_what_cannot_be_shared_is_refused_in_a_line() -> None:
    torchrun = {"by": "torchrun", "processes": 6, "sequence": 4}
    assert refusal(launcher=torchrun) == "sequence 4 does not divide the 6 processes"
    assert refusal(launcher={"sequence": 2}, zero_stage=3) == "run.launcher.sequence 2 needs zero_stage 0 to 2, not 3"
    with pytest.raises(
        ValidationError, match=r"run\.launcher\.sequence 2: pretrain_vae has no window that processes can"
    ):
        VAEConfig(kind="pretrain_vae", dataset="dataset", run={"launcher": {"sequence": 2}})  # type: ignore[call-arg]

    config = TrainConfig(**nested({"launcher": {"sequence": 3}, "batch": 4}))
    with pytest.raises(UserError, match=r"run\.launcher\.sequence: 3 processes to a window, but there are 4"):
        engines.deepspeed_config(config, 4)
    with pytest.raises(UserError, match="batch: 4 does not divide among 3 groups of 3 processes x accumulate 1"):
        engines.deepspeed_config(config, 9)
    latte = Latte(config_from_preset("latte_tiny"))
    with pytest.raises(UserError, match=r"run\.launcher\.sequence: 3 does not divide the model's 4 heads"):
        engines.pretend_to_share([latte], config)
    with pytest.raises(UserError, match="a Linear cannot be shared among processes; leave it out"):
        engines.pretend_to_share([torch.nn.Linear(2, 2)], config)


def test_a_plan_counts_what_one_process_of_a_window_takes(tmp_path: Path) -> None:
    def activations(sequence: int) -> int:
        training = {"kind": "finetune_latte", "dataset": "shards", "batch": 1, "size": [64, 64], "frames": 9}
        training |= {"model": {"preset": "latte_tiny", "patch": 4}, "run": {"launcher": {"sequence": sequence}}}
        shards = {"kind": "shard", "sources": ["/videos"], "clip": {"short_side": 64, "fps": 8}}
        path = tmp_path / f"{sequence}.yaml"
        stages = {"shards": shards, "training": training}
        path.write_text(yaml.safe_dump({"name": "r", "workspace": str(tmp_path / "ws"), "stages": stages}))
        source = measured.source_of(str(path), "training")
        traced = fit.trace_of(source.stage, source.config, source.inputs, sequence)
        return max(traced.points.values())

    alone, shared = activations(1), activations(4)
    assert alone / 5 < shared < alone / 2.5
