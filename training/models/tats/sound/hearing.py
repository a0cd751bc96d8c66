"""What a TATS hears of the sounds of its videos: tokens of a window of latent frames at a time."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.datasets.tokens import NO_SOUND
from longtake.training.models.generator import Sound
from longtake.training.models.tats.sound.vqgan import SoundVQGAN

_LEAST = 1e-3  # seconds of sound in a window that has any; resampling may add less


class Heard(Protocol):
    """The sounds of B videos."""

    def window(self, first: int, frames: int) -> Tensor:
        """The tokens `(B, frames, n)` of so many latent frames from number `first` on; `NO_SOUND` where there is none."""

    def digest(self) -> str:
        """Of all that decides the tokens."""


@dataclass(frozen=True, eq=False)
class HeardTokens:
    """Sounds as tokens of their latent frames, `(1 or B, t, n)`, from the first one on."""

    tokens: Tensor

    def window(self, first: int, frames: int) -> Tensor:
        """See `Heard`."""
        known = self.tokens[:, max(0, first) : max(0, first + frames)]
        before = min(frames, max(0, -first))
        return F.pad(known, (0, 0, before, frames - before - known.shape[1]), value=NO_SOUND)

    def digest(self) -> str:
        """See `Heard`."""
        return _digest([self.tokens])


@dataclass(frozen=True, eq=False)
class HeardSamples:
    """Sounds as samples `(n,)` of one channel at the VQGAN's rate, None for none.

    A window is encoded by itself, as those of training were: a token depends on what is around it. Silence is before and
    after a sound, and a window without any of it is one without sound.

    fps   of the videos
    """

    vqgan: SoundVQGAN
    sounds: Sequence[Tensor | None]
    fps: float

    @torch.no_grad()
    def window(self, first: int, frames: int) -> Tensor:
        """See `Heard`."""
        config = self.vqgan.config
        spectrogram, factor = config.spectrogram, config.temporal_stride
        begin, count = (spectrogram.samples(n * factor, self.fps) for n in (first, frames))
        pieces = [None if sound is None else sound[max(0, begin) : max(0, begin + count)] for sound in self.sounds]
        rows, columns = (side // config.spatial_stride for side in (spectrogram.rows, spectrogram.columns))
        tokens = torch.full((len(pieces), frames, rows * columns), NO_SOUND)
        have = {
            n: piece for n, piece in enumerate(pieces) if piece is not None and len(piece) > _LEAST * spectrogram.rate
        }
        if have:
            before = max(0, -begin)
            whole = [F.pad(piece, (before, count - before - len(piece))) for piece in have.values()]
            where = next(self.vqgan.parameters()).device
            tokens[list(have)] = self.vqgan.sound_tokens(torch.stack(whole).to(where), frames * factor).flatten(2).cpu()
        return tokens

    def digest(self) -> str:
        """See `Heard`."""
        return _digest([*self.sounds, torch.tensor(self.fps)])


def samples_of(vqgan: Any, sound: Sound | None) -> Tensor | None:
    """The samples of a sound as `HeardSamples` has them."""
    return None if sound is None else torch.from_numpy(resampled(sound, vqgan.config.spectrogram.rate))


def resampled(sound: Sound, rate: int) -> np.ndarray:
    """The samples of a sound, mixed to one channel, (n,) float32, at another rate."""
    import av

    mono = np.ascontiguousarray(sound.samples.mean(0, dtype=np.float32))
    if sound.rate == rate or not len(mono):
        return mono
    frame = av.AudioFrame.from_ndarray(mono[None], format="fltp", layout="mono")
    frame.sample_rate = sound.rate
    resampler = av.AudioResampler("fltp", "mono", rate)
    parts = [part for given in (frame, None) for part in resampler.resample(given) if part is not None]
    return np.concatenate([np.empty(0, np.float32), *(part.to_ndarray()[0] for part in parts)])


def _digest(values: Sequence[Tensor | None]) -> str:
    digest = hashlib.sha256()
    for value in values:
        array = np.empty(0) if value is None else value.cpu().contiguous().numpy()
        digest.update(f"{array.dtype.str} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
