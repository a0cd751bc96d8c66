"""LTD, component pictures and paths on latents whose answer is known."""

import json
import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from longtake.training.metrics.distance import merge, moments
from longtake.training.metrics.latents import (
    Components,
    components,
    draw_trajectories,
    latent_temporal_distance,
    pca_pictures,
    spearman,
)


def channel_components(batches: Iterable[Tensor], count: int = 3) -> Components:
    """Components of the channel vectors at all places of latents (B, C, T, h, w), over all videos, as `look` takes them."""
    return components(merge(moments(b.movedim(1, -1).flatten(0, -2)) for b in batches), count)


def trajectories(batches: Iterable[Tensor]) -> Tensor:
    """The path of each video (V, T, 2) in the plane of the strongest components of its latents' means over space."""
    pooled = torch.cat([batch.double().mean((3, 4)).transpose(1, 2) for batch in batches])
    return components(moments(pooled.flatten(0, 1)), 2).project(pooled)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def moving(steps: int, videos: int = 3) -> torch.Tensor:
    """Latents that move along a line, each video at its own speed: video v by v + 1 a step."""
    way = torch.randn(videos, 4, 1, 2, 2, generator=seeded(1))
    way = way / way.flatten(1).norm(dim=1).view(-1, 1, 1, 1, 1) * torch.arange(1, videos + 1).view(-1, 1, 1, 1, 1)
    return torch.randn(videos, 4, 1, 2, 2, generator=seeded(2)) + way * torch.arange(steps).view(1, 1, -1, 1, 1)


def test_the_distance_of_linear_motion_is_proportional_to_the_interval():
    found = latent_temporal_distance([moving(6)])
    assert found["raw"] == pytest.approx([2.0 * gap for gap in range(1, 6)])  # speeds 1, 2, 3: mean 2
    assert (found["rising"], found["videos"]) == (1, 3)
    assert found["spearman"] == pytest.approx(1)
    assert found["curve_roughness"] == pytest.approx(0, abs=1e-5)
    assert found["path_roughness"] == pytest.approx(0, abs=1e-5)
    json.dumps(found)


def test_the_distance_of_a_random_walk_grows_as_the_root():
    walk = torch.randn(16, 64, 9, 4, 4, generator=seeded()).cumsum(2)
    found = latent_temporal_distance(walk.split(5))
    side = math.sqrt(64 * 16)
    assert found["raw"] == pytest.approx([side * math.sqrt(gap) for gap in range(1, 9)], rel=0.02)
    assert found["path_roughness"] == pytest.approx(math.sqrt(2), rel=0.02)


def test_the_normalised_distance_does_not_depend_on_scale_or_size():
    z = moving(5)
    one = latent_temporal_distance([z])
    scaled = latent_temporal_distance([7 * z])
    larger = latent_temporal_distance([z.repeat(1, 1, 1, 3, 3)])
    assert scaled["raw"] == pytest.approx([7 * value for value in one["raw"]])
    assert scaled["normalised"] == pytest.approx(one["normalised"])
    assert larger["normalised"] == pytest.approx(one["normalised"])
    norm = z.transpose(1, 2).flatten(2).norm(dim=2).mean().item()
    assert one["normalised"] == pytest.approx([value / norm for value in one["raw"]])


def test_the_split_into_batches_does_not_matter():
    z = torch.randn(7, 4, 5, 2, 2, generator=seeded())
    one, other = latent_temporal_distance([z]), latent_temporal_distance(z.split(3))
    for key, value in one.items():
        assert other[key] == pytest.approx(value), key


def test_a_clip_that_comes_back_is_not_monotonic():
    there_and_back = torch.tensor([0.0, 1, 2, 1, 0]).view(1, 1, -1, 1, 1)
    found = latent_temporal_distance([there_and_back])
    assert found["raw"] == pytest.approx([1, 4 / 3, 1, 0])
    assert found["rising"] == pytest.approx(1 / 3)
    assert found["spearman"] == pytest.approx(-3 / math.sqrt(5 * 4.5))
    assert found["curve_roughness"] == pytest.approx((2 / 3) / (5 / 9))
    assert found["path_roughness"] == pytest.approx(2 / 3)  # second differences 0, -2, 0 against first ones of 1


def test_latents_that_stand_still_have_a_flat_curve():
    found = latent_temporal_distance([torch.ones(2, 3, 4, 2, 2)])
    assert found["raw"] == [0, 0, 0]
    assert (found["rising"], found["spearman"], found["curve_roughness"], found["path_roughness"]) == (0, 0, 0, 0)


def test_two_steps_have_one_interval():
    found = latent_temporal_distance([moving(2)])
    assert found["raw"] == pytest.approx([2.0])
    assert (found["rising"], found["curve_roughness"], found["path_roughness"]) == (1, 0, 0)


