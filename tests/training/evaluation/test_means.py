"""Figures of means over units, and of their resamples, against each resample by itself."""

from __future__ import annotations

import numpy as np
import pytest
from materials import suite

from longtake.training.evaluation import bootstrap, means


def ratio(rows: np.ndarray) -> np.ndarray:
    return rows[:, 0] / rows[:, 1]


def test_a_figure_and_its_replicates_are_of_means_over_units_however_many_clips_each_has(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(0)
    clips = {f"u{n}": rng.uniform(1, 2, (1 + n % 3, 2)) for n in (3, 1, 2, 0)}
    found = means.Means()
    for unit, rows in clips.items():
        for row in rows:
            found.add(unit, row)
    by_unit = np.stack([clips[unit].mean(0) for unit in sorted(clips)])
    asked = suite(seed=3)
    draws = bootstrap.draws(len(clips), asked.resamples, asked.seed)
    expected = [ratio(by_unit[draw].mean(0)[None])[0] for draw in draws]
    assert np.std(expected) > 0.01
    # in one piece, and in many
    for most in (1 << 22, 8):
        monkeypatch.setattr(means, "_AT_ONCE", most)
        pooled = found.pooled(asked, {"ratio": ratio, "twice": lambda rows: 2 * ratio(rows)})
        assert pooled["ratio"].value == pytest.approx(ratio(by_unit.mean(0)[None])[0])
        np.testing.assert_allclose(pooled["ratio"].replicates, expected)
        np.testing.assert_allclose(pooled["twice"].replicates, 2 * np.array(expected))


def test_a_curve_has_the_mean_of_each_units_clips_at_each_position_in_order() -> None:
    curve = means.Curve()
    curve.add("b", {0.5: 4.0, 0.25: 1.0})
    curve.add("a", {0.25: 3.0})
    curve.add("b", {0.25: 2.0})
    found = curve.by_unit()
    assert list(found) == [0.25, 0.5]
    assert found == {0.25: {"a": 3.0, "b": 1.5}, 0.5: {"b": 4.0}}
