"""A gate by the figures of an evaluation: both models from its results, and one line where they do not compare."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from evaluated import kept, model, result

from longtake.datasets.errors import Failure, UserError
from longtake.training.registry import evaluated, store
from longtake.training.registry.gate import Gate

NEW, OLD = "models:/latte/2", "models:/latte/1"
MODELS = [model("models:/latte@candidate", "a", NEW), model("models:/latte@champion", "b", OLD)]
NOISE = np.random.default_rng(0).normal(size=12)


def gate(name: str = "psnr", better: str = "higher", gain: float = 0.0, **more: Any) -> Gate:
    return Gate(**{"metrics": {name: {"better": better, "gain": gain}}, "resamples": 200} | more)


def distances(value: float, shift: float = 3.0) -> tuple[float, list[float]]:
    """A Fréchet distance and its replicates, which lie higher; two models' move together."""
    return value, [value + shift + float(noise) for noise in np.random.default_rng(1).normal(size=200)]


def test_rows_of_both_are_paired_by_source(tmp_path: Path) -> None:
    """The sources differ far more than the models do."""
    ours, theirs = 30 + 5 * NOISE + 0.5, 30 + 5 * NOISE
    kept(tmp_path, MODELS, [result("psnr", "higher", "a", ours), result("psnr", "higher", "b", theirs)])
    found = evaluated.verdict(str(tmp_path), NEW, OLD, gate(gain=0.4))
    assert found.promoted and found.sources == 12 and found.gains["psnr"].low == pytest.approx(0.5)
    assert found.candidate["psnr"] - found.champion["psnr"] == pytest.approx(0.5)
    assert not evaluated.verdict(str(tmp_path), NEW, OLD, gate(gain=0.6)).promoted
    assert not evaluated.verdict(str(tmp_path), OLD, NEW, gate()).promoted


def test_figures_of_all_together_are_paired_by_their_resamples(tmp_path: Path) -> None:
    """Their replicates lie higher than the distance itself, which says nothing about the models."""
    results = [result("fvd", "lower", "a", distances(100.0, 9.0)), result("fvd", "lower", "b", distances(101.0))]
    kept(tmp_path, MODELS, results)
    found = evaluated.verdict(str(tmp_path), NEW, OLD, gate("fvd", "lower", 0.9))
    assert found.promoted and found.gains["fvd"].gain == 1.0
    assert found.gains["fvd"].low == pytest.approx(1.0) == found.gains["fvd"].high, "both had the same resamples"
    assert not evaluated.verdict(str(tmp_path), OLD, NEW, gate("fvd", "lower")).promoted


def test_the_error_of_a_distance_decides(tmp_path: Path) -> None:
    """Replicates that vary by 1 leave a gain of 1 in doubt, one of 4 not."""
    theirs = np.random.default_rng(2).normal(103, 1, size=200)
    for value, promoted in ((102.0, False), (99.0, True)):
        ours = (value, (value + np.random.default_rng(3).normal(size=200)).tolist())
        results = [result("fvd", "lower", "a", ours), result("fvd", "lower", "b", (103.0, theirs.tolist()))]
        kept(tmp_path, MODELS, results)
        found = evaluated.verdict(str(tmp_path), NEW, OLD, gate("fvd", "lower"))
        assert found.promoted is promoted and found.gains["fvd"].high - found.gains["fvd"].low == pytest.approx(
            4.9, abs=1
        )


def test_resamples_without_a_figure_do_not_count(tmp_path: Path) -> None:
    """And what no resample says anything about is not promoted by a bound that is no number."""
    value, found = distances(100.0)
    some, none = [*found[:100], *[float("nan")] * 60], [float("nan")] * 200
    for replicates, known in ((some, True), (none, False)):
        results = [result("fvd", "lower", "a", (value, replicates)), result("fvd", "lower", "b", distances(101.0))]
        kept(tmp_path, MODELS, results)
        if known:
            verdict = evaluated.verdict(str(tmp_path), NEW, OLD, gate("fvd", "lower", 0.9))
            assert verdict.promoted and verdict.gains["fvd"].low == pytest.approx(1.0)
        else:
            with pytest.raises(UserError, match="does not know its error"):
                evaluated.verdict(str(tmp_path), NEW, OLD, gate("fvd", "lower", 0.9))


