"""A codebook that follows the encoder by moving averages (VQ-VAE, arXiv 1711.00937, appendix A.1), the same on all ranks.

It is ours rather than vector-quantize-pytorch's, whose averages would be cast to bf16 with the module, and whose seeds
depend on the number of ranks. A step takes 0.2 to 0.5 of that one's time, with as small an error at the size of a real
codebook (`bench_tats.py --only codebook`).

Codes, counts and sums are buffers: no optimizer knows them, ZeRO does not split them, checkpoints hold them, and they stay
fp32 when the weights are cast. Every rank adds up the same sums, so any number of ranks gives the same codes.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from longtake.training.metrics.share import gathered
from longtake.training.models.common.statistics import ExactBuffers

_SMOOTH = 1e-7  # Laplace smoothing of the counts
_NOISE = 0.01  # of seeds that are drawn twice, over the root of the width
_ROWS = 4096  # tokens whose distances to all codes are in memory at once


class Usage(NamedTuple):
    """How evenly a batch uses the codes: the share of them that it has, and the perplexity of their frequencies."""

    share: Tensor
    perplexity: Tensor


def usage(counts: Tensor) -> Usage:
    """The usage of codes that come so often, `(K,)`."""
    p = counts / counts.sum().clamp_min(1)
    return Usage((counts > 0).float().mean(), torch.exp(-torch.xlogy(p, p).sum()))


class Codebook(ExactBuffers):
    """Latents `(B, D, t, h, w)` -> the nearest of `codes` vectors, and its number.

    In training mode a call moves the codes; the first one seeds them by rows of its latents.

    Args:
        decay: of the averages, each pass.
        restart: a code that is used less than this share of the mean is replaced by a row of the latents; 0 never.
    """

    codes: Tensor
    counts: Tensor
    sums: Tensor
    updates: Tensor

    def __init__(self, codes: int, width: int, decay: float, restart: float) -> None:
        super().__init__()
        self.decay, self.restart = decay, restart
        self.register_buffer("codes", torch.randn(codes, width))
        self.register_buffer("counts", torch.ones(codes))
        self.register_buffer("sums", self.codes.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))
        self._moved = False

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Usage]:
        """Codes in the dtype and with the gradient of `z` (straight through), their numbers `(B, t, h, w)`, and the usage."""
        rows = z.detach().movedim(1, -1).reshape(-1, z.shape[1]).float()
        if self.training and not self._moved:
            # asked of the device until it is so, and not in each step
            self._moved = bool(self.updates)
            if not self._moved:
                self._seed(rows)
        numbers = self._nearest(rows)
        tokens = numbers.view(z.shape[0], *z.shape[2:])
        code = self.embed(tokens)
        # as `bincount`, which asks the device for the largest number; sums of ones are exact
        counts = torch.zeros_like(self.counts).index_add_(0, numbers, torch.ones_like(numbers, dtype=torch.float32))
        if self.training:
            counts = self._move(rows, numbers, counts)
        # in this order the value is exactly the code's
        return code.to(z.dtype) + (z - z.detach()), tokens, usage(counts)

    def tokens(self, z: Tensor) -> Tensor:
        """The numbers of the nearest codes, `(B, t, h, w)` int64."""
        rows = z.movedim(1, -1).reshape(-1, z.shape[1]).float()
        return self._nearest(rows).view(z.shape[0], *z.shape[2:])

    def embed(self, tokens: Tensor) -> Tensor:
        """Numbers `(B, t, h, w)` -> codes `(B, D, t, h, w)`, fp32."""
        return F.embedding(tokens, self.codes).movedim(-1, 1)

    @torch.no_grad()
    def _nearest(self, rows: Tensor) -> Tensor:
        norms = self.codes.square().sum(1)
        # |z - e|^2 without |z|^2, which all codes share
        parts = [torch.addmm(norms, part, self.codes.T, alpha=-2).argmin(1) for part in rows.split(_ROWS)]
        return torch.cat(parts)

    @torch.no_grad()
    def _seed(self, rows: Tensor) -> None:
        self.codes.copy_(self._drawn(rows, len(self.codes)))
        self.counts.fill_(1.0)
        self.sums.copy_(self.codes)

    @torch.no_grad()
    def _move(self, rows: Tensor, numbers: Tensor, counts: Tensor) -> Tensor:
        """Move codes to the mean of the rows that are nearest to them; returns the counts over all ranks."""
        sums = torch.zeros_like(self.sums).index_add_(0, numbers, rows)
        if dist.is_initialized() and dist.get_world_size() > 1:
            both = torch.cat([counts[:, None], sums], dim=1)
            dist.all_reduce(both)
            counts, sums = both[:, 0].contiguous(), both[:, 1:]
        # sums that are not finite would stay for good
        finite = torch.isfinite(sums).all()
        for average, now in ((self.counts, counts), (self.sums, sums)):
            average.copy_(torch.where(finite, average.lerp(now, 1 - self.decay), average))
        total = self.counts.sum()
        smooth = (self.counts + _SMOOTH) / (total + len(self.counts) * _SMOOTH) * total
        self.codes.copy_(self.sums / smooth[:, None])
        self.updates += finite
        if self.restart:
            self._revive(rows)
        return counts

    def _revive(self, rows: Tensor) -> None:
        mean = self.counts.mean()
        dead = self.counts < self.restart * mean
        # every rank knows the same counts, and so draws, or does not
        # here the host waits for the device, and again where a code is dead: how many are decides what is drawn
        if not dead.any():
            return
        drawn = self._drawn(rows, int(dead.sum()))
        self.codes[dead] = drawn
        self.counts[dead] = mean
        self.sums[dead] = drawn * mean

    def _drawn(self, rows: Tensor, count: int) -> Tensor:
        """`count` random rows of all ranks, alike on each: without repetition while there are enough, then with noise."""
        rows = gathered(rows)
        rows = rows[rows.isfinite().all(1)]
        if not len(rows):
            return self.codes[:count]
        draws = torch.Generator().manual_seed(int(self.updates))
        times = -(-count // len(rows))
        chosen = torch.cat([torch.randperm(len(rows), generator=draws) for _ in range(times)])[:count]
        drawn = rows[chosen.to(rows.device)]
        noise = torch.randn(drawn.shape, generator=draws)
        noise[: len(rows)] = 0
        return drawn + noise.to(drawn) * (_NOISE / rows.shape[1] ** 0.5)

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._moved = False
