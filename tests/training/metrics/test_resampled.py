"""Distances of resamples against sets whose rows really are repeated, and how often their bounds hold."""

import numpy as np
import pytest
import torch

from longtake.training.evaluation.bootstrap import draws, of_replicates
from longtake.training.metrics.coherence import inception_score, score_replicates
from longtake.training.metrics.distance import frechet_distance, moments
from longtake.training.metrics.resampled import Rows, frechet, frechet_replicates, kernel, kernel_replicates, times

pytestmark = pytest.mark.usefixtures("one_thread")


def rows(units: int, each: int, width: int, seed: int) -> Rows:
    """Some rows of each unit, which are alike."""
    rng = torch.Generator().manual_seed(seed)
    values = torch.randn(units, 1, width, generator=rng) + 0.3 * torch.randn(units, each, width, generator=rng)
    return Rows(values.flatten(0, 1) + seed, torch.arange(units).repeat_interleave(each))


def repeated(of: Rows, drawn: np.ndarray) -> torch.Tensor:
    """The numbers of the rows of drawn units, as often as they were drawn."""
    return torch.cat([torch.nonzero(of.units == int(unit))[:, 0] for unit in drawn])


@pytest.mark.parametrize("width", [3, 60], ids=["more rows than features", "fewer rows than features"])
def test_each_replicate_is_the_distance_of_rows_that_are_repeated(width):
    real, fake = rows(12, 2, width, 0), rows(9, 3, width, 1)
    first, second = draws(12, 5, 0), draws(9, 5, 1)
    found = frechet_replicates(real, fake, times(first, 12), times(second, 9))
    for number in range(5):
        sides = [moments(side.values[repeated(side, drawn[number])]) for side, drawn in ((real, first), (fake, second))]
        assert float(found[number]) == pytest.approx(frechet_distance(*sides), rel=1e-6)


def test_each_kernel_replicate_is_the_mean_over_pairs_of_different_rows():
    real, fake = rows(5, 2, 4, 0), rows(6, 1, 4, 1)
    first, second = draws(5, 4, 0), draws(6, 4, 1)
    found = kernel_replicates(real, fake, times(first, 5), times(second, 6))

    def mean(a, b, one, other, same):
        values = [
            (float(a.values[i].double() @ b.values[j].double()) / 4 + 1) ** 3
            for i in one.tolist() for j in other.tolist() if not (same and i == j)
        ]  # fmt: skip
        return sum(values) / len(values)

    for number in range(4):
        one, other = repeated(real, first[number]), repeated(fake, second[number])
        expected = mean(real, real, one, one, True) + mean(fake, fake, other, other, True)
        expected -= 2 * mean(real, fake, one, other, False)
        assert float(found[number]) == pytest.approx(expected, rel=1e-9)


def test_a_resample_of_each_unit_once_is_the_figure_itself():
    real, fake = rows(12, 2, 5, 0), rows(9, 2, 5, 1)
    once = [torch.ones(1, 12, dtype=torch.float64), torch.ones(1, 9, dtype=torch.float64)]
    assert float(frechet_replicates(real, fake, *once)) == pytest.approx(frechet(real, fake))
    assert float(kernel_replicates(real, fake, *once)) == pytest.approx(kernel(real, fake))
    log_p = torch.randn(12, 4, generator=torch.Generator().manual_seed(3)).log_softmax(1)
    assert float(score_replicates(log_p, once[0])) == pytest.approx(inception_score(log_p, 1, 0).mean)


def test_a_score_of_a_resample_is_that_of_videos_that_are_repeated():
    log_p = torch.randn(7, 4, generator=torch.Generator().manual_seed(3)).mul(3).log_softmax(1)
    drawn = draws(7, 3, 0)
    found = score_replicates(log_p, times(drawn, 7))
    expected = [inception_score(log_p[torch.as_tensor(each)], 1, 0).mean for each in drawn]
    assert found.tolist() == pytest.approx(expected)


@pytest.mark.slow
def test_bounds_hold_for_what_so_many_videos_have_on_average():
    """By simulation, of two normal samples of 40 with 3 features: the distance of such samples, not of endless ones."""

    def sample(seed: int) -> tuple[Rows, Rows]:
        rng = torch.Generator().manual_seed(seed)
        real, fake = torch.randn(40, 3, generator=rng), 1.5 * torch.randn(40, 3, generator=rng) + 1
        return Rows(real, torch.arange(40)), Rows(fake, torch.arange(40))

    average = np.mean([frechet(*sample(seed)) for seed in range(2000)])
    held = []
    for seed in range(100):
        weights = [times(draws(40, 100, of), 40) for of in (0, 1)]
        replicates = frechet_replicates(*sample(5000 + seed), *weights)
        low, high = of_replicates(frechet(*sample(5000 + seed)), replicates.tolist(), 40)
        held.append(low <= average <= high)
    assert 0.88 <= np.mean(held) <= 0.99
