"""Motion from frames against known motion; probes on features that hold the answer, and on features that do not."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.infra.footage import render
from longtake.training.metrics.motion import (
    Matching,
    dense_flow,
    flow_targets,
    follow,
    frames_of_latents,
    next_frame_targets,
    sampled,
    track_targets,
)
from longtake.training.metrics.probes import fit_probe, flow_score, next_frame_score, tracking_score

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def texture(side: int = 64, seed: int = 0) -> Tensor:
    """(1, 3, side, side): waves of a few pixels' length, to be read at any place."""
    return F.interpolate(
        torch.rand(1, 3, side // 4, side // 4, generator=seeded(seed)) * 2 - 1, size=side, mode="bicubic"
    )


def moved(picture: Tensor, x: float, y: float) -> Tensor:
    """The picture moved by (x, y) pixels, its border going on."""
    h, w = picture.shape[-2:]
    ys, xs = torch.meshgrid(torch.arange(h) + 0.5 - y, torch.arange(w) + 0.5 - x, indexing="ij")
    grid = torch.stack([xs * 2 / w - 1, ys * 2 / h - 1], -1)[None]
    return F.grid_sample(picture, grid, mode="bicubic", padding_mode="border", align_corners=False)


def panning(speeds: list[tuple[float, float]], frames: int = 5, side: int = 32) -> Tensor:
    """Videos (N, 3, T, side, side), each a window on its own texture that moves by its speed a frame."""
    edge = 16
    rendered = []
    for seed, (x, y) in enumerate(speeds):
        picture = texture(side + 2 * edge, seed)
        views = [moved(picture, x * t, y * t)[..., edge:-edge, edge:-edge] for t in range(frames)]
        rendered.append(torch.stack(views, 2))
    return torch.cat(rendered)


@pytest.mark.parametrize(("x", "y"), [(0, 0), (3, 0), (0, -2), (-4, 4)])
def test_flow_of_a_whole_shift_is_exact(x, y):
    picture = texture()
    flow = dense_flow(picture, picture.roll((y, x), (2, 3)))[..., 10:-10, 10:-10]
    torch.testing.assert_close(
        flow, torch.tensor([x, y]).float()[None, :, None, None].expand_as(flow), rtol=0, atol=0.1
    )


def test_flow_sees_below_a_pixel():
    picture = texture()
    flow = dense_flow(picture, moved(picture, 1.4, -0.7))[..., 10:-10, 10:-10]
    assert (flow - torch.tensor([1.4, -0.7])[None, :, None, None]).norm(dim=1).mean() < 0.15


def test_flat_areas_stay_where_they_are():
    assert dense_flow(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16)).abs().max() == 0


def test_two_halves_that_part_have_their_own_flow():
    left, right = texture(seed=1)[..., :32], texture(seed=2)[..., :32]
    flow = dense_flow(torch.cat([left, right], 3), torch.cat([left.roll(-2, 3), right.roll(2, 2)], 3))
    torch.testing.assert_close(flow[0, :, 20:40, 10:20].mean((1, 2)), torch.tensor([-2.0, 0]), rtol=0, atol=0.1)
    torch.testing.assert_close(flow[0, :, 20:40, 44:54].mean((1, 2)), torch.tensor([0, 2.0]), rtol=0, atol=0.1)


def test_targets_belong_to_the_step_whose_last_frame_they_start_from():
    assert frames_of_latents(9, 3) == [0, 4, 8] and frames_of_latents(4, 4) == [0, 1, 2, 3]
    still = panning([(0, 0)], frames=9)
    video = still.clone()
    video[:, :, 5:] = still.roll(2, 4)[:, :, 5:]  # one jump, from frame 4 to frame 5
    flow = flow_targets(video, 3, (4, 4))
    assert flow.shape == (1, 2, 2, 4, 4)
    assert flow[:, :, 0].abs().max() < 0.05
    torch.testing.assert_close(flow[0, :, 1, 1:3, 1:3].mean((1, 2)), torch.tensor([2.0, 0]), rtol=0, atol=0.2)
    after = next_frame_targets(video, 3, (4, 4))
    torch.testing.assert_close(after[:, :, 1], F.avg_pool2d(video[:, :, 5], 8))
    tracks = track_targets(video, 3, (4, 4))
    assert tracks[:, :, 0].abs().max() < 0.3
    torch.testing.assert_close(tracks[0, :, 1, 1:3, 1:3].mean((1, 2)), torch.tensor([2.0, 0]), rtol=0, atol=0.3)


@pytest.mark.parametrize(("frames", "steps"), [(8, 3), (9, 1), (1, 2)])
def test_frames_that_do_not_fit_the_steps_are_refused(frames, steps):
    with pytest.raises(ValueError, match="frames must be 1"):
        frames_of_latents(frames, steps)


