"""The gate: what a candidate must show over held-out sources, and with what confidence."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from longtake.datasets.errors import UserError
from longtake.training.registry.gate import Gate, bootstrap, decide

BETTER: Any = {"psnr": "higher", "loss": "lower"}


def gate(**changes: Any) -> Gate:
    known = {"metrics": {"psnr": {"better": "higher", "gain": 0.1}}, "resamples": 100, "least_sources": 4}
    return Gate(**known | changes)


def rows(values: list[float], metric: str = "psnr", clips: int = 2) -> dict[tuple[str, str], dict[str, float]]:
    """Some clips of each source, whose mean is the value."""
    off = [0.0] if clips == 1 else list(np.linspace(-1, 1, clips))
    return {
        (f"s{n:03d}", f"s{n:03d}-{m}"): {metric: value + 3 * off[m]}
        for n, value in enumerate(values)
        for m in range(clips)
    }


figures = st.lists(st.floats(-40, 40), min_size=4, max_size=12)


@given(figures, st.floats(0.11, 5))
@settings(max_examples=30)
def test_a_constant_gain_above_the_threshold_is_promoted_and_below_it_kept(values: list[float], gain: float) -> None:
    more = [value + gain for value in values]
    found = decide(gate(), BETTER, rows(more), rows(values))
    assert found.promoted and found.gains["psnr"].low == pytest.approx(gain, abs=1e-9)
    kept = decide(gate(metrics={"psnr": {"better": "higher", "gain": gain + 0.01}}), BETTER, rows(more), rows(values))
    assert not kept.promoted and "the gate asks for" in kept.reason
    assert not decide(gate(), BETTER, rows(values), rows(more)).promoted


@given(figures, st.floats(0.11, 5))
@settings(max_examples=30)
def test_where_lower_is_better_a_lower_figure_is_a_gain(values: list[float], gain: float) -> None:
    lower = rows([value - gain for value in values], "loss")
    asked = gate(metrics={"loss": {"better": "lower", "gain": 0.1}})
    found = decide(asked, BETTER, lower, rows(values, "loss"))
    assert found.promoted and found.gains["loss"].gain == pytest.approx(gain, abs=1e-9)
    assert not decide(asked, BETTER, rows(values, "loss"), lower).promoted


@given(figures, st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_the_order_of_the_clips_does_not_matter_and_the_same_seed_gives_the_same(
    values: list[float], random: Any
) -> None:
    noise = np.random.default_rng(1).normal(size=len(values))
    ours, theirs = rows([v + float(n) for v, n in zip(values, noise, strict=True)]), rows(values)
    mixed = list(ours.items())
    random.shuffle(mixed)
    one, two = decide(gate(), BETTER, ours, theirs), decide(gate(), BETTER, dict(mixed), theirs)
    assert one == two
    other = decide(gate(seed=1), BETTER, ours, theirs).gains["psnr"]
    assert other.gain == one.gains["psnr"].gain and other.low != one.gains["psnr"].low


def test_sources_count_not_clips() -> None:
    """Many clips of one good source are one piece of evidence."""
    base = rows([0.0] * 5, clips=1)
    ours = {place: {"psnr": -1.0} for place in base}
    for n in range(100):
        base["many", f"many-{n}"] = {"psnr": 0.0}
        ours["many", f"many-{n}"] = {"psnr": 50.0}
    found = decide(gate(), BETTER, ours, base)
    assert found.sources == 6 and found.gains["psnr"].gain == pytest.approx((50 - 5) / 6)
    assert not found.promoted


def test_only_clips_that_both_were_measured_on_count() -> None:
    ours, theirs = rows([5.0] * 6), rows([4.0] * 7)
    theirs["s006", "s006-0"] = {"psnr": 1000.0}
    del ours["s000", "s000-0"], theirs["s001", "s001-1"]
    found = decide(gate(), BETTER, ours, theirs)
    assert found.sources == 6 and found.gains["psnr"].gain == pytest.approx(1.0) and found.promoted


@pytest.mark.parametrize("count", [8, 30])
def test_the_true_gain_is_within_a_bound_as_often_as_it_says(count: int) -> None:
    draws, trials = np.random.default_rng(1), 800
    found = [bootstrap(draws.normal(1.0, 2.0, (count, 1)), 0.95, 1000, seed)[0] for seed in range(trials)]
    for name, held in (("low", [each.low <= 1.0 for each in found]), ("high", [each.high >= 1.0 for each in found])):
        assert 0.93 < np.mean(held) < 0.97, f"{name}: {np.mean(held):.3f}"


def test_a_regression_beyond_the_tolerance_keeps_a_candidate_that_gains() -> None:
    asked = gate(must_not_regress={"loss": {"better": "lower", "tolerance": 0.5}})
    champion = {place: {"psnr": 10.0, "loss": 1.0} for place in rows([0.0] * 6)}
    for loss, passes in ((1.4, True), (1.6, False), (0.1, True)):
        ours = {place: {"psnr": 11.0, "loss": loss} for place in champion}
        found = decide(asked, BETTER, ours, champion)
        assert found.promoted == passes, found.reason
        assert passes or found.reason.startswith("loss -0.6"), found.reason


def test_the_figures_are_all_told() -> None:
    found = decide(gate(), BETTER, rows([3.0, 4.0, 5.0, 6.0]), rows([2.0, 3.0, 4.0, 5.0])).figures()
    assert found == pytest.approx(
        {
            "candidate.psnr": 4.5, "champion.psnr": 3.5, "gain.psnr": 1.0, "gain_low.psnr": 1.0, "gain_high.psnr": 1.0,
            "sources": 4.0, "promoted": 1.0,
        }
    )  # fmt: skip


def test_without_a_champion_a_candidate_passes_if_there_is_enough_to_measure_it_on() -> None:
    found = decide(gate(), BETTER, rows([1.0] * 4), None)
    assert found.promoted and "no champion to compare with" in found.reason and not found.champion and not found.gains
    few = decide(gate(), BETTER, rows([1.0] * 3), None)
    assert not few.promoted and few.reason == "3 held-out sources are too few, the gate asks for 4"
    assert not decide(gate(), BETTER, {}, None).promoted


def test_too_few_sources_keep_any_candidate() -> None:
    found = decide(gate(), BETTER, rows([99.0] * 3), rows([1.0] * 3))
    assert not found.promoted and "too few" in found.reason and found.gains["psnr"].gain == pytest.approx(98)
    assert not decide(gate(), BETTER, rows([99.0]), rows([1.0])).promoted


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_what_is_not_finite_is_never_promoted(broken: float) -> None:
    with np.errstate(invalid="ignore"):
        for ours, theirs in ((rows([broken] * 5), rows([1.0] * 5)), (rows([1.0] * 5), rows([broken] * 5))):
            found = decide(gate(), BETTER, ours, theirs)
            assert not found.promoted and "is not finite" in found.reason
        assert not decide(gate(), BETTER, rows([broken] * 5), None).promoted


def test_wrong_gates_are_one_line() -> None:
    with pytest.raises(UserError, match=r"unknown metric fvd; this model has psnr$"):
        decide(gate(must_not_regress={"fvd": {"better": "lower"}}), BETTER, rows([1.0] * 4), None)
    with pytest.raises(UserError, match="psnr: better: lower: of this metric the higher is better"):
        decide(gate(metrics={"psnr": {"better": "lower"}}), BETTER, rows([1.0] * 4), rows([1.0] * 4))
    with pytest.raises(ValidationError, match="psnr must gain already"):
        gate(must_not_regress={"psnr": {"better": "higher"}})
    for wrong in ({"metrics": {}}, {"confidence": 1.0}, {"confidence": 95}, {"least_sources": 1}, {"resample": 3}):
        with pytest.raises(ValidationError):
            gate(**wrong)
