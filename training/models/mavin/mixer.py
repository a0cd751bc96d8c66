"""The noise that a gap begins from: its own, or mixed with low frequencies of the latents beside it (arXiv 2405.18003, §3.3).

Each latent of a gap is given the boundary latent that is nearer to it, x0, and noise is added to that as at the last step
of the paper's schedule: x_T = s x0 + √(1 - s²) η, s = .0683. Of that the mixer keeps the low frequencies, and takes the
high ones from noise:

    same    η itself:       η + LPF (x_T - η), which is η with at most s of the low-passed boundary
    fresh   another noise:  √LPF x_T + √(1 - LPF) η', whose variance is that of x_T; the weights of the released code, LPF
            and 1 - LPF, lose up to half of it

The filter is a Gaussian. Its cut-off is highest beside the clips and falls towards the middle of the gap:

    per_frame  each latent by itself, in height and width
    paper      as released: over time, too, of the whole clip, where the cut-offs belong to frequencies of time in place of
               latents: the lowest one has the lowest cut-off, and from n/2 on nothing passes. Other than there, any n
               can be mixed, and the filter is symmetric, so that the result is real
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from longtake.training.models.common.draws import rng_of

LEAST = 0.01  # of a cut-off


@dataclass(frozen=True)
class Mixer:
    """How the noise of a gap is mixed. In units of the highest frequency, 1 is that of neighbours that alternate.

    kind    none: noise alone
    noise   of the high frequencies
    cutoff  beside the clips; with per_frame inf lets everything pass, which is x_T [released configs: 0.6, and 0.4]
    fall    of the cut-off for each latent further in; it stays above `LEAST` [0.1, and 0.05]
    signal  amplitude of the boundary in x_T [√ᾱ of the paper's last step]
    """

    kind: Literal["none", "paper", "per_frame"] = "none"
    noise: Literal["same", "fresh"] = "same"
    cutoff: float = 0.6
    fall: float = 0.1
    signal: float = 0.0683

    def __post_init__(self) -> None:
        if self.kind not in ("none", "paper", "per_frame"):
            raise ValueError(f"mixer: {self.kind!r} is neither none, paper nor per_frame")
        if self.noise not in ("same", "fresh"):
            raise ValueError(f"noise: {self.noise!r} is neither same nor fresh")
        if not self.cutoff > 0 or not self.fall >= 0:
            raise ValueError(f"cutoff is {self.cutoff}, fall {self.fall}; the one must be above 0, the other not below")
        if not 0 <= self.signal <= 1:
            raise ValueError(f"signal is {self.signal}; it must be from 0 to 1")


def initial(mixer: Mixer, before: Tensor, after: Tensor, length: int, draws: tuple[int, ...]) -> Tensor:
    """What a gap of `length` latents begins from, `(C, length, h, w)` fp32, of about unit variance.

    Args:
        before, after: normalised latents on its sides, `(C, any, h, w)`.
        draws: numbers that decide the noise, such as a seed and the number of the gap. With the same numbers η is the same
            whatever the mixer.
    """

    def noise(number: int, count: int) -> Tensor:
        shape = (before.shape[0], count, *before.shape[2:])
        return torch.randn(shape, generator=rng_of(*draws, number)).to(before.device)

    eta = noise(0, length)
    if mixer.kind == "none":
        return eta
    x0 = nearest(before, after, length)
    first, size = 0, (before.shape[2], before.shape[3])
    if mixer.kind == "paper":
        # over time, of the clips as well
        first, sides = before.shape[1], noise(1, before.shape[1] + after.shape[1])
        x0 = torch.cat([before.float(), x0, after.float()], dim=1)
        eta = torch.cat([sides[:, :first], eta, sides[:, first:]], dim=1)
        lpf = over_time(cutoffs(length, mixer.cutoff, mixer.fall), (x0.shape[1], *size))
    else:
        lpf = per_frame(cutoffs(length, mixer.cutoff, mixer.fall), size)
    diffused = mixer.signal * x0 + (1 - mixer.signal**2) ** 0.5 * eta
    high = eta if mixer.noise == "same" else noise(2, eta.shape[1])
    dims = (-3, -2, -1) if mixer.kind == "paper" else (-2, -1)
    mixed = mix(diffused, high, lpf, dims, keep_variance=mixer.noise == "fresh")
    return mixed[:, first : first + length]


def nearest(before: Tensor, after: Tensor, length: int) -> Tensor:
    """Each latent of a gap as the one beside the gap that is nearer: `(C, length, h, w)`; the middle of an odd gap as the mean."""
    left, right = before[:, -1:].float(), after[:, :1].float()
    half = length // 2
    parts = [left.expand(-1, half, -1, -1), (left + right) / 2, right.expand(-1, half, -1, -1)]
    return torch.cat(parts if length % 2 else [parts[0], parts[2]], dim=1)


def cutoffs(length: int, first: float, fall: float) -> Tensor:
    """The cut-off of each latent of a gap, `(length,)`: `first` at both ends, `fall` less with each one further in."""
    place = torch.arange(length)
    depth = torch.minimum(place, length - 1 - place).double()
    return (first - fall * depth).clamp_min(LEAST)


def per_frame(cut: Tensor, size: tuple[int, int]) -> Tensor:
    """Low-pass filters over height and width, one for each cut-off: `(n, h, w)` float64 in 0..1."""
    return _gaussian(_frequency(size), cut[:, None, None])


def over_time(cut: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """The low-pass filter over `shape`, (T, h, w), whose cut-offs belong to frequencies of time, the middle one to none."""
    count, length = shape[0], len(cut)
    number = (torch.fft.fftfreq(count, dtype=torch.float64) * count).round().abs().long()
    inner = cut[: (length + 1) // 2].flip(0)  # from the middle outwards
    passes = number < len(inner)
    found = _gaussian(_frequency(shape), inner[number.clamp_max(len(inner) - 1)][:, None, None])
    return torch.where(passes[:, None, None], found, 0.0)


def mix(low: Tensor, high: Tensor, lpf: Tensor, dims: tuple[int, ...], keep_variance: bool) -> Tensor:
    """Low frequencies of one and high frequencies of the other, fp32 of their shape.

    Exactly `low` where the filter is 1 everywhere, and `high` where it is 0.

    Args:
        lpf: the filter over `dims`, on the host, symmetric as frequencies of `fftfreq` are, so that the result is real.
        keep_variance: weights are square roots, for two independent noises; else they add up to 1.
    """
    if (lpf == 1).all():
        return low.float()
    if (lpf == 0).all():
        return high.float()
    lpf = lpf.to(low.device)
    weights = (lpf.sqrt(), (1 - lpf).sqrt()) if keep_variance else (lpf, 1 - lpf)
    spectra = (torch.fft.fftn(each.double(), dim=dims) for each in (low, high))
    total = sum(weight * spectrum for weight, spectrum in zip(weights, spectra, strict=True))
    assert isinstance(total, Tensor)
    return torch.fft.ifftn(total, dim=dims).real.float()


def _frequency(shape: tuple[int, ...]) -> Tensor:
    """The squared length of each frequency, `shape`; the highest of an axis is 1."""
    axes = [2 * torch.fft.fftfreq(count, dtype=torch.float64) for count in shape]
    squares = torch.meshgrid(*(axis.square() for axis in axes), indexing="ij")
    return torch.stack(squares).sum(0)


def _gaussian(square: Tensor, cut: Tensor) -> Tensor:
    return torch.exp(-square / (2 * cut.square()))
