"""What a classifier says of generated videos: how clear and how varied they are, and whether long ones stay what they are.

All take logarithms of probabilities, such as `classifier.log_probabilities` gives them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class InceptionScore(NamedTuple):
    """The mean over the splits, and its standard deviation, 0 for a single split."""

    mean: float
    std: float


class Coherence(NamedTuple):
    """Curves over the chunks of long videos, the first included, which is coherent with itself.

    ccs     class coherence: the share of videos whose chunk has the likeliest class of its video's first chunk, (n,)
    ics     inception coherence: mean KL(p(y | chunk) || p(y | first chunk)) in nats, (n,)
    chance  the mean share of pairs of different videos in which a later chunk of one has the class of the other's first
    """

    ccs: Tensor
    ics: Tensor
    chance: float


def inception_score(log_p: Tensor, splits: int, seed: int) -> InceptionScore:
    """exp of the mean KL(p(y | x) || p(y)) (arXiv 1606.03498, §4), over parts of the videos, which the seed shuffles.

    Values compare only if classifier, number of videos and splits agree.

    Args:
        log_p: (N, K).
        splits: as equal parts as there are.

    Raises:
        ValueError: fewer than two videos in a part.
    """
    if log_p.ndim != 2 or not 0 < 2 * splits <= len(log_p):
        raise ValueError(f"{splits} splits need {2 * splits} videos or more, got {len(log_p)}")
    order = torch.randperm(len(log_p), generator=torch.Generator().manual_seed(seed))
    scores = torch.stack([_score(part) for part in log_p.double().cpu()[order].tensor_split(splits)])
    return InceptionScore(float(scores.mean()), float(scores.std()) if splits > 1 else 0.0)


def score_replicates(log_p: Tensor, times: Tensor) -> Tensor:
    """The `inception_score` without splits of resamples in which videos `(N, K)` count so often, `(R, N)`: `(R,)` float64."""
    log_p, shares = log_p.double().cpu(), times / times.sum(1, keepdim=True)
    chances = log_p.exp()
    within = torch.where(chances > 0, chances * log_p, 0).sum(1)
    mean = shares @ chances
    return (shares @ within - torch.special.xlogy(mean, mean).sum(1)).exp()


def coherence(log_p: Tensor) -> Coherence:
    """CCS and ICS (TATS, arXiv 2204.03638) of chunks of videos, (V, n, K) with V and n of at least 2.

    Raises:
        ValueError: fewer videos or chunks.
    """
    if log_p.ndim != 3 or len(log_p) < 2 or log_p.shape[1] < 2:
        raise ValueError(f"coherence needs (V, n, K) with 2 videos and 2 chunks at least, got {tuple(log_p.shape)}")
    same, apart = coherence_of(log_p)
    return Coherence(same.mean(0), apart.mean(0), _chance(log_p.argmax(2).cpu()))


def coherence_of(log_p: Tensor) -> tuple[Tensor, Tensor]:
    """For each chunk of each video `(V, n, K)`: whether its likeliest class is the first chunk's, and KL to that: `(V, n)` each."""
    log_p = log_p.double().cpu()
    likeliest = log_p.argmax(2)
    return (likeliest == likeliest[:, :1]).double(), kl(log_p, log_p[:, :1])


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """KL(p || q) in nats over the last dimension; classes that p excludes count nothing."""
    p = log_p.exp()
    return torch.where(p > 0, p * (log_p - log_q), 0).sum(-1)


def _score(log_p: Tensor) -> Tensor:
    mean = log_p.logsumexp(0) - math.log(len(log_p))
    return kl(log_p, mean).mean().exp()


def _chance(likeliest: Tensor) -> float:
    first, later = likeliest[:, 0], likeliest[:, 1:]
    equal = (first[:, None, None] == later[None]).double().mean(2)  # of each video's first chunk in each other one
    return float((equal.sum() - equal.trace()) / (len(first) * (len(first) - 1)))
