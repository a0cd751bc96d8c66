"""What a gap begins from: noise of unit variance, with as much of the clips beside it as the formula says and no more."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from longtake.training.models.mavin.mixer import LEAST, Mixer, cutoffs, initial, mix, nearest, over_time, per_frame

pytestmark = pytest.mark.usefixtures("one_thread")


def latents(seed: int, count: int = 5, channels: int = 6, size: tuple[int, int] = (16, 16)) -> Tensor:
    """Smooth as latents are, of unit variance: `(C, count, h, w)`, all alike in time."""
    noise = torch.randn(channels, 1, *size, generator=torch.Generator().manual_seed(seed))
    smooth = torch.nn.functional.avg_pool2d(noise, 5, 1, 2)
    smooth = (smooth - smooth.mean()) / smooth.std()
    return smooth.expand(-1, count, -1, -1)


def corr(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1])


ARMS: list[dict[str, Any]] = [
    {"kind": "none"},
    *({"kind": kind, "noise": noise} for kind in ("paper", "per_frame") for noise in ("same", "fresh")),
]


@pytest.mark.parametrize("length", [1, 2, 7, 8, 22])
@pytest.mark.parametrize("arm", ARMS, ids=lambda arm: "-".join(arm.values()))
def test_any_mixer_keeps_unit_variance_at_any_length(arm: dict[str, Any], length: int) -> None:
    made = torch.stack(
        [initial(Mixer(**arm), latents(1), latents(2), length, (seed,)) for seed in range(1 + 40 // length)]
    )
    assert made.shape[1:] == (6, length, 16, 16) and made.dtype == torch.float32
    assert made.isfinite().all()
    each = made.transpose(0, 2).flatten(1).std(1)  # of each latent
    assert ((each - 1).abs() < 0.05).all(), each


def test_the_released_weights_lose_variance_with_fresh_noise_which_roots_keep() -> None:
    low, high = (torch.randn(4, 64, 64, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    lpf = per_frame(torch.tensor([0.6], dtype=torch.float64), (64, 64))
    plain, kept = (float(mix(low, high, lpf, (-2, -1), keep).std()) for keep in (False, True))
    expected = float((lpf.square() + (1 - lpf).square()).mean().sqrt())
    assert plain == pytest.approx(expected, abs=0.01) and expected < 0.85
    assert kept == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("kind", ["paper", "per_frame"])
def test_with_the_same_noise_a_gap_has_the_boundary_at_an_amplitude_of_the_signal_at_most(kind: Any) -> None:
    """The algebra: the result is η + LPF (s x0 + (√(1 - s²) - 1) η)."""
    mixer, before, after = Mixer(kind), latents(1), latents(2)
    made = initial(mixer, before, after, 8, (3,))
    eta = initial(Mixer(), before, after, 8, (3,))
    assert corr(made[:, 0] - eta[:, 0], before[:, 0]) > 0.02
    share = (made - eta).std()
    assert float(share) < mixer.signal + 0.003
    if kind == "per_frame":
        x0 = nearest(before, after, 8)
        root = math.sqrt(1 - mixer.signal**2)
        lpf = per_frame(cutoffs(8, 0.6, 0.1), (16, 16))
        more = mix(mixer.signal * x0 + (root - 1) * eta, torch.zeros_like(eta), lpf, (-2, -1), False)
        torch.testing.assert_close(made, eta + more)


def test_a_latent_of_a_gap_has_its_own_boundary_and_less_of_it_further_in() -> None:
    before, after = latents(1), latents(2)
    rows = torch.stack([initial(Mixer("per_frame", cutoff=0.4), before, after, 8, (seed,)) for seed in range(60)])
    left = [corr(rows[:, :, n], before[:, 0].expand(60, -1, -1, -1)) for n in range(8)]
    right = [corr(rows[:, :, n], after[:, 0].expand(60, -1, -1, -1)) for n in range(8)]
    assert all(0.02 < value < 0.08 for value in (left[0], left[1], right[-1], right[-2]))
    assert left[0] > left[3] + 0.005 and right[-1] > right[4] + 0.005
    assert max(map(abs, left[4:])) < 0.02 and max(map(abs, right[:4])) < 0.02


def test_a_cut_off_without_end_is_x_t_itself() -> None:
    before, after = latents(1), latents(2)
    eta = initial(Mixer(), before, after, 6, (3,))
    mixer = Mixer("per_frame", cutoff=math.inf)
    expected = mixer.signal * nearest(before, after, 6) + math.sqrt(1 - mixer.signal**2) * eta
    torch.testing.assert_close(initial(mixer, before, after, 6, (3,)), expected, rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 9), (1, 1, 1), (2, 3, 4)])
@pytest.mark.parametrize("keep", [True, False])
def test_a_filter_of_one_or_of_zero_is_the_identity_to_the_bit(shape: tuple[int, int, int], keep: bool) -> None:
    low, high = (torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    assert torch.equal(mix(low, high, torch.ones(shape).double(), (-3, -2, -1), keep), low)
    assert torch.equal(mix(low, high, torch.zeros(shape).double(), (-3, -2, -1), keep), high)
    half = mix(low, low, torch.full(shape, 0.5).double(), (-3, -2, -1), False)
    torch.testing.assert_close(half, low)


@pytest.mark.parametrize("shape", [(4, 6, 8), (5, 7, 9), (20, 5, 4), (13, 1, 2)])
def test_filters_are_symmetric_so_that_nothing_is_lost_with_the_imaginary_part(shape: tuple[int, int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for length in (1, 2, 3, min(8, shape[0])):
        cut = cutoffs(length, 0.6, 0.1)
        whole = torch.fft.ifftn(torch.fft.fftn(x) * over_time(cut, shape))
        assert whole.imag.abs().max() < 1e-12
        frames = torch.fft.ifftn(torch.fft.fftn(x, dim=(1, 2)) * per_frame(cut[:1], shape[1:]), dim=(1, 2))
        assert frames.imag.abs().max() < 1e-12


def test_cut_offs_fall_towards_the_middle_and_stay_positive() -> None:
    assert cutoffs(6, 0.6, 0.1).tolist() == pytest.approx([0.6, 0.5, 0.4, 0.4, 0.5, 0.6])
    assert cutoffs(5, 0.6, 0.1).tolist() == pytest.approx([0.6, 0.5, 0.4, 0.5, 0.6])
    assert float(cutoffs(40, 0.6, 0.1).min()) == LEAST


def test_in_the_released_filter_the_lowest_frequency_of_time_has_the_lowest_cut_off() -> None:
    found = over_time(cutoffs(6, 0.6, 0.1), (32, 9, 9))
    across = found[:, 0, 1]  # at one frequency of space
    wide = torch.exp(torch.tensor(-((2 / 9) ** 2)) / (2 * 0.4**2))
    assert float(across[0]) == pytest.approx(float(wide), abs=1e-6)
    assert (found[3:-2] == 0).all() and (found[[0, 1, 2, -1, -2]] > 0).all()


def test_noise_depends_on_its_numbers_alone() -> None:
    before, after = latents(1), latents(2)
    for arm in ARMS:
        one, again, other = (initial(Mixer(**arm), before, after, 5, draws) for draws in ((7, 1), (7, 1), (7, 2)))
        assert torch.equal(one, again) and not torch.equal(one, other)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"kind": "code"}, "mixer: 'code' is neither"),
        ({"noise": "new"}, "noise: 'new' is neither"),
        ({"cutoff": 0.0}, "cutoff is 0.0"),
        ({"fall": -1.0}, "fall -1.0"),
        ({"signal": 1.5}, "signal is 1.5"),
    ],
)
def test_what_no_mixer_can_be_is_said(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Mixer(**fields)
