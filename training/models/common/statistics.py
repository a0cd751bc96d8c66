"""Statistics of latents that are stored with a model's weights, which normalises its inputs by them."""

from collections.abc import Callable
from typing import Self

import torch
from torch import Tensor, nn


class ExactBuffers(nn.Module):
    """A module whose own buffers keep their dtype when its weights are cast."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


class Normalising(ExactBuffers):
    """A model that normalises latents by its buffers `latent_mean` and `latent_std`, one value a channel.

    The module's own buffers stay fp32 when the weights are cast. In bf16 a mean would be off by up to 0.2 %, which is
    a large part of a std that is many times smaller.
    """

    latent_mean: Tensor
    latent_std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("latent_mean", torch.zeros(channels))
        self.register_buffer("latent_std", torch.ones(channels))

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Normalise by `mean` and `std`, `(C,)` each. ValueError for another shape or a std that is not positive."""
        copy_statistics(self.latent_mean, self.latent_std, mean, std)

    def normalise(self, latent: Tensor) -> Tensor:
        """Latents from the autoencoder -> zero mean and unit variance per channel, fp32."""
        return normalised(latent, self.latent_mean, self.latent_std)

    def denormalise(self, latent: Tensor) -> Tensor:
        """The inverse of `normalise`, fp32."""
        return latent.float() * self.latent_std.float().view(-1, 1, 1, 1) + self.latent_mean.float().view(-1, 1, 1, 1)


def copy_statistics(to_mean: Tensor, to_std: Tensor, mean: Tensor, std: Tensor) -> None:
    """Copy `(C,)` each into a model's buffers. ValueError for another shape or a std that is not positive."""
    for name, value in (("mean", mean), ("std", std)):
        if value.shape != to_mean.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}; this model has {len(to_mean)} channels")
    if not ((std > 0) & std.isfinite() & mean.isfinite()).all():
        raise ValueError("std: every channel needs a finite mean and a positive, finite std")
    to_mean.copy_(mean)
    to_std.copy_(std)


def normalised(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Latents `(B, C, T, H, W)` from an autoencoder -> zero mean and unit variance per channel, fp32."""
    return (latent.float() - mean.float().view(-1, 1, 1, 1)) / std.float().view(-1, 1, 1, 1)
