"""The VQGAN of sound: that of videos, for pictures of one channel that sound is drawn in (see `spectrogram`)."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator
from torch import Tensor

from longtake.training.models.tats.spectrogram import Spectrogram, pictures
from longtake.training.models.tats.vqgan import VQGAN, VQGANConfig

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "sound_vqgan_paper": dict(width=32, codes=1024, code_width=256, downsample=(4, 8, 8)),
    "sound_vqgan_tiny":  dict(width=8,  codes=128,  code_width=32,  downsample=(4, 4, 4), restart=0.1),
}
# fmt: on


class SoundVQGANConfig(VQGANConfig):
    """The numbers of one VQGAN of sound.

    spectrogram   how sound becomes pictures
    """

    spectrogram: Spectrogram

    @model_validator(mode="after")
    def _divides_pictures(self) -> SoundVQGANConfig:
        rows, columns = self.spectrogram.rows, self.spectrogram.columns
        if rows % self.downsample[1] or columns % self.downsample[2]:
            raise ValueError(f"spectrogram {rows}x{columns}: the model needs multiples of {self.downsample[1]}")
        return self

    @property
    def channels(self) -> int:
        return 1


def config_from_preset(preset: str, spectrogram: Spectrogram, **overrides: Any) -> SoundVQGANConfig:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return SoundVQGANConfig(**PRESETS[preset] | overrides, spectrogram=spectrogram)


class SoundVQGAN(VQGAN):
    """Pictures of sound `(B, 1, T, rows, columns)` in [-1, 1] <-> tokens `(B, t, h, w)`, as `VQGAN` has it."""

    config: SoundVQGANConfig

    def __init__(self, config: SoundVQGANConfig) -> None:
        super().__init__(config)

    def pictures(self, sound: Tensor, frames: int) -> Tensor:
        """The pictures of `frames` frames of samples `(B, n)`, or `(B, channels, n)`, whose mean they show."""
        mono = sound.mean(1) if sound.ndim == 3 else sound
        return pictures(mono, frames, self.config.spectrogram)

    def whole(self, video: Tensor) -> Tensor:
        """Pictures `(B, 1, T, rows, columns)` side by side, `(B, 1, 1, rows, T columns)`: a frame has few moments."""
        return video.movedim(2, 3).flatten(3).unsqueeze(2)

    def sound_tokens(self, sound: Tensor, frames: int) -> Tensor:
        """The tokens of samples, int64 `(B, t, h, w)`. ValueError for frames that do not divide."""
        return self.tokens(self.pictures(sound, frames))
