"""PSNR and SSIM of clips: known values, an independent oracle, one value a clip."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter
from torchmetrics.functional import image as reference

from longtake.training.metrics.reconstruction import psnr, psnr_by_frame, ssim, ssim_by_frame


def clips(seed: int, batch: int = 2, frames: int = 3, side: int = 24) -> torch.Tensor:
    return torch.rand(batch, 3, frames, side, side, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_of_a_constant_error_is_known():
    source = torch.zeros(2, 3, 4, 8, 8)
    made = source.clone()
    made[0] += 0.2  # a tenth of the range: 20 dB
    made[1] += 0.02
    torch.testing.assert_close(psnr(made, source), torch.tensor([20.0, 40.0]))


def test_psnr_and_ssim_are_those_of_torchmetrics():
    source = clips(2)
    made = (source + 0.3 * clips(3)).clamp(-1, 1)
    for index in range(2):
        frames = [clip[index].transpose(0, 1) for clip in (made, source)]
        whole = reference.peak_signal_noise_ratio(*frames, data_range=(-1.0, 1.0))
        assert psnr(made, source)[index].item() == pytest.approx(whole.item(), abs=1e-4)
        units = [(each + 1) / 2 for each in frames]
        for number, pair in enumerate(zip(*units, strict=True)):
            one = [frame[None] for frame in pair]
            found = reference.peak_signal_noise_ratio(*one, data_range=1.0)
            assert psnr_by_frame(made, source)[index, number].item() == pytest.approx(found.item(), abs=1e-4)
            found = reference.structural_similarity_index_measure(*one, data_range=1.0)
            assert ssim_by_frame(made, source)[index, number].item() == pytest.approx(found.item(), abs=1e-4)


def test_ssim_of_equal_clips_is_one_and_of_noise_near_zero():
    video = clips(0)
    torch.testing.assert_close(ssim(video, video), torch.ones(2))
    assert ssim(video, clips(1)).abs().max() < 0.1


def test_ssim_of_two_flat_clips_is_the_luminance_term():
    a, b, c1 = 0.6, 0.3, 0.01**2  # in 0..1
    expected = (2 * a * b + c1) / (a * a + b * b + c1)
    value = ssim(torch.full((1, 3, 2, 16, 16), 2 * a - 1), torch.full((1, 3, 2, 16, 16), 2 * b - 1))
    assert value.item() == pytest.approx(expected, rel=1e-3)  # variances of flat frames are of rounding


def test_ssim_is_that_of_the_paper_frame_by_frame():
    source = clips(2)
    made = (source + 0.3 * clips(3)).clamp(-1, 1)

    def blur(x):
        return gaussian_filter(x, 1.5, mode="mirror", truncate=3.5)

    def of_plane(x, y):
        mx, my = blur(x), blur(y)
        vx, vy, vxy = blur(x * x) - mx * mx, blur(y * y) - my * my, blur(x * y) - mx * my
        c1, c2 = 0.01**2, 0.03**2
        return ((2 * mx * my + c1) * (2 * vxy + c2) / ((mx * mx + my * my + c1) * (vx + vy + c2))).mean()

    for index, value in enumerate(ssim(made, source).tolist()):
        pixels = [((clip[index].double() + 1) / 2).flatten(0, 1).numpy() for clip in (made, source)]
        pairs = zip(*pixels, strict=True)
        assert value == pytest.approx(np.mean([of_plane(x, y) for x, y in pairs]), abs=1e-4)


def test_the_negative_of_noise_is_as_unlike_as_can_be():
    assert ssim(clips(7), -clips(7)).max() < -0.5


def test_a_clip_does_not_change_the_ssim_of_its_neighbour():
    source, made = clips(4), clips(5)
    torch.testing.assert_close(ssim(made, source)[1:], ssim(made[1:], source[1:]))


def test_ssim_refuses_what_is_too_small_or_unlike():
    with pytest.raises(ValueError, match="sides above 5"):
        ssim(torch.zeros(1, 3, 1, 4, 16), torch.zeros(1, 3, 1, 4, 16))
    with pytest.raises(ValueError, match="of one shape"):
        ssim(clips(0), clips(0, frames=2))


def test_ssim_of_bf16_clips_is_computed_in_fp32():
    video = clips(6)
    value = ssim(video.bfloat16(), video)
    assert value.dtype == torch.float32
    assert not math.isnan(value.sum().item()) and value.min() > 0.99
