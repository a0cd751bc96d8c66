"""Measures of a filled gap: what they are for gaps whose answer is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.metrics.transitions import (
    by_length,
    clip_rs,
    clip_rs_code,
    closeness,
    diversity,
    embedded,
    joint_error,
    joints,
    middle,
    with_ratios,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def turned(*degrees: float) -> Tensor:
    """Embeddings that are turned by so much from one frame to the next."""
    angles = torch.tensor([0.0, *degrees]).cumsum(0).deg2rad()
    return torch.stack([angles.cos(), angles.sin()], 1)


def test_clip_rs_is_the_mean_ratio_of_the_similarities_of_neighbours() -> None:
    made, truth = turned(0, 60, 0), turned(60, 0, 0)
    assert clip_rs(made, truth) == pytest.approx((0.5 + 0.5 + 1) / 3, abs=1e-5)
    assert clip_rs(truth, made) == clip_rs(made, truth)
    assert clip_rs(made, made) == pytest.approx(1)


def test_clip_rs_stays_between_0_and_1_where_frames_are_opposite() -> None:
    assert clip_rs(turned(180, 0), turned(0, 0)) == pytest.approx(0.5)
    assert clip_rs(turned(180, 120), turned(120, 180)) == pytest.approx(1)


def test_embeddings_are_those_of_the_frames_in_order_and_of_unit_length() -> None:
    video = randn(3, 5, 4, 4)
    found = embedded(lambda frames: frames.mean((2, 3)), video)
    torch.testing.assert_close(found, F.normalize(video.mean((2, 3)).T, dim=1))


def test_the_released_variant_compares_channels_over_tokens() -> None:
    made, truth = randn(4, 7, 5), randn(4, 7, 5, seed=1)
    ratios = []
    for n in range(3):
        for channel in range(5):
            s, g = (
                float(each[n, :, channel] @ each[n + 1, :, channel])
                / float(each[n, :, channel].norm() * each[n + 1, :, channel].norm())
                for each in (made, truth)
            )
            ratios.append(min(s, g) / max(s, g))
    assert clip_rs_code(made, truth) == pytest.approx(sum(ratios) / 15, rel=1e-3)
    assert clip_rs_code(made, made) == pytest.approx(1)


@pytest.mark.parametrize(("made", "truth"), [((3, 2), (4, 2)), ((1, 2), (1, 2)), ((3, 2, 2), (3, 2, 2))])
def test_clip_rs_refuses_what_it_cannot_compare(made: tuple[int, ...], truth: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="CLIP-RS compares"):
        clip_rs(torch.ones(made), torch.ones(truth))


def test_the_middle_is_measured_alone_and_without_ssim_where_frames_are_too_small() -> None:
    truth = randn(1, 3, 4, 8, 8).clamp(-1, 1)
    made = (truth + 0.2).clamp(-1, 1)
    assert middle(truth, truth) == {"psnr": 100.0, "ssim": pytest.approx(1)}
    assert 15 < middle(made, truth)["psnr"] < 30
    assert set(middle(made[..., :4], truth[..., :4])) == {"psnr"}


def test_joints_of_a_steady_film_cannot_be_told_and_a_jump_shows() -> None:
    steady = torch.linspace(-1, 1, 16)[None, None, :, None, None].expand(1, 3, -1, 4, 4).clone()
    figures = {f"{name}_true": value or 0.0 for name, value in joints(steady, 6, 4).items()}
    assert with_ratios(figures, ["_true"]) == {"seam_ratio_true": pytest.approx(1, abs=1e-4)}  # nothing turns inside
    steady[:, :, 6:10] += 0.5
    figures = {name: value or 0.0 for name, value in joints(steady, 6, 4).items()}
    assert with_ratios(figures | {"psnr": 9.0}, [""])["seam_ratio"] > 3
    assert with_ratios({"psnr": 9.0}, ["", "_held"]) == {"psnr": 9.0}


def test_closeness_is_to_the_nearer_side() -> None:
    made = torch.full((2, 3, 5, 4, 4), 0.5)
    before, after = torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4) * -1
    assert closeness(made, before, after)[0].tolist() == pytest.approx([0.25, 0.25, 0.25, 0.75, 0.75])


def test_diversity_is_the_deviation_over_seeds_of_each_frame() -> None:
    made = torch.zeros(2, 3, 2, 4, 4)
    made[0, :, 1], made[1, :, 1] = -1, 1
    assert diversity(made).tolist() == pytest.approx([0, 2**0.5 / 2])
    with pytest.raises(ValueError, match="two seeds"):
        diversity(made[:1])


def test_figures_are_averaged_by_the_length_of_the_gap() -> None:
    rows = [{"length": 8, "psnr": 20.0, "seam_ratio": None}, {"length": 4, "psnr": 30.0}, {"length": 8, "psnr": 22.0}]
    assert by_length(rows) == {4: {"psnr": 30.0}, 8: {"psnr": 21.0}}


def test_the_error_at_joints_is_that_of_the_outer_frames() -> None:
    truth = randn(1, 3, 5, 4, 4) / 4
    made = truth.clone()
    made[:, :, 1:4] += 1
    assert joint_error(made, truth) == 0
    made[:, :, 0] += 0.2
    made[:, :, 4] -= 0.6
    assert joint_error(made, truth) == pytest.approx(0.2, rel=1e-5)
    # the same as that of the change from the given frames to the gap
    before, after = randn(1, 3, 1, 4, 4, seed=1), randn(1, 3, 1, 4, 4, seed=2)
    changes = [torch.cat([before, gap, after], dim=2).diff(dim=2)[:, :, [0, -1]] for gap in (made, truth)]
    assert joint_error(made, truth) == pytest.approx(float((changes[0] - changes[1]).abs().mean()) / 2, rel=1e-5)
