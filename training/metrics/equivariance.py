"""Whether tokens move with their video: equal tokens of a clip and of the same clip a latent frame later.

The share of equal tokens (TATS, arXiv 2204.03638, eq. 3) is high also where few codes are in use. So it comes with what
remains above chance (Cohen's kappa), and with the perplexity of the tokens.
"""

import torch
from torch import Tensor


def matched(first: Tensor, second: Tensor) -> Tensor:
    """The share of equal tokens at each of the latent frames that two clips share, `(t - 1,)` float64.

    Args:
        first, second: tokens of a clip, and of the same clip from its second latent frame on, `(B, t, h, w)` each.
    """
    if first.shape != second.shape or first.ndim != 4 or first.shape[1] < 2:
        raise ValueError(f"needs two (B, t, h, w) with t > 1, got {tuple(first.shape)} and {tuple(second.shape)}")
    equal = first[:, 1:] == second[:, :-1]
    return equal.double().mean((0, 2, 3))


def histogram(codes: int, *tokens: Tensor) -> Tensor:
    """How often each code comes, `(codes,)` int64."""
    return torch.bincount(torch.cat([part.flatten() for part in tokens]), minlength=codes)


def perplexity(counts: Tensor) -> float:
    """exp of the entropy of codes that come so often."""
    p = counts.double() / counts.sum().clamp_min(1)
    return float(torch.exp(-torch.xlogy(p, p).sum()))


def scores(shares: Tensor, counts: Tensor) -> dict[str, float]:
    """The figures of equal shares `(t - 1,)` at each latent frame and of a histogram of the tokens.

    Returns:
        `score`, the share of equal tokens among those compared; `score_paper`, the same over all t latent frames, at most
        (t - 1) / t; `kappa`, (score - chance) / (1 - chance) with the chance that two tokens of the histogram are equal, 0
        where there is a single code; `perplexity`.
    """
    score = float(shares.mean())
    chance = float((counts.double() / counts.sum()).square().sum())
    return {
        "score": score,
        "score_paper": float(shares.sum()) / (len(shares) + 1),
        "kappa": (score - chance) / (1 - chance) if chance < 1 else 0.0,
        "perplexity": perplexity(counts),
    }
