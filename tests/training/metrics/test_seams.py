"""What is seen where clips meet, against closed forms."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from longtake.datasets.errors import UserError
from longtake.training.metrics.distance import Sample
from longtake.training.metrics.features import FeatureNetwork
from longtake.training.metrics.seams import (
    around,
    bends,
    between,
    changes,
    heldout_seam_distances,
    out_of_range,
    seam_distances,
    seams,
)


def film(*levels: float) -> Tensor:
    """Grey frames of these levels, `(1, 3, T, 4, 4)`."""
    return torch.tensor(levels)[None, None, :, None, None].expand(1, 3, -1, 4, 4).clone()


def found(video: Tensor, *joints: int) -> tuple[float | None, float | None, float]:
    return seams(changes(video), bends(video), joints)


def test_changes_are_mean_differences_of_neighbours_in_parts_of_the_whole_range() -> None:
    assert changes(film(-1, 1, 0.5)).tolist() == [[1.0, 0.25]]
    assert bends(film(-1, 1, 0.5)).tolist() == [[1.25]]  # |0.5 - 2 - 1| / 2


def test_a_video_that_goes_on_evenly_has_no_seams() -> None:
    ratio, bend, change = found(film(*(n * n / 100 for n in range(9))), 4)
    assert ratio == pytest.approx(0.07 / torch.tensor([1, 3, 5, 9, 11, 13, 15]).double().mul(0.01).mean().item())
    assert bend == pytest.approx(1)
    assert change == pytest.approx(0.08 / 2)


def test_a_jump_shows_in_the_ratio_and_a_turn_only_in_that_of_bends() -> None:
    jump = found(film(0, 0.1, 0.2, 0.8, 0.9, 1.0), 3)
    assert jump[0] == pytest.approx(6, rel=1e-5) and jump[1] is None  # the four straight steps do not bend at all
    turn = found(film(0, 0.1, 0.3, 0.4, 0.3, 0.2, 0), 4)  # goes back as fast as it came
    assert turn[0] == pytest.approx(0.1 / (0.7 / 5))
    assert turn[1] == pytest.approx(0.2 / (0.3 / 3))


def test_a_bend_that_reaches_over_a_joint_is_not_inside() -> None:
    # frames 3 and 4 are one jump seen twice: both bends are of the joint, and only the first is counted there
    video = film(0, 0.1, 0.3, 0.9, 1.0, 1.2)
    assert found(video, 3)[1] == pytest.approx((0.9 - 2 * 0.3 + 0.1) / ((0.1 + 0.1) / 2))


def test_a_still_video_has_no_ratio_and_does_not_change() -> None:
    assert found(film(0.3, 0.3, 0.3, 0.3), 2) == (None, None, 0.0)


def test_without_joints_there_is_no_ratio() -> None:
    assert found(film(0, 0.1, 0.2, 0.3))[:2] == (None, None)


@pytest.mark.parametrize("joint", [0, 4])
def test_a_joint_outside_of_the_video_is_refused(joint: int) -> None:
    with pytest.raises(ValueError, match="a video of 4 frames has joints from 1 to 3"):
        found(film(0, 1, 0, 1), joint)


def test_a_single_frame_is_refused() -> None:
    with pytest.raises(ValueError, match="no two frames"):
        found(film(0))


def test_values_out_of_range_are_counted() -> None:
    assert out_of_range(film(0, 1, 1.5, -1)) == 0.25
    assert out_of_range(film(1.0005, -1)) == 0.0


def test_windows_have_a_joint_in_their_middle_or_none_at_all() -> None:
    video = film(*range(20))
    levels = lambda windows: windows[:, 0, :, 0, 0].tolist()  # noqa: E731
    assert levels(around(video, [6, 12], 4)) == [[4, 5, 6, 7], [10, 11, 12, 13]]
    assert levels(around(video, [1, 12, 19], 4)) == [[10, 11, 12, 13]]  # two are too near to an end
    assert levels(between(video, [12, 6], 6)) == [[0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11], [13, 14, 15, 16, 17, 18]]
    assert levels(between(video, [12, 6], 7)) == [[12, 13, 14, 15, 16, 17, 18]]
    assert len(between(video, [10], 11)) == 0


def sample(name: str, *levels: float) -> Sample:
    """Videos whose feature is their level."""
    network = FeatureNetwork("mean", "0", "signed", None, videos=lambda levels: levels.mean((1, 2, 3, 4))[:, None])
    made = Sample(name, network)
    for level in levels:
        made.add(film(level, level))
    return made


def test_distances_of_windows_at_joints_and_inside_stand_side_by_side() -> None:
    real = sample("real", -0.2, 0.2)
    found = seam_distances(real, sample("seams", 0.4, 0.8), sample("inner", -0.2, 0.2), split="val", seed=3)
    step = 0.6 * 127.5  # only the means differ, in levels of 0..255, rounded
    assert found["frechet_seam"] == pytest.approx(step**2, rel=0.02)
    assert found["frechet_inner"] == pytest.approx(0, abs=1)
    assert found["frechet_gap"] == pytest.approx(found["frechet_seam"] - found["frechet_inner"])
    assert found["kernel_gap"] > 0 and found["distance"]["network"] == "mean" and found["distance"]["seed"] == 3


def test_a_single_window_has_no_distance() -> None:
    with pytest.raises(UserError, match="features: seams: 1 sample"):
        heldout_seam_distances(sample("real", 0, 1), sample("seams", 0), sample("inner", 0, 1), 0)