@pytest.mark.parametrize(
    "batches", [[], [torch.zeros(2, 4, 1, 2, 2)], [torch.zeros(2, 4, 3, 2, 2), torch.zeros(2, 4, 4, 2, 2)]]
)
def test_no_videos_single_steps_and_unequal_lengths_are_refused(batches):
    with pytest.raises(ValueError, match="LTD needs"):
        latent_temporal_distance(batches)


def test_rank_correlation_is_known_with_and_without_ties():
    rising = torch.arange(4.0)
    assert spearman(rising, torch.tensor([1.0, 10, 100, 1000])) == pytest.approx(1)
    assert spearman(rising, torch.tensor([4.0, 3, 2, 1])) == pytest.approx(-1)
    assert spearman(rising, torch.tensor([1.0, 3, 2, 4])) == pytest.approx(0.8)
    assert spearman(rising, torch.tensor([1.0, 1, 2, 2])) == pytest.approx(4 / math.sqrt(20))
    assert spearman(rising, torch.ones(4)) == 0


def on_axes(count: int = 500) -> torch.Tensor:
    """Latents (1, 5, count, 1, 2) whose components are turned axes of deviations 9, 4, 1 and nothing else."""
    scores = torch.randn(2 * count, 3, generator=seeded(), dtype=torch.float64) * torch.tensor([9.0, 4, 1])
    axes = torch.linalg.qr(torch.randn(5, 5, generator=seeded(5), dtype=torch.float64)).Q[:3]
    return (scores @ axes + 3).view(1, count, 1, 2, 5).movedim(-1, 1)


def test_components_are_the_turned_axes_with_fixed_signs():
    latents = on_axes()
    pca = channel_components(latents.split(100, dim=2))
    axes = torch.linalg.qr(torch.randn(5, 5, generator=seeded(5), dtype=torch.float64)).Q[:3]
    assert (pca.directions.T @ axes.T).abs().diagonal().min() > 0.99
    torch.testing.assert_close(pca.deviations, torch.tensor([9.0, 4, 1]).double(), rtol=0.1, atol=0)
    assert pca.directions.gather(0, pca.directions.abs().argmax(0, keepdim=True)).min() > 0
    again = channel_components([latents.flip(2)])
    torch.testing.assert_close(again.directions, pca.directions)


def test_a_picture_is_grey_at_the_mean_and_white_two_deviations_up():
    pca = channel_components([on_axes()])
    points = [pca.mean + pca.directions @ (pca.deviations * torch.tensor(w).double()) for w in ([0, 0, 0], [2, -2, 1])]
    latents = torch.stack(points).T.view(1, 5, 1, 1, 2)
    pictures = pca_pictures(latents, pca)
    assert pictures.dtype == torch.uint8 and pictures.shape == (1, 1, 1, 2, 3)
    assert pictures[0, 0, 0, 0].tolist() == [128, 128, 128]
    assert pictures[0, 0, 0, 1].tolist() == [255, 0, 191]


def test_pictures_of_two_videos_share_their_colours():
    latents = on_axes()
    pca = channel_components(latents.split(250, dim=2))
    whole = pca_pictures(latents, pca)
    assert torch.equal(pca_pictures(latents[:, :, 100:], pca), whole[:, 100:])


def test_a_component_without_variance_stays_grey():
    latents = torch.zeros(1, 4, 6, 1, 1)
    latents[0, 1, :, 0, 0] = torch.arange(6.0)
    pictures = pca_pictures(latents, channel_components([latents]))
    assert pictures[..., 1:].unique().tolist() == [128]
    assert pictures[..., 0].flatten().diff().min() >= 0


def test_paths_of_linear_motion_are_lines_of_their_length():
    z = torch.zeros(2, 3, 5, 2, 2)
    z[0, 0] = torch.arange(5.0).view(-1, 1, 1)  # channel 0 moves by 1 a step
    z[1, 1] = 2 * torch.arange(5.0).view(-1, 1, 1)
    apart = torch.tensor([0.0, 5, 1, 7, 2]).view(-1, 1)  # what differs within a step averages out
    z[:, :, :, 0] += apart
    z[:, :, :, 1] -= apart
    paths = trajectories(z.split(1))
    assert paths.shape == (2, 5, 2)
    torch.testing.assert_close(paths.diff(dim=1).norm(dim=2), torch.tensor([1.0, 2.0]).double()[:, None].expand(2, 4))
    assert paths.diff(n=2, dim=1).abs().max() < 1e-9


def test_paths_are_drawn_the_same_each_time(tmp_path):
    paths = trajectories([moving(6)])
    for name in ("a.png", "b.png"):
        draw_trajectories(paths, tmp_path / name)
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    picture = np.asarray(Image.open(tmp_path / "a.png").convert("RGB"))
    assert picture.shape == (600, 600, 3)
    for colour in ((68, 1, 84), (253, 231, 36)):  # the ends of viridis: the first and the last video
        assert (np.abs(picture.astype(int) - colour).sum(-1) < 12).sum() > 30
