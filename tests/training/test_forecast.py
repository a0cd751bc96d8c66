"""What a training says of its memory before anything is there."""

import re
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from longtake.training import fit, forecast, remedies, stage, tracker
from longtake.training.models.latte import finetune
from longtake.training.models.latte.model import Latte, config_from_preset

LINE = (
    r"memory: [\d.e-]+ GB of [\d.]+ GB of the memory that is free at the largest batch \(.*activations .*\); told in "
)
SETTINGS: dict[str, Any] = {
    "kind": "finetune_latte",
    "dataset": "data",
    "size": [32, 32],
    "frames": 5,
    "model": {"preset": "latte_tiny", "depth": 2, "patch": 8},
    "batch": 8,
    "steps": 1,
    "ema_half_lives": [5],
    "run": {"workers": 0},
}


def config(**changes: Any) -> finetune.Config:
    return finetune.Config(**SETTINGS | changes)


def test_the_first_line_of_a_training_is_its_memory(
    tmp_path: Path, dataset: str, group: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # without a run
    monkeypatch.setattr(tracker, "connect", lambda folder: nullcontext())
    parts = ("Config", "prepare", "loader", "objective", "largest", "announce")
    alone = SimpleNamespace(**{name: getattr(finetune, name) for name in parts}, evaluate=lambda *_: None)
    for _ in range(2):
        stage.work(alone, config(), {"dataset": dataset}, tmp_path)
    said = capfd.readouterr().out.splitlines()
    assert said[0].startswith("memory: ")
    # a finished one says nothing
    assert sum(line.startswith("memory: ") for line in said) == 1


def test_it_foresees_what_a_plan_computes(dataset: str, group: None, capfd: pytest.CaptureFixture[str]) -> None:
    found = {"dataset": fit.Source(None, None, dataset, {})}
    foreseen = forecast.announce(finetune, config(), {"dataset": dataset})
    planned = fit.memory_of(fit.trace_of(finetune, config(), found, 1), config(), 1, on_gpu=False)
    assert foreseen == planned.total
    latte = Latte(config_from_preset("latte_tiny", depth=2, channels=3, patch=8, shape=(5, 32, 32)))
    assert planned.weights == sum(t.nbytes for t in (*latte.parameters(), *latte.buffers()))
    assert (line := capfd.readouterr().out).count("\n") == 1
    assert re.match(LINE, line)


def test_what_does_not_fit_says_the_smallest_change(
    dataset: str, group: None, capfd: pytest.CaptureFixture[str]
) -> None:
    foreseen = forecast.announce(finetune, config(), {"dataset": dataset})
    assert foreseen
    for share, says in (
        (0.95, "does NOT fit; model.activation_checkpointing: 0.25 makes it"),
        (1e-3, "whatever is changed"),
    ):
        capfd.readouterr()
        there = forecast.Device(share * foreseen / fit.USABLE, "the device")
        forecast.announce(finetune, config(), {"dataset": dataset}, there)
        assert says in capfd.readouterr().out


@pytest.mark.parametrize("on_gpu", [True, False])
def test_offloading_saves_the_memory_of_a_gpu_alone(dataset: str, group: None, on_gpu: bool) -> None:
    planned = remedies.Planned(finetune, config(), {"dataset": fit.Source(None, None, dataset, {})}, on_gpu=on_gpu)
    offloaded, kept = (planned.fit(config(zero_stage=1, offload=to)).total for to in ("optimizer", "none"))
    assert (offloaded < kept) == on_gpu
    changes = set[str]()
    for share in (0.9, 0.7, 0.5, 0.4, 0.3, 0.2):
        remedy = planned.remedy(share * planned.fit().total)
        changes |= set(remedy.changes if remedy else ())
    assert any("offload" in change for change in changes) == on_gpu


def test_changes_that_cannot_be_tried_are_not_called_useless(
    dataset: str, group: None, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def remedy(*_: Any) -> Any:
        raise RuntimeError("no such operation")

    monkeypatch.setattr(remedies.Planned, "remedy", remedy)
    assert forecast.announce(finetune, config(), {"dataset": dataset}, forecast.Device(1e3, "the device"))
    said = capfd.readouterr().out
    assert "does NOT fit; what would make it fit is not known (RuntimeError: no such operation)" in said


def test_what_a_trace_cannot_follow_trains_all_the_same(
    dataset: str, group: None, capfd: pytest.CaptureFixture[str]
) -> None:
    def largest(*_: Any) -> Any:
        raise RuntimeError("no such\noperation")

    for alone in (SimpleNamespace(), SimpleNamespace(largest=largest)):
        assert forecast.announce(alone, config(), {"dataset": dataset}) is None
    first, second = capfd.readouterr().out.splitlines()
    assert first.startswith("memory: not known (a finetune_latte stage cannot say before it runs)")
    assert second.startswith("memory: not known (RuntimeError: no such operation)")
