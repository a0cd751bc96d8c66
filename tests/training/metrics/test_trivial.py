"""The trivial predictions are what they say, and the best of their kind."""

import pytest
import torch

from longtake.training.metrics.trivial import Against, Gaussian, Still, comparisons, mean_colour, scaled_down, unit
from longtake.training.models.common import flow
from longtake.training.models.pv_vae.model import config_from_preset


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.9])
def test_no_linear_map_of_single_numbers_beats_the_gaussian_velocity(t: float) -> None:
    mean, std = torch.tensor([3.0, -1.0]), torch.tensor([0.5, 2.0])
    x0 = mean[:, None, None, None] + std[:, None, None, None] * torch.randn(64, 2, 3, 8, 8, generator=seeded())
    noise = torch.randn(x0.shape, generator=seeded(1))
    times = torch.full((64,), t)
    x = flow.interpolate(x0, noise, times)
    ours = flow.loss(Gaussian(mean, std)(x, times), x0, noise).mean()
    still = flow.loss(Still(mean)(x, times), x0, noise).mean()
    # least squares of the true velocity on x, channel by channel
    rows = [
        torch.linalg.lstsq(torch.stack([x[:, c].flatten(), torch.ones(x[:, c].numel())], 1), v.flatten()[:, None])
        for c, v in enumerate(flow.target(x0, noise).unbind(1))
    ]
    fitted = torch.stack([x[:, c] * row.solution[0] + row.solution[1] for c, row in enumerate(rows)], 1)
    assert ours == pytest.approx(flow.loss(fitted, x0, noise).mean().item(), rel=2e-3)
    assert ours < still == pytest.approx(1 + float(std.square().mean()), rel=0.02)


def test_frames_with_times_of_their_own_count_by_themselves() -> None:
    x, t = torch.randn(2, 3, 4, 2, 2, generator=seeded()), torch.rand(2, 4, generator=seeded(1))
    _, gaussian = unit(3, x)
    for frame in range(4):
        alone = gaussian(x[:, :, frame : frame + 1], t[:, frame])
        torch.testing.assert_close(gaussian(x, t)[:, :, frame : frame + 1], alone)


def test_a_clip_scaled_down_has_as_many_numbers_as_its_latent() -> None:
    config = config_from_preset("pv_vae_tiny")
    smooth = torch.linspace(-1, 1, 64).expand(1, 3, 9, 64, 64)
    error = (scaled_down(smooth, config) - smooth).abs().mean()
    assert error < 0.02
    # 64 x 3 x 4 x 4 numbers are those of nine frames of about 11 x 11: finer stripes are lost
    stripes = torch.ones(64).index_fill(0, torch.arange(0, 64, 2), -1.0).expand(1, 3, 9, 64, 64)
    assert scaled_down(stripes, config).abs().mean() < 0.3
    assert torch.equal(mean_colour(stripes), torch.zeros_like(stripes))


def test_only_what_was_measured_is_compared() -> None:
    table = (Against("a", "x", "b", "y"), Against("a", "x", "c", "z", "", False), Against("a", "none", "b", "y"))
    found = comparisons(table, {"x": 1.0, "y": 2.0, "z": 1.5, "none": None})
    assert [(c["trivial"], c["beats"]) for c in found] == [("b", False), ("c", True)]
    assert not comparisons(table, {"x": 2.0, "y": 2.0})[0]["beats"], "as good as trivial is not better"
