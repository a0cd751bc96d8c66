"""Times of a flow: as often as their distribution says, and in an expert's range alone."""

import pytest
import torch

from longtake.training.models.backbone.times import Times, by_time
from longtake.training.models.common import flow

COUNT = 200_000


def drawn(times: Times) -> torch.Tensor:
    return times.draw(COUNT, torch.Generator().manual_seed(0))


@pytest.mark.parametrize("times", [Times(), Times(0.5, 0.7, 3.0), Times(shift=5.0)])
def test_without_a_range_they_are_those_of_all_our_flows(times: Times) -> None:
    ours, rng = drawn(times), torch.Generator().manual_seed(1)
    theirs = flow.sample_t(COUNT, times.mean, times.std, times.shift, rng)
    points = torch.linspace(0.01, 0.99, 9)
    torch.testing.assert_close(ours.quantile(points), theirs.quantile(points), atol=4e-3, rtol=0)


@pytest.mark.parametrize("bounds", [(0.875, 1.0), (0.0, 0.875), (0.3, 0.4)])
def test_in_a_range_they_are_the_same_without_the_others(bounds: tuple[float, float]) -> None:
    whole, part = drawn(Times(shift=3.0)), drawn(Times(0.0, 1.0, 3.0, *bounds))
    assert bounds[0] <= part.min() and part.max() <= bounds[1]
    kept = whole[(whole >= bounds[0]) & (whole <= bounds[1])]
    points = torch.linspace(0.05, 0.95, 7)
    torch.testing.assert_close(part.quantile(points), kept.quantile(points), atol=4e-3, rtol=0)


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (0.875, 1.0)])
def test_what_is_said_of_them_is_what_is_drawn(bounds: tuple[float, float]) -> None:
    times = Times(0.0, 1.0, 3.0, *bounds)
    t = drawn(times)
    terms = by_time(t, t, *bounds)
    shares = torch.stack([terms[f"times/{n}"] for n in range(flow.TIMES)])
    torch.testing.assert_close(shares, torch.tensor(times.shares()), atol=4e-3, rtol=0)
    assert sum(times.shares()) == pytest.approx(1)
    # the mean of a loss that is the time lies in its part
    width = (bounds[1] - bounds[0]) / flow.TIMES
    for number in range(flow.TIMES):
        mean = float(terms[f"loss_by_time/{number}"])
        assert shares[number] == 0 or 0 <= (mean - bounds[0]) / width - number <= 1


def test_a_part_without_times_has_no_loss() -> None:
    terms = by_time(torch.tensor([0.1, 0.9]), torch.tensor([2.0, float("nan")]), 0.0, 1.0)
    assert float(terms["loss_by_time/0"]) == 2 and terms["loss_by_time/3"].isnan()