def test_a_grid_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="grid of 5x5 does not divide frames of 32x32"):
        flow_targets(panning([(0, 0)]), 2, (5, 5))
    with pytest.raises(ValueError, match="window 4 odd"):
        dense_flow(texture(), texture(), Matching(window=4))


def test_tracks_add_up_the_motion_between_steps():
    tracks = track_targets(panning([(1, 0.5)]), 2, (4, 4))
    inner = tracks[0, :, 0, 1:3, 1:3]
    torch.testing.assert_close(inner, torch.tensor([4.0, 2.0])[:, None, None].expand_as(inner), rtol=0, atol=0.3)


def test_points_are_carried_by_the_field_where_they_are():
    # the field's x displacement equals x: each step doubles x, where it is read and not where the point started
    centres = (torch.arange(8) + 0.5) * 4
    field = torch.zeros(1, 2, 2, 8, 8)
    field[:, 0] = centres
    points = follow(field, (32, 32))
    assert points.shape == (1, 2, 3, 8, 8)
    torch.testing.assert_close(points[0, 0, :, 3, 1], torch.tensor([6.0, 12.0, 24.0]))
    torch.testing.assert_close(points[0, 1, :, 3, 1], torch.tensor([14.0, 14.0, 14.0]))
    ramp = torch.arange(6.0).view(1, 1, 1, 6)
    assert sampled(ramp, torch.tensor([2.0, 0.5]).view(1, 2, 1, 1)).item() == pytest.approx(1.5)


def test_flow_of_generated_footage_is_as_long_as_its_truth():
    """The truth has the mean motion of a frame: ours follows it where nothing moves too fast."""
    found, expected = [], []
    for seed in range(3):
        stream, truth = render(seed, seconds=3, size=(96, 128))
        frames = [torch.tensor(frame).movedim(-1, 0)[None] / 127.5 - 1 for frame in stream]
        for first, last in truth.shots:
            t = (first + last) // 2
            if truth.motion[t] <= 2:
                found.append(dense_flow(frames[t - 1], frames[t]).norm(dim=1).mean().item())
                expected.append(truth.motion[t])
    assert len(found) >= 5 and max(expected) > 1
    assert np.corrcoef(found, expected)[0, 1] > 0.93
    assert np.abs(np.subtract(found, expected)).mean() < 0.15


SPEEDS = [(x, y) for x in (-2.0, -0.5, 1.0, 2.5) for y in (-2.0, 0.0, 1.5)]


@pytest.fixture(scope="module")
def panned() -> tuple[Tensor, Tensor]:
    videos = panning(SPEEDS, frames=9)
    return videos[::2], videos[1::2]


def holding(targets: Tensor, seed: int, channels: int = 12) -> Tensor:
    """Features (N, C, t, h, w) that are a fixed mixture of the targets and of noise, so that a linear head can find them."""
    noise = torch.randn(len(targets), channels - targets.shape[1], *targets.shape[2:], generator=seeded(seed))
    mix = torch.randn(channels, channels, generator=seeded(99)) + 3 * torch.eye(channels)
    mixed = torch.einsum("ck,nkthw->ncthw", mix, torch.cat([targets, noise], 1)) + 5
    return torch.cat([mixed, mixed[:, :, -1:]], 2)  # one step more than there are targets


def shuffled(features: Tensor) -> Tensor:
    rows = features.movedim(1, -1).flatten(0, -2)
    rows = rows[torch.randperm(len(rows), generator=seeded(1))]
    return rows.view(features.movedim(1, -1).shape).movedim(-1, 1)


def pairs_of(target, panned, spoil=lambda f: f):
    """Train and held-out pairs of features that hold a target, two batches each."""
    sides = [target(videos) for videos in panned]
    return [list(zip(spoil(holding(t, seed)).split(4), t.split(4), strict=True)) for seed, t in enumerate(sides)]


def test_a_flow_probe_finds_the_flow_that_the_features_hold(panned):
    train, heldout = pairs_of(lambda v: flow_targets(v, 3, (4, 4)), panned)
    score = flow_score(fit_probe(train, 1e-6), heldout)
    assert score["epe"] < 0.02 and score["baseline"] > 1


def test_a_next_frame_probe_finds_the_frame_that_the_features_hold(panned):
    train, heldout = pairs_of(lambda v: next_frame_targets(v, 3, (4, 4)), panned)
    score = next_frame_score(fit_probe(train, 1e-6), heldout)
    assert score["psnr"] > 40 and score["baseline"] < 20


def test_a_tracking_probe_finds_the_tracks_that_the_features_hold(panned):
    train, heldout = pairs_of(lambda v: track_targets(v, 3, (4, 4)), panned)
    score = tracking_score(fit_probe(train, 1e-6), heldout, (32, 32))
    assert score["error"] < 0.1 and score["within"] == 1
    assert score["error_baseline"] > 3 and score["within_baseline"] < 0.7


