"""Rectified flow: the target is exact, Euler follows it, Gaussians come out right, clean frames stay clean."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.training.models.common import flow
from longtake.training.models.common.condition import NO_CLASS, Condition, of_classes
from longtake.training.models.common.guidance import Guidance

pytestmark = pytest.mark.usefixtures("one_thread")


def seeded(seed: int = 7) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    """Data and noise."""
    return torch.randn(shape, generator=seeded(1)) * 2 + 0.5, torch.randn(shape, generator=seeded(2))


@pytest.mark.parametrize("per_frame", [False, True])
def test_data_comes_back_exactly_from_any_point_of_the_line_and_the_target(per_frame):
    x0, noise = pair(3, 4, 5, 2, 2)
    t = torch.rand(3, 5, generator=seeded()) if per_frame else torch.rand(3, generator=seeded())
    x_t = flow.interpolate(x0, noise, t)
    over = t[:, None, :, None, None] if per_frame else t[:, None, None, None, None]
    torch.testing.assert_close(x_t - over * flow.target(x0, noise), x0, rtol=0, atol=1e-6)


def test_the_line_runs_from_data_to_noise_and_the_target_is_its_slope():
    x0, noise = pair(2, 4, 5, 2, 2)
    assert torch.equal(flow.interpolate(x0, noise, torch.zeros(2)), x0)
    assert torch.equal(flow.interpolate(x0, noise, torch.ones(2)), noise)
    slope = (
        flow.interpolate(x0, noise, torch.full((2,), 0.75)) - flow.interpolate(x0, noise, torch.full((2,), 0.25))
    ) / 0.5
    torch.testing.assert_close(slope, flow.target(x0, noise), rtol=0, atol=1e-5)


def test_each_frame_has_its_own_time_and_a_clean_one_is_byte_clean():
    x0, noise = pair(1, 4, 3, 2, 2)
    x_t = flow.interpolate(x0, noise, torch.tensor([[0.0, 0.5, 1.0]]))
    assert torch.equal(x_t[:, :, 0], x0[:, :, 0])
    assert torch.equal(x_t[:, :, 2], noise[:, :, 2])
    torch.testing.assert_close(x_t[:, :, 1], (x0[:, :, 1] + noise[:, :, 1]) / 2)


def test_everything_is_fp32_whatever_comes_in():
    x0, noise = (x.bfloat16() for x in pair(2, 4, 3, 2, 2))
    t = torch.full((2,), 0.3)
    values = (
        flow.interpolate(x0, noise, t),
        flow.target(x0, noise),
        flow.loss(x0, x0, noise),
    )
    assert {v.dtype for v in values} == {torch.float32}
    torch.testing.assert_close(flow.interpolate(x0, noise, t), 0.7 * x0.float() + 0.3 * noise.float())


@pytest.mark.parametrize(("mean", "std", "shift"), [(0.0, 1.0, 1.0), (0.2, 1.0, 1.0), (-0.5, 0.7, 3.0)])
def test_times_are_shifted_logit_normal(mean, std, shift):
    t = flow.sample_t(40_000, mean, std, shift, seeded())
    assert t.dtype == torch.float32
    assert 0 < t.min() < t.max() < 1
    unshifted = t / (shift - (shift - 1) * t)
    logits = torch.logit(unshifted.double())
    assert logits.mean().item() == pytest.approx(mean, abs=0.02)
    assert logits.std().item() == pytest.approx(std, abs=0.02)
    assert torch.equal(t, flow.sample_t(40_000, mean, std, shift, seeded()))


def test_shifting_keeps_the_ends_and_moves_the_middle_towards_noise():
    t = torch.tensor([0.0, 0.5, 1.0])
    torch.testing.assert_close(flow.shifted(t, 3.0), torch.tensor([0.0, 0.75, 1.0]))
    torch.testing.assert_close(flow.shifted(t, 1.0), t)


def test_as_many_samples_are_conditioned_as_asked_on_every_number_of_frames_but_all():
    clean = flow.sample_conditioning(20_000, 5, 0.3, seeded())
    assert (clean > 0).float().mean().item() == pytest.approx(0.3, abs=0.01)
    shares = torch.bincount(clean, minlength=6) / len(clean)
    torch.testing.assert_close(shares[1:5], torch.full((4,), 0.3 / 4), rtol=0, atol=0.01)
    assert shares[5] == 0
    assert not flow.sample_conditioning(100, 1, 1.0, seeded()).any(), "an image has no frame to be given"
    assert not flow.sample_conditioning(100, 5, 0.0, seeded()).any()
    assert flow.sample_conditioning(100, 5, 1.0, seeded()).all()


def test_noised_frames_come_after_the_clean_ones():
    assert flow.noised_frames(torch.tensor([0, 2]), 3).tolist() == [[1, 1, 1], [0, 0, 1]]


def test_the_loss_is_the_mean_square_per_sample_over_the_counted_frames():
    x0, noise = pair(3, 4, 5, 2, 2)
    wrong = torch.randn(x0.shape, generator=seeded(3))
    velocity = flow.target(x0, noise) + wrong
    torch.testing.assert_close(flow.loss(velocity, x0, noise), wrong.square().flatten(1).mean(1))
    counted = flow.noised_frames(torch.tensor([0, 2, 5]), 5)
    expected = torch.stack([wrong[0].square().mean(), wrong[1, :, 2:].square().mean(), torch.tensor(0.0)])
    velocity[1, :, :2] = float("nan")
    torch.testing.assert_close(flow.loss(velocity, x0, noise, counted), expected)


def test_the_training_loss_of_the_true_velocity_is_zero_and_clean_frames_do_not_count():
    x0 = pair(16, 4, 5, 2, 2)[0]
    seen = []

    def knows(x: Tensor, t: Tensor) -> Tensor:
        seen.append(t)
        t = t[:, None, :, None, None]
        return torch.where(t > 0, (x - x0) / t.clamp(min=1e-6), torch.full_like(x, 99.0))  # from x_t = x0 + t v

    losses = flow.training_loss(knows, x0, seeded(), conditioning=0.5)
    torch.testing.assert_close(losses, torch.zeros(16), rtol=0, atol=1e-6)
    clean = (seen[0] == 0).sum(1)
    assert {0, 1, 2} <= set(clean.tolist())
    assert all((row[:n] == 0).all() and (row[n:] == row[-1]).all() for row, n in zip(seen[0], clean, strict=True))


def test_without_conditioning_a_sample_has_one_time():
    x0, times = pair(4, 2, 3, 2, 2)[0], []
    flow.training_loss(lambda x, t: times.append(t) or torch.zeros_like(x), x0, seeded())
    assert times[0].shape == (4,)


@pytest.mark.parametrize(("steps", "shift"), [(1, 1.0), (1, 3.0), (7, 3.0)])
def test_euler_on_the_true_velocity_recovers_the_data(steps, shift):
    x0, noise = pair(2, 4, 3, 2, 2)
    made = flow.euler(lambda x, t: flow.target(x0, noise), noise, steps, shift)
    torch.testing.assert_close(made, x0, rtol=0, atol=1e-5)


def test_euler_steps_from_noise_to_data_at_shifted_times():
    times, steps = [], []
    noise = pair(2, 4, 3, 2, 2)[1]
    flow.euler(lambda x, t: times.append(t) or torch.zeros_like(x), noise, 4, 3.0, each_step=lambda: steps.append(1))
    torch.testing.assert_close(torch.stack(times)[:, 0], flow.shifted(torch.tensor([1.0, 0.75, 0.5, 0.25]), 3.0))
    assert len(steps) == 4
    assert times[0].shape == (2,)


def test_samples_of_a_gaussian_have_its_mean_and_variance():
    """For N(m, s²) the best velocity is known: E[ε - x0 | x_t] of two joint Gaussians."""
    m, s = 1.5, 0.4

    def optimal(x: Tensor, t: Tensor) -> Tensor:
        t = t.view(-1, 1, 1, 1, 1)
        variance = (1 - t) ** 2 * s**2 + t**2
        away = (x - (1 - t) * m) / variance
        return t * away - (m + (1 - t) * s**2 * away)

    noise = torch.randn(64, 4, 4, 4, 4, generator=seeded())
    for shift in (1.0, 3.0):
        made = flow.euler(optimal, noise, 200, shift)
        assert made.mean().item() == pytest.approx(m, abs=0.01)
        assert made.std().item() == pytest.approx(s, rel=0.03)


def test_given_frames_are_seen_clean_at_every_step_and_are_not_returned():
    x0, noise = pair(2, 4, 5, 2, 2)
    clean, rest, times = x0[:, :, :2], noise[:, :, 2:], []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        assert torch.equal(x[:, :, :2], clean)
        assert (t[:, :2] == 0).all()
        times.append(t[:, 2:])
        return flow.target(x0, noise) + 0 * x

    made = flow.euler(velocity, rest, 5, clean=clean)
    torch.testing.assert_close(made, x0[:, :, 2:], rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.stack(times)[:, 0, 0], torch.tensor([1.0, 0.8, 0.6, 0.4, 0.2]))
    assert times[0].shape == (2, 3)


def test_guidance_extrapolates_from_no_class_to_the_class_in_one_call():
    x, calls = torch.zeros(2, 1, 1, 1, 1), []

    def velocity(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        calls.append(condition.classes)
        return x + condition.classes.float().view(-1, 1, 1, 1, 1) * t.view(-1, 1, 1, 1, 1)

    condition, t = of_classes([3, 5]), torch.tensor([1.0, 0.5])
    made = flow.guided(velocity, condition, 4.0)(x, t).flatten()
    assert made.tolist() == [-1 + 4 * (3 + 1), -0.5 + 4 * (2.5 + 0.5)]
    assert [c.tolist() for c in calls] == [[3, 5, NO_CLASS, NO_CLASS]]


def test_guidance_1_is_no_guidance_and_costs_none():
    x, calls = torch.randn(2, 1, 1, 1, 1), []

    def velocity(x: Tensor, t: Tensor, condition: Any) -> Tensor:
        calls.append(len(x))
        return x + condition.classes.float().view(-1, 1, 1, 1, 1)

    condition, t = of_classes([3, 5]), torch.ones(2)
    plain = flow.guided(velocity, condition, 1.0)(x, t)
    assert torch.equal(plain, velocity(x, t, condition))
    torch.testing.assert_close(flow.guided(velocity, condition, 1.0 + 1e-7)(x, t), plain, rtol=0, atol=1e-5)
    assert calls == [2, 2, 4]


def worded(*values: float, classes: list[int] | None = None) -> Condition:
    """A text of one token for each sample; 0 is none."""
    text = torch.tensor(values).view(-1, 1, 1)
    return Condition(None if classes is None else torch.tensor(classes), text, text[..., 0] != 0)


def adds(calls: list[int]) -> Any:
    """A velocity of 10 for each class and 1 for each text, which both of them change too."""

    def velocity(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        calls.append(len(x))
        none = torch.full((len(x),), NO_CLASS)
        by_class = 1 + (none if condition.classes is None else condition.classes).float()
        by_text = torch.zeros(len(x)) if condition.text is None else (condition.text[..., 0] * condition.mask).sum(1)
        return x + (10 * by_class + by_text + by_class * by_text).view(-1, 1, 1, 1, 1)

    return velocity


def test_class_and_text_are_led_to_one_after_the_other() -> None:
    x, t, calls = torch.zeros(1, 1, 1, 1, 1), torch.ones(1), list[int]()
    condition = worded(3.0, classes=[1])
    none, by_class, both = 0.0, 20.0, 20.0 + 3.0 + 6.0
    for guidance, expected, count in (
        (Guidance(2.0, 5.0), none + 2 * (by_class - none) + 5 * (both - by_class), 3),
        (Guidance(1.0, 5.0), by_class + 5 * (both - by_class), 2),
        (Guidance(4.0, 1.0), none + 4 * (by_class - none) + 1 * (both - by_class), 3),
        (Guidance(4.0, 4.0), none + 4 * (both - none), 2),
        (4.0, none + 4 * (both - none), 2),
        (Guidance(1.0, 1.0), both, 1),
    ):
        calls.clear()
        assert flow.guided(adds(calls), condition, guidance)(x, t).item() == pytest.approx(expected)
        assert calls == [count], "one call"


def test_a_sound_is_led_to_last_and_parts_with_one_guidance_at_once() -> None:
    def velocity(x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        calls.append(len(x))
        assert condition.audio is not None
        heard = (condition.audio[:, 0, 0] + 1).float().view(-1, 1, 1, 1, 1)
        return adds([])(x, t, condition) * (1 + heard) + heard

    x, t, calls = torch.zeros(1, 1, 1, 1, 1), torch.ones(1), list[int]()
    condition = replace(worded(3.0, classes=[1]), audio=torch.tensor([[[1]]]))
    none, by_class, by_text, all_, heard = 0.0, 20.0, 29.0, 89.0, 2.0
    for guidance, expected, count in (
        (Guidance(2.0, 5.0, 3.0), none + 2 * (by_class - none) + 5 * (by_text - by_class) + 3 * (all_ - by_text), 4),
        (Guidance(audio=3.0), by_text + 3 * (all_ - by_text), 2),
        (Guidance(4.0, 3.0, 3.0), none + 4 * (by_class - none) + 3 * (all_ - by_class), 3),
        (2.0, none + 2 * (all_ - none), 2),
        (1.0, all_, 1),
    ):
        calls.clear()
        assert flow.guided(velocity, condition, guidance)(x, t).item() == pytest.approx(expected)
        assert calls == [count], "one call"
    alone = Condition(audio=condition.audio)
    assert flow.guided(velocity, alone, Guidance(2.0, 5.0, 3.0))(x, t).item() == pytest.approx(3 * heard)
    assert flow.guided(velocity, alone.null, Guidance(2.0, 5.0, 3.0))(x, t).item() == 0


def test_guidance_is_that_of_what_is_asked_for() -> None:
    x, t, calls = torch.zeros(1, 1, 1, 1, 1), torch.ones(1), list[int]()
    guidance = Guidance(classes=2.0, text=5.0)
    assert flow.guided(adds(calls), worded(3.0, classes=[NO_CLASS]), guidance)(x, t).item() == 15
    assert flow.guided(adds(calls), worded(0.0, classes=[1]), guidance)(x, t).item() == 40
    assert flow.guided(adds(calls), worded(3.0), guidance)(x, t).item() == 15
    assert flow.guided(adds(calls), worded(0.0), guidance)(x, t).item() == 0
    assert calls == [2, 2, 2, 1]


def test_a_negative_text_is_led_away_from() -> None:
    x, t, calls = torch.zeros(2, 1, 1, 1, 1), torch.ones(2), list[int]()
    away = worded(2.0, 0.0)
    made = flow.guided(adds(calls), worded(3.0, 3.0), 4.0, away)(x, t).flatten()
    assert made.tolist() == [2 + 4 * (3 - 2), 4 * 3]
    alone = flow.guided(adds(calls), None, 4.0, away)(x, t).flatten()
    assert alone.tolist() == [2 + 4 * (0 - 2), 0]
    classes = flow.guided(adds(calls), of_classes([1, 1]), Guidance(2.0, 3.0), away)(x[:], t).flatten()
    assert classes[1].item() == 40, "where nothing is led away from, the class has its own guidance"
    assert flow.guided(adds(calls), worded(3.0, 3.0), 1.0, away)(x, t).flatten().tolist() == [3, 3]


def test_sampling_needs_a_step():
    with pytest.raises(ValueError, match=r"^steps is 0; sampling needs at least 1$"):
        flow.euler(lambda x, t: x, torch.zeros(1, 1, 1, 1, 1), 0)
