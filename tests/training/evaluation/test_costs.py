"""Speed and memory: what is counted, of models of each kind, and in which circumstances."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import judged
import numpy as np
import pytest
import torch
from materials import Fixed, loaded, suite

from longtake.datasets.errors import UserError
from longtake.training.evaluation import bootstrap, peak, work
from longtake.training.evaluation.measures import load, speed

pytestmark = pytest.mark.usefixtures("one_thread")

SMALL = suite(clips={"frames": 10, "size": (32, 32)}, videos=({"frames": 8},), gaps={"frames": 4}, seconds=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return judged.models(tmp_path_factory.mktemp("models"))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("vae", [("encoded", 9, "32x32"), ("decoded", 9, "32x32")]),
        ("vqgan", [("encoded", 8, "32x32"), ("decoded", 8, "32x32")]),
        ("latte", [("made", 13, "32x32 at 12 fps, in 2 steps")]),
        ("mavin", [("filled", 4, "32x32, in 2 steps")]),
        ("holder", [("retrieved", 21, "32x32, in 2 steps")]),
    ],
)
def test_each_kind_of_model_does_what_it_does_for_as_long_as_the_suite_says(
    models: Path, name: str, expected: list[tuple[str, int, str]]
) -> None:
    works = list(work.of(loaded(models / name), SMALL))
    assert [(each.name, each.frames, each.told) for each in works] == expected
    found = load("speed").run(loaded(models / name), Fixed(SMALL))
    assert found.pooled.keys() == {f"speed_{each.name}" for each in works}
    for pooled in found.pooled.values():
        assert pooled.value > 0 and len(pooled.replicates) == SMALL.resamples and pooled.units == 5
    assert set(found.pooled) <= set(load("speed").figures)


def test_what_is_not_counted_comes_first_and_the_median_decides(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    times, calls = iter([9.0, 0.5, 0.25, 4.0, 0.5, 0.5]), []
    job = work.Work("made", 8, lambda: calls.append(1), "x")
    monkeypatch.setattr(work, "of", lambda *_: iter([job]))
    monkeypatch.setattr(speed, "_seconds", lambda call: (call(), next(times))[1])
    found = load("speed").run(loaded(models / "vae"), Fixed(SMALL))
    assert len(calls) == 6 and found.pooled["speed_made"].value == 16
    replicates = np.array(found.pooled["speed_made"].replicates)
    assert np.unique(np.round(replicates / replicates.max(), 6)).tolist() == [2 / 32, 16 / 32, 1]
    assert replicates.mean() == pytest.approx(16)
    assert found.notes == ["made: 8 frames of x"]


def test_the_speed_of_a_busy_machine_has_no_bound_below_zero() -> None:
    pooled = speed.rate(8, [8.0, 8.0, 8.0, 0.1, 0.1], SMALL)
    low, high = bootstrap.of_replicates(*pooled)
    assert low is not None and high is not None
    assert 0 < low <= pooled.value == 1 < high


def test_speed_and_memory_are_those_of_a_machine_and_of_what_is_asked_for() -> None:
    for name in ("speed", "memory"):
        conditions = load(name).conditions
        assert conditions(SMALL).keys() >= {"machine", "device", "threads", "videos"}
        assert conditions(SMALL) == conditions(SMALL.model_copy(update={"resamples": 200}))
        longer = SMALL.model_copy(update={"videos": (SMALL.videos[0].model_copy(update={"frames": 32}),)})
        assert conditions(longer) != conditions(SMALL)


def test_a_model_takes_as_much_memory_as_its_own_process_and_a_larger_clip_more(models: Path) -> None:
    # what this process has does not count
    here = torch.zeros(1 << 27)
    here += 1
    found = load("memory").run(loaded(models / "vae"), Fixed(SMALL))
    value, before = found.pooled["memory_gb"].value, float(found.notes[0].split()[0])
    assert 0.05 < before < value < before + 0.5
    assert found.pooled["memory_gb"].units == 1 and not found.pooled["memory_gb"].replicates
    large = suite(clips={"frames": 33, "size": (256, 256)})
    assert peak.measured(str(models / "vae"), large).most / 1e9 - value > 33 * 256 * 256 * 3 * 4 / 1e9


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA\nis full"), MemoryError()])
def test_a_memory_that_is_too_small_is_one_line_of_the_other_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception
) -> None:
    def full(uri: str) -> None:
        raise error

    monkeypatch.setattr(peak, "load", full)
    monkeypatch.setattr(sys, "argv", ["peak", "vae"])
    monkeypatch.setattr(sys, "stdin", io.StringIO(SMALL.model_dump_json()))
    assert peak.main() == 2
    said = f"memory: vae: {type(error).__name__}, as where memory runs out; make suite.clips or suite.videos smaller\n"
    assert capsys.readouterr().err == said


def test_what_a_model_refuses_is_said_in_one_line_from_the_other_process(models: Path) -> None:
    odd = suite(clips={"frames": 9, "size": (30, 32)})
    with pytest.raises(UserError, match=r"^clips: size: 30x32; .* takes sides in multiples of 16$"):
        peak.measured(str(models / "vae"), odd)