def test_shuffled_features_are_worth_no_more_than_the_mean(panned):
    flow = pairs_of(lambda v: flow_targets(v, 3, (4, 4)), panned, shuffled)
    score = flow_score(fit_probe(flow[0]), flow[1])
    assert score["epe"] > 0.9 * score["baseline"]
    frames = pairs_of(lambda v: next_frame_targets(v, 3, (4, 4)), panned, shuffled)
    score = next_frame_score(fit_probe(frames[0]), frames[1])
    assert score["psnr"] < score["baseline"] + 0.5
    tracks = pairs_of(lambda v: track_targets(v, 3, (4, 4)), panned, shuffled)
    score = tracking_score(fit_probe(tracks[0]), tracks[1], (32, 32))
    assert score["error"] > 0.9 * score["error_baseline"]


def test_the_probe_is_ridge_regression_with_a_free_bias():
    # one feature x in (0, 1, 2), target 3 x + 10: slope 3 / (1 + ridge), through the means
    features = torch.tensor([0.0, 1, 2]).view(3, 1, 1, 1, 1)
    probe = fit_probe([(features, 3 * features + 10)], ridge=0.5)
    torch.testing.assert_close(probe(features).flatten(), torch.tensor([13 - 2.0, 13, 13 + 2]).double())


def test_fitting_does_not_depend_on_order_or_batches(panned):
    train, _ = pairs_of(lambda v: flow_targets(v, 3, (4, 4)), panned)
    features, targets = (torch.cat(side) for side in zip(*train, strict=True))
    one, other = fit_probe(train), fit_probe([(features.flip(0), targets.flip(0))])
    torch.testing.assert_close(one.weights, other.weights)
    torch.testing.assert_close(one(features), other(features))


def test_scores_of_known_errors():
    # weights of nothing: the probe says the training mean, 0, of targets (+1, -1)
    features, targets = torch.tensor([0.0, 1, 0, 1]).view(4, 1, 1, 1, 1), torch.zeros(4, 2, 1, 1, 1)
    targets[:, 0, 0, 0, 0] = torch.tensor([1.0, 1, -1, -1])
    probe = fit_probe([(features, targets)])
    heldout = torch.zeros(4, 2, 1, 1, 1)
    heldout[:, 0], heldout[:, 1] = 3, 4
    assert flow_score(probe, [(features, heldout)]) == pytest.approx({"epe": 5.0, "baseline": 5.0})
    flat = torch.full((4, 2, 1, 1, 1), 0.2)
    assert next_frame_score(probe, [(features, flat)])["psnr"] == pytest.approx(20.0)
    score = tracking_score(probe, [(features, heldout)], (16, 16), threshold=5.5)
    assert score == pytest.approx(
        {"error": 5.0, "error_baseline": 5.0, "within": 1.0, "within_baseline": 1.0, "threshold": 5.5}
    )
    assert tracking_score(probe, [(features, heldout)], (16, 16), threshold=4.5)["within"] == 0


def test_points_that_left_the_picture_do_not_count():
    features = torch.tensor([0.0, 1]).view(2, 1, 1, 1, 1).expand(2, 1, 2, 1, 1)
    still = torch.zeros(2, 2, 2, 1, 1)
    probe = fit_probe([(features, still)])
    leaving = still.clone()
    leaving[0, 0] = torch.tensor([20.0, -20.0]).view(2, 1, 1)  # out at once, and back
    leaving[1, 0] = 3.0
    score = tracking_score(probe, [(features, leaving)], (16, 16))
    assert score["error"] == pytest.approx((3 + 6) / 2)
    with pytest.raises(ValueError, match="no point stays"):
        tracking_score(probe, [(features[:1], leaving[:1])], (16, 16))


def test_pairs_that_cannot_be_fitted_are_refused():
    features, targets = torch.rand(2, 3, 2, 4, 4), torch.rand(2, 2, 1, 4, 4)
    for pairs, said in (
        ([], "needs training pairs"),
        ([(features, targets[..., :2])], "do not fit each other"),
        ([(features, torch.rand(2, 2, 3, 4, 4))], "do not fit each other"),
        ([(torch.ones(2, 3, 2, 4, 4), targets)], "never change"),
    ):
        with pytest.raises(ValueError, match=said):
            fit_probe(pairs)
    with pytest.raises(ValueError, match="ridge must be above 0"):
        fit_probe([(features, targets)], ridge=0)
    probe = fit_probe([(features, targets)])
    with pytest.raises(ValueError, match="held-out pairs"):
        flow_score(probe, [])
    assert not math.isnan(flow_score(probe, [(features, targets)])["epe"])
