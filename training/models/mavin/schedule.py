"""A network that has learned to predict noise, as public U-Nets have, as one that gives the velocity of the house's flow.

Their inputs are √ᾱ x0 + √(1 - ᾱ) ε at 1000 steps, those of the flow (1 - t) x0 + t ε. Both are the same up to a scale where
signal and noise have the same ratio. So x_t is scaled and shown at that step, and of the noise ε̂ that comes back

    v = ε - x0 = (ε̂ - x_t) / (1 - t).

The last step still has some signal, √ᾱ = .068; beyond, t > .936, the network is shown that step.
"""

import torch
from torch import Tensor

_STEPS = 1000
_BETAS = (
    0.00085,
    0.012,
)  # the first and the last; their roots are spread evenly [Stable Diffusion's, and ModelScope's]


def _log_ratios() -> Tensor:
    """The logarithms of signal to noise at each step, falling, `(1000,)` in double precision."""
    betas = torch.linspace(_BETAS[0] ** 0.5, _BETAS[1] ** 0.5, _STEPS, dtype=torch.float64).square()
    signal = (1 - betas).cumprod(0)
    return 0.5 * (signal / (1 - signal)).log()


_RATIOS = _log_ratios()
_LEAST = float(1 / (1 + torch.exp(-_RATIOS[-1])))  # 1 - t at the last step


def steps_of(times: Tensor) -> Tensor:
    """The steps, 0 to 999 and in between, at which signal and noise have the ratio that they have at these times, 0 to 1."""
    times = times.double()
    ratios = _RATIOS.to(times.device)
    wanted = ((1 - times).log() - times.log()).clamp(ratios[-1], ratios[0])
    after = torch.searchsorted(-ratios, -wanted).clamp(1, _STEPS - 1)
    left, right = ratios[after - 1], ratios[after]
    return (after - 1 + (left - wanted) / (left - right)).float()


def shown(latents: Tensor, times: Tensor) -> Tensor:
    """Latents `(B, C, T, h, w)` at times `(B, T)` of the flow as the network knows them: of the variance of its inputs."""
    return latents / _wide(((1 - times).square() + times.square()).sqrt(), latents)


def velocity_of(noise: Tensor, latents: Tensor, times: Tensor) -> Tensor:
    """The velocity of latents `(B, C, T, h, w)` at times `(B, T)`, fp32, in which a network has found this noise."""
    return (noise.float() - latents.float()) / _wide((1 - times).clamp_min(_LEAST), latents)


def _wide(rows: Tensor, latents: Tensor) -> Tensor:
    return rows.to(latents)[:, None, :, None, None]
