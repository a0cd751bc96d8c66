"""How much videos move, against known movement, SciPy's distance, and VBench's own formulas written out."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import wasserstein_distance

from longtake.datasets.loader import to_model
from longtake.training.metrics.dynamics import (
    consistency,
    direction_distance,
    flickering,
    is_dynamic,
    movements,
    small,
    speed_distance,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def shifting(x: float, y: float, frames: int = 5, size: int = 32, seed: int = 0) -> torch.Tensor:
    """A rough picture that moves by whole pixels a frame, (1, 3, T, H, W) in [-1, 1]."""
    rng = torch.Generator().manual_seed(seed)
    wide = torch.rand(3, 2 * size, 2 * size, generator=rng) * 2 - 1
    views = [wide.roll((round(y * t), round(x * t)), (1, 2))[:, 8 : 8 + size, 8 : 8 + size] for t in range(frames)]
    return torch.stack(views, 1)[None]


def test_a_picture_that_shifts_moves_by_that_share_of_its_side_in_that_direction():
    found = movements(shifting(2, 0))[0]
    assert float(found.sum()) == pytest.approx(2 / 32, rel=0.15)
    assert int(found.argmax()) == 0 and float(found[0] / found.sum()) > 0.8
    assert int(movements(shifting(0, 2))[0].argmax()) == 2  # downwards
    assert float(movements(shifting(0, 0)).sum()) == 0


def test_larger_frames_move_by_the_same_share():
    video = shifting(1, 0)
    large = video.repeat_interleave(4, 3).repeat_interleave(4, 4)  # 128 pixels, 4 a frame
    assert small(large).shape[-2:] == (64, 64)
    assert float(movements(large).sum()) == pytest.approx(float(movements(video).sum()), rel=0.2)


def test_speeds_are_as_far_apart_as_scipy_says():
    rng = torch.Generator().manual_seed(0)
    real, fake = torch.rand(7, generator=rng), torch.rand(9, generator=rng) * 2
    times = [torch.randint(0, 3, (4, n), generator=rng).double() for n in (7, 9)]
    found = speed_distance(real, fake, *times)
    expected = [
        wasserstein_distance(real.numpy(), fake.numpy(), first.numpy(), second.numpy())
        for first, second in zip(*times, strict=True)
    ]
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


def test_directions_are_as_far_apart_as_the_share_that_goes_elsewhere():
    right, left = torch.zeros(2, 8), torch.zeros(2, 8)
    right[:, 0], left[:, 4] = 1.0, 3.0
    ones = torch.ones(1, 2, dtype=torch.float64)
    assert float(direction_distance(right, left, ones, ones)) == 1
    assert float(direction_distance(right, 5 * right, ones, ones)) == 0
    mixed = torch.stack([right[0], left[0] / 3])
    assert float(direction_distance(mixed, right, ones, ones)) == pytest.approx(0.5)
    weighted = direction_distance(mixed, right, torch.tensor([[3.0, 1.0]]).double(), ones)
    assert float(weighted) == pytest.approx(0.25)
    still = torch.zeros(2, 8)
    assert float(direction_distance(still, right, ones, ones)) == pytest.approx(7 / 8)


def test_flickering_is_that_of_vbench():
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    maes = [np.abs(a.astype(np.float32) - b.astype(np.float32)).mean() for a, b in pairwise(frames)]
    video = to_model(torch.from_numpy(frames).permute(3, 0, 1, 2)[None])
    assert float(flickering(video)) == pytest.approx((255 - np.mean(maes)) / 255, rel=1e-5)


@pytest.mark.parametrize(
    ("x", "fps", "dynamic"),
    [
        (0, 8, False),
        (1, 8, True),  # of 32 pixels: 6/256 of them are 0.75
        (1, 4, False),  # at half the rate it must be twice as far
        (2, 4, True),
    ],
)
def test_a_video_is_dynamic_from_vbenchs_threshold_on(x, fps, dynamic):
    assert bool(is_dynamic(shifting(x, 0, frames=9), fps)) is dynamic


def test_frames_of_a_high_rate_are_looked_at_8_times_a_second():
    video = shifting(1, 0, frames=9).repeat_interleave(3, 2)  # 24 a second, each shown three times
    assert bool(is_dynamic(video, 24))


def test_a_movement_must_last_a_quarter_of_the_frames():
    moving, still = shifting(2, 0, frames=9), shifting(0, 0, frames=1)
    for count, dynamic in ((1, False), (4, True)):  # 16 frames must have 4 movements
        video = torch.cat([still.expand(-1, -1, 15 - count, -1, -1), moving[:, :, : count + 1]], 2)
        assert bool(is_dynamic(video, 8)) is dynamic


def test_consistency_is_the_mean_cosine_to_the_first_and_the_last_frame():
    angles = torch.tensor([0.0, 0.5, 1.2, 2.5])
    found = consistency(torch.stack([angles.cos(), angles.sin()], 1))
    first, before = angles[1:].cos().clamp_min(0), angles.diff().cos().clamp_min(0)
    assert found == pytest.approx(float((first + before).mean() / 2), rel=1e-5)
