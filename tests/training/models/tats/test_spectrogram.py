"""Sound as pictures: pitches in their rows, moments in their columns, frame by frame at any rate."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from longtake.training.models.tats.spectrogram import Spectrogram, _bands, loudness_range, magnitudes, pictures

RATE = 16_000


def spectrogram(**changed: Any) -> Spectrogram:
    return Spectrogram(**{"rate": RATE} | changed)


def tone(hz: float, seconds: float = 1.0, rate: int = RATE) -> Tensor:
    return 0.5 * torch.sin(2 * math.pi * hz * torch.arange(round(seconds * rate)) / rate)[None]


def test_a_pitch_is_bright_in_its_row_by_either_scale() -> None:
    for hz in (300.0, 1200.0, 5000.0):
        for scale in ("linear", "mel"):
            picture = pictures(tone(hz), 12, spectrogram(scale=scale))
            assert picture.shape == (1, 1, 12, 64, 16) and picture.abs().max() <= 1
            place = hz / 8000 if scale == "linear" else math.log10(1 + hz / 700) / math.log10(1 + 8000 / 700)
            brightest = picture[0, 0, 2:-2].mean((0, 2)).argmax().item()
            assert abs(brightest + 1 - place * 65) < 1.2, (hz, scale)


@pytest.mark.parametrize("fps", [25.0, 12.0, 30_000 / 1001])
def test_a_click_is_in_the_column_of_its_moment(fps: float) -> None:
    frames, columns = 20, 8
    chosen = spectrogram(columns=columns, window=0.004)
    total = chosen.samples(frames, fps)
    for frame, column in ((0, 0), (7, 3), (13, 7), (19, 7)):
        at = (frame + (column + 0.5) / columns) / fps
        sound = torch.zeros(1, total)
        sound[0, int(at * RATE)] = 1.0
        loud = magnitudes(sound, frames, chosen)[0].sum(1)
        assert divmod(loud.flatten().argmax().item(), columns) == (frame, column)
    # a frame has the samples of its time alone, and its neighbours those of theirs
    sound = torch.zeros(1, total)
    sound[0, round(7 * total / frames) : round(8 * total / frames)] = torch.randn(round(total / frames) + 1)[
        : round(8 * total / frames) - round(7 * total / frames)
    ]
    loud = magnitudes(sound, frames, chosen)[0].sum((1, 2))
    assert loud[7] > 4 * loud.sum() / 5 and loud[[*range(6), *range(9, 20)]].max() == 0


def test_magnitudes_are_those_of_the_short_time_fourier_transform() -> None:
    frames, hop = 5, 40
    chosen = spectrogram(columns=16, rows=4, scale="linear")
    sound = torch.randn(2, frames * 16 * hop, generator=torch.Generator().manual_seed(0))
    half = chosen.taps // 2
    padded = torch.nn.functional.pad(sound, (half - hop // 2, half))
    spectrum = torch.stft(
        padded, chosen.taps, hop, window=torch.hann_window(chosen.taps), center=False, return_complex=True
    )
    expected = torch.einsum("rk,bkn->brn", _bands(chosen), spectrum.abs()[..., : frames * 16]).log1p()
    found = magnitudes(sound, frames, chosen).transpose(1, 2).flatten(2)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("changed", [{}, {"scale": "linear"}, {"rows": 256}, {"window": 0.002}, {"rate": 48_000}])
def test_each_band_is_a_mean_of_some_frequencies(changed: dict[str, Any]) -> None:
    bands = _bands(spectrogram(**changed))
    torch.testing.assert_close(bands.sum(1), torch.ones(len(bands)))
    assert bands.isfinite().all() and bands.min() == 0
    middles = (bands * torch.arange(bands.shape[1])).sum(1)
    assert (middles.diff() > -0.5).all() and middles[-1] > middles[0] + 1


def test_the_least_and_the_greatest_of_clips_are_the_ends_of_the_range() -> None:
    chosen = spectrogram()
    levels = [magnitudes(sound, 10, chosen) for sound in (tone(300), 0.1 * tone(900))]
    low, high = loudness_range(levels)
    assert low <= min(level.min() for level in levels) and high >= max(level.max() for level in levels)
    assert high - max(level.max() for level in levels) < 0.01
    scaled = chosen.model_copy(update={"low": low, "high": high})
    both = torch.cat([pictures(sound, 10, scaled) for sound in (tone(300), 0.1 * tone(900))])
    assert both.max() > 0.98 and both.min() < -0.98
    assert pictures(4 * tone(300), 10, scaled).max() == 1
    assert loudness_range([torch.zeros(1, 1, 2, 2)]) == (0.0, 0.01), "of silence alone there still is a range"


def test_a_range_that_does_not_rise_is_refused() -> None:
    with pytest.raises(ValidationError, match="low 5 must be below high 5"):
        spectrogram(low=5)
