"""Consecutive latents of videos, as a memory is made of them, and the noise that training puts on them."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from longtake.training.models.common import flow
from longtake.training.models.common.draws import on_host


class Stretch(NamedTuple):
    """Consecutive latents of each video of a batch.

    high   (B, C, T, H, W) normalised, fp32
    low    (B, C, T, h, w) of the scaled-down video, normalised with their own statistics; None without a low-res branch
    start  time of the first latent, counted in latents; what is cut off at the front does not change the times of the rest
    first  (B, T) bool, which latents are a video's first
    skip   (B,) leading latents that a sample does not have, on the host; None: each has all
    """

    high: Tensor
    low: Tensor | None
    start: int
    first: Tensor
    skip: Tensor | None = None

    def ending(self, end: int, lag: Tensor, count: int, lengths: Tensor) -> "Stretch":
        """The `count` latents of each sample that end `lag` `(B,)` latents before index `end`; it has the last `lengths` `(B,)`.

        All get the times of a sample without a lag: what a lagging sample sees beside them must be that much later.
        """
        index = (end - lag[:, None] - count + torch.arange(count)).clamp(min=0).to(self.high.device, non_blocking=True)
        part = self.apply(lambda latents: gather_latents(latents, index))
        first, skip = self.first.gather(1, index), skip_or_none(count - lengths)
        return part._replace(start=self.start + end - count, first=first, skip=skip)

    def apply(self, function: Callable[..., Tensor], *others: "Stretch") -> "Stretch":
        """Replace each branch's latents by a function of them and of the same branch of `others`; first high, then low."""
        high = function(self.high, *(other.high for other in others))
        low = None if self.low is None else function(self.low, *(other.low for other in others))
        return self._replace(high=high, low=low)


def skip_or_none(skip: Tensor) -> Tensor | None:
    """`skip` `(B,)` of the host, or None where no sample lacks any latent."""
    return skip if bool(skip.any()) else None


def gather_latents(latents: Tensor, omega: Tensor) -> Tensor:
    """The latents Ω `(B, k)` of `(B, C, T, H, W)`: `(B, C, k, H, W)`."""
    return latents.gather(2, omega[:, None, :, None, None].expand(-1, latents.shape[1], -1, *latents.shape[3:]))


def draw_omega(batch: int, latents: int, most: int, rng: torch.Generator, skip: Tensor | None = None) -> Tensor:
    """Draw Ω, the latents to retrieve: `(batch, k)` distinct ones of 0..latents-1 in order, for each sample its own.

    k is uniform in 1..most (at most what every sample has) and the same for all samples of a call [assumption: 1 to 4].
    The first `skip` `(batch,)` latents, on the host, are never drawn.
    """
    device = rng.device
    fewest = latents if skip is None else latents - int(skip.max())
    count = 1 + int(torch.randint(min(most, fewest), (), generator=on_host(rng)))
    ranks = torch.rand(batch, latents, generator=rng, device=device)
    if skip is not None:
        never = (torch.arange(latents) < skip[:, None]).to(device, non_blocking=True)
        ranks = torch.where(never, 1.0, ranks)
    return ranks.argsort(1)[:, :count].sort(1).values


def mask(stretch: Stretch, omega: Tensor, sigma: Tensor, noise: Stretch) -> Stretch:
    """Noise as a mask (arXiv 2512.23851): z' = (1 - σ) z + σ ε outside of Ω; latents in Ω are untouched to the bit.

    Args:
        omega: (B, k), the latents that stay clean.
        sigma: (B, T) in 0..1, a level for each latent, of both branches.
        noise: ε of both branches.
    """
    clean = torch.zeros_like(sigma, dtype=torch.bool).scatter(1, omega, True)[:, None, :, None, None]
    return stretch.apply(lambda z, epsilon: torch.where(clean, z, flow.interpolate(z, epsilon, sigma)), noise)


def noise_like(stretch: Stretch, rng: torch.Generator) -> Stretch:
    """Standard normal noise of the same shapes."""
    return stretch.apply(lambda x: torch.randn(x.shape, generator=rng, device=x.device))


def add_noise(stretch: Stretch, level: Tensor, rng: torch.Generator) -> Stretch:
    """Both branches as the flow has them at time `level` `(B,)`: every latent of a sample is noised alike."""
    return stretch.apply(lambda z, epsilon: flow.interpolate(z, epsilon, level), noise_like(stretch, rng))
