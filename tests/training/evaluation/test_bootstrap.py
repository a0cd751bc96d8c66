"""The intervals of an evaluation: they hold the truth as often as they say."""

from __future__ import annotations

import numpy as np
import pytest

from longtake.training.evaluation import bootstrap


def held(values: np.ndarray, truth: float, resamples: int) -> float:
    """The share of rows whose interval holds the truth."""
    found = [bootstrap.of_means(row, resamples, seed) for seed, row in enumerate(values)]
    return float(np.mean([each.low <= truth <= each.high for each in found]))  # type: ignore[operator]


@pytest.mark.parametrize("units", [8, 16, 48])
def test_an_interval_of_95_percent_holds_the_mean_in_93_to_97_of_cases(units: int) -> None:
    values = np.random.default_rng(units).normal(3.0, 2.0, (2000, units))
    assert 0.93 <= held(values, 3.0, 1000) <= 0.97


def test_the_interval_of_a_figure_of_all_together_holds_it_too() -> None:
    cases, units, resamples, count = 600, 40, 400, 0
    for case, values in enumerate(np.random.default_rng(0).normal(0.0, 1.0, (cases, units))):
        draws = np.sort(bootstrap.draws(units, resamples, case))
        different = 1 + (np.diff(draws) > 0).sum(1)
        # a figure that grows where units come twice, as a Fréchet distance does
        replicates = (np.square(values[draws]).mean(1) + 4 / different).tolist()
        low, high = bootstrap.of_replicates(float(np.square(values).mean() + 4 / units), replicates, units)
        assert low is not None and high is not None
        count += low <= 1.0 + 4 / units <= high
    # the squares of normal values are skewed: their intervals hold a little less often
    assert 0.91 <= count / cases <= 0.97


def test_models_get_the_same_resamples_and_one_unit_has_no_interval() -> None:
    assert (bootstrap.draws(5, 10, 3) == bootstrap.draws(5, 10, 3)).all()
    assert not (bootstrap.draws(5, 10, 3) == bootstrap.draws(5, 10, 4)).all()
    assert bootstrap.of_means(np.ones(1), 100, 0) == (None, None)
    assert bootstrap.of_replicates(1.0, [], 5) == (None, None)