def test_one_gate_may_have_figures_of_several_measures(tmp_path: Path) -> None:
    results = [result("fvd", "lower", letter, distances(90.0 + n)) for n, letter in enumerate("ab")]
    results += [result("psnr", "higher", letter, 30 + NOISE[: 9 + n]) for n, letter in enumerate("ab")]
    kept(tmp_path, MODELS, results)
    asked = gate("fvd", "lower", must_not_regress={"reconstruction.psnr": {"better": "higher", "tolerance": 0.1}})
    with pytest.raises(UserError, match=r"unknown metric reconstruction.psnr; this model has fvd, psnr"):
        evaluated.verdict(str(tmp_path), NEW, OLD, asked)
    asked = gate("fvd", "lower", must_not_regress={"psnr.psnr": {"better": "higher", "tolerance": 0.1}})
    found = evaluated.verdict(str(tmp_path), NEW, OLD, asked)
    assert found.promoted and found.sources == 9 and found.figures()["gain.psnr.psnr"] == pytest.approx(0, abs=1e-9)


def test_a_first_model_passes_where_it_was_measured(tmp_path: Path) -> None:
    kept(tmp_path, MODELS[:1], [result("fvd", "lower", "a", distances(90.0))])
    found = evaluated.verdict(str(tmp_path), NEW, None, gate("fvd", "lower"))
    assert found.promoted and found.candidate == {"fvd": 90.0} and not found.champion
    assert not evaluated.verdict(str(tmp_path), NEW, None, gate("fvd", "lower", least_sources=13)).promoted


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (gate("fid"), "unknown metric fid; this model has memory, psnr"),
        (gate("psnr", "lower"), "psnr: better: lower: of this metric the higher"),
        (
            gate("fvd", "lower"),
            "has it of models:/latte/2, but not of the champion models:/latte/1: 8 videos are too few",
        ),
        (gate("loss", "lower"), r"unknown metric loss; this model has memory, psnr"),
        (gate("memory", "lower"), "memory: .* does not know its error"),
        (gate(samples=8), "samples: the evaluation has its own clips; leave it out"),
        (gate(window={"frames": 9}), "window: the evaluation has its own clips"),
    ],
)
def test_what_does_not_compare_is_one_line(tmp_path: Path, asked: Gate, told: str) -> None:
    results = [result("psnr", "higher", letter, 30 + NOISE) for letter in "ab"]
    results += [result("memory", "lower", letter, (1.0, [])) for letter in "ab"]
    results += [result("fvd", "lower", "a", distances(90.0))]
    results += [result("loss", "lower", letter, NOISE, frames=n) for n, letter in enumerate("ab")]  # on other clips
    why = [{"model": 64 * "b", "measure": "fvd", "why": "8 videos are too few"}]
    kept(tmp_path, MODELS, results, left_out=why)
    with pytest.raises(UserError, match=told) as e:
        evaluated.verdict(str(tmp_path), NEW, OLD, asked)
    assert "\n" not in str(e.value)


def test_a_champion_that_was_not_evaluated_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {NEW: "new", OLD: "old", "models:/latte/3": "old", "models:/latte/4": "other"}
    monkeypatch.setattr(store, "resolve", lambda uri: {"uri": uri, "sha256": weights[uri]})
    kept(tmp_path, MODELS, [result("psnr", "higher", letter, 30 + NOISE) for letter in "ab"])
    with pytest.raises(
        UserError,
        match=r"the champion models:/latte/4 was not evaluated in .*, which has models:/latte/2, models:/latte/1; run",
    ):
        evaluated.verdict(str(tmp_path), NEW, "models:/latte/4", gate())
    assert evaluated.verdict(str(tmp_path), NEW, "models:/latte/3", gate()).sources == 12, "the same weights"


def test_a_folder_without_an_evaluation_or_its_results(tmp_path: Path) -> None:
    for place in (str(tmp_path), "s3://lab/evaluation"):
        with pytest.raises(UserError, match=r"has no evaluation.json; name the folder of `longtake evaluate --out`"):
            evaluated.verdict(place, NEW, OLD, gate())
    kept(tmp_path, MODELS, [result("psnr", "higher", letter, 30 + NOISE) for letter in "ab"])
    path = next((tmp_path / "results").glob("b*/psnr-*.json"))
    path.write_text("{")
    with pytest.raises(Failure, match="damaged"):
        evaluated.verdict(str(tmp_path), NEW, OLD, gate())
    path.unlink()
    with pytest.raises(Failure, match="is gone; run the same `longtake evaluate` again"):
        evaluated.verdict(str(tmp_path), NEW, OLD, gate())
