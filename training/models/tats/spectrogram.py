"""Sound as pictures, frame by frame: how much of each band of frequency there is at each of a frame's moments. Pure functions.

The frames of a window share its samples evenly, whatever the frame rate: of n samples in T frames, frame f has those from
f n / T to (f + 1) n / T.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, PositiveInt, model_validator
from torch import Tensor

_MEL_HZ, _MEL = 700.0, 2595.0  # of the usual scale, mel = 2595 log10(1 + hz / 700)


class Spectrogram(BaseModel):
    """The numbers of the pictures of a sound. The paper has none of them; its code has pictures, but not how they came.

    rate       samples a second, those of the dataset's sound
    rows       bands of frequency, the lowest first [paper's code: 64, enlarged from 45]
    columns    moments in a frame [paper's code: 16]
    scale      of the bands: mel, as wide as pitches sound, or linear, all alike [assumption: mel]
    highest    frequency in Hz, where the sound has it [assumption: 8000]
    window     seconds around a moment that are looked at, with Hann's weights [assumption: 0.032]
    low, high  values, log(1 + magnitude), that become -1 and 1: the least and the greatest of training clips
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate: PositiveInt
    rows: PositiveInt = 64
    columns: PositiveInt = 16
    scale: Literal["mel", "linear"] = "mel"
    highest: PositiveFloat = 8000.0
    window: float = Field(0.032, gt=0, le=1)
    low: float = 0.0
    high: float = 5.0

    @model_validator(mode="after")
    def _rises(self) -> Spectrogram:
        if not self.low < self.high:
            raise ValueError(f"low {self.low:g} must be below high {self.high:g}")
        return self

    @property
    def taps(self) -> int:
        """Samples around a moment, an even number."""
        return max(2, 2 * round(self.rate * self.window / 2))

    def samples(self, frames: int, fps: float) -> int:
        """Samples of so many frames."""
        return round(frames * self.rate / fps)


def pictures(sound: Tensor, frames: int, spectrogram: Spectrogram) -> Tensor:
    """Samples `(B, n)` of `frames` frames as their pictures in [-1, 1], `(B, 1, frames, rows, columns)`."""
    low, high = spectrogram.low, spectrogram.high
    scaled = (magnitudes(sound, frames, spectrogram) - low) / (high - low)
    return (scaled.clamp(0, 1) * 2 - 1).unsqueeze(1)


def magnitudes(sound: Tensor, frames: int, spectrogram: Spectrogram) -> Tensor:
    """log(1 + magnitude) of the pictures, `(B, frames, rows, columns)`; before and after the samples is silence."""
    columns, taps = spectrogram.columns, spectrogram.taps
    # in float64, since moments are counted in samples
    numbers = torch.arange(frames * columns, device=sound.device, dtype=torch.float64)
    moments = ((numbers + 0.5) * sound.shape[1] / (frames * columns)).floor().long()
    heard = F.pad(sound.float(), (taps // 2, taps // 2))
    around = heard[:, moments[:, None] + torch.arange(taps, device=sound.device)]
    hann = torch.hann_window(taps, device=sound.device)
    spectrum = torch.fft.rfft(around * hann, dim=-1).abs()
    bands = spectrum @ _bands(spectrogram).to(spectrum, non_blocking=True).T
    return bands.log1p().unflatten(1, (frames, columns)).transpose(2, 3)


def loudness_range(levels: Iterable[Tensor]) -> tuple[float, float]:
    """The least and the greatest of the magnitudes of clips, for `low` and `high`, rounded outwards to hundredths."""
    low, high = math.inf, -math.inf
    for level in levels:
        low, high = min(low, float(level.min())), max(high, float(level.max()))
    low, high = math.floor(low * 100) / 100, math.ceil(high * 100) / 100
    return low, max(high, low + 0.01)


def _bands(spectrogram: Spectrogram) -> Tensor:
    """The share of each frequency of the transform in each band, `(rows, frequencies)`: triangles that overlap by half.

    None is narrower than the transform can tell apart, so that each has some.
    """
    top, count = min(spectrogram.highest, spectrogram.rate / 2), spectrogram.taps // 2 + 1
    step = spectrogram.rate / spectrogram.taps
    hz = torch.arange(count, dtype=torch.float64) * step
    edges = torch.linspace(0, 1, spectrogram.rows + 2, dtype=torch.float64)
    if spectrogram.scale == "mel":
        edges = _MEL_HZ * (10 ** (edges * _MEL * math.log10(1 + top / _MEL_HZ) / _MEL) - 1)
    else:
        edges = edges * top
    middle = edges[1:-1, None]
    below, above = (sides.clamp_min(step)[:, None] for sides in (edges[1:-1] - edges[:-2], edges[2:] - edges[1:-1]))
    weights = torch.minimum(1 - (middle - hz) / below, 1 - (hz - middle) / above).clamp_min(0)
    return (weights / weights.sum(1, keepdim=True)).float()
