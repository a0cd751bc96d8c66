"""Statistics of latents that travel with a model's weights: it normalises what it sees by them."""

from collections.abc import Callable
from typing import Self

from torch import Tensor, nn


class Normalising(nn.Module):
    """A module whose own buffers are statistics: they stay fp32 whatever the weights are cast to.

    In bf16 a mean would be off by up to 0.2 %: where it is many times the std, by a good part of that.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            now = self._buffers[name]
            if buffer is not None and now is not None and now.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(now.device)
        return self


def copy_statistics(to_mean: Tensor, to_std: Tensor, mean: Tensor, std: Tensor) -> None:
    """Into a model's buffers, `(C,)` each. ValueError for another shape or a std that is not positive."""
    for name, given in (("mean", mean), ("std", std)):
        if given.shape != to_mean.shape:
            raise ValueError(f"{name} is {tuple(given.shape)}; this model has {len(to_mean)} channels")
    if not ((std > 0) & std.isfinite() & mean.isfinite()).all():
        raise ValueError("std: every channel needs a finite mean and a positive, finite std")
    to_mean.copy_(mean)
    to_std.copy_(std)


def normalised(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Latents `(B, C, T, H, W)` as an autoencoder makes them -> zero mean and unit variance per channel, fp32."""
    return (latent.float() - mean.float().view(-1, 1, 1, 1)) / std.float().view(-1, 1, 1, 1)


def denormalised(latent: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """The inverse of `normalised`, fp32."""
    return latent.float() * std.float().view(-1, 1, 1, 1) + mean.float().view(-1, 1, 1, 1)
