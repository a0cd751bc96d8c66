"""A sound that a video is to fit, as the tokens that a TATS hears."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.datasets.tokens import NO_SOUND
from longtake.training.models.generator import Sound
from longtake.training.models.tats.sound.vqgan import SoundVQGAN


def tokens_of(vqgan: SoundVQGAN, sound: Sound, frames: int, fps: float) -> Tensor:
    """The tokens of a video's latent frames, `(1, t, n)`; `NO_SOUND` from the first one on that begins after the sound's end.

    Args:
        frames: of the video, whole latent frames of them; sound that lasts longer is cut.
        fps: of the video.
    """
    spectrogram, factor = vqgan.config.spectrogram, vqgan.config.temporal_stride
    mono = torch.from_numpy(resampled(sound, spectrogram.rate))[: spectrogram.samples(frames, fps)]
    # to the millisecond, which resampling may be short of
    lasting = math.ceil((len(mono) / spectrogram.rate - 1e-3) * fps / factor)
    lasting = min(frames // factor, max(0, lasting))
    rows, columns = (side // vqgan.config.spatial_stride for side in (spectrogram.rows, spectrogram.columns))
    where, count = next(vqgan.parameters()).device, spectrogram.samples(lasting * factor, fps)
    tokens = torch.empty(1, 0, rows * columns, dtype=torch.int64, device=where)
    if lasting:
        mono = F.pad(mono, (0, max(0, count - len(mono))))[:count]
        tokens = vqgan.long_sound_tokens(mono[None].to(where), lasting * factor).flatten(2)
    return F.pad(tokens, (0, 0, 0, frames // factor - lasting), value=NO_SOUND)


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
