"""Whether a VQGAN's tokens move with their video (TATS, arXiv 2204.03638, eq. 3), above chance."""

from __future__ import annotations

import numpy as np
import torch

from longtake.datasets.errors import UserError
from longtake.training.evaluation import coded
from longtake.training.evaluation.material import Material
from longtake.training.evaluation.means import Curve, Means, Vectors
from longtake.training.evaluation.measures import Measure, of_clips
from longtake.training.evaluation.record import Result, Unit
from longtake.training.evaluation.subject import Subject
from longtake.training.metrics import equivariance
from longtake.training.models.common.codec import nearest_lengths


@torch.inference_mode()
def run(subject: Subject, material: Material) -> Result:
    """Equal tokens of a clip and of itself a latent frame later: their share, and what remains above chance.

    A clip's last frames make the second of the two, so that it needs three latents; UserError where it has fewer. The curve
    is the share of equal tokens by seconds from the clip's begin.
    """
    config = subject.module.config
    rows, means, curve = dict[tuple[Unit, str], dict[str, float]](), Means(), Curve()
    for clip in material.clips():
        video = coded.whole(subject, clip.video)
        stride = config.temporal_stride
        length = nearest_lengths(max(1, video.shape[2] - stride), stride, config.first_frames)[0]
        if length + stride > video.shape[2] or length <= config.first_frames:
            raise UserError(f"clips: frames: {clip.video.shape[2]} are fewer than three latents of {subject.uri}")
        first, second = (subject.module.tokens(part[:, :, :length]) for part in (video, video[:, :, stride:]))
        shares = equivariance.matched(first, second).cpu()
        counts = equivariance.histogram(config.codes, first, second).cpu().double()
        rows[clip.unit, clip.key] = {"equal_tokens": float(shares.mean())}
        means.add(clip.unit, torch.cat([shares.mean()[None], counts / counts.sum()]).numpy())
        curve.add(clip.unit, {n * stride / clip.fps: share for n, share in enumerate(shares.tolist(), 1)})
    pooled = means.pooled(material.suite, {"kappa": _kappa, "perplexity": _perplexity})
    return Result(rows, pooled, {"equal_tokens": curve.by_unit()})


def _kappa(rows: Vectors) -> Vectors:
    """Cohen's kappa of (N, 1 + codes): the share of equal tokens, and how often each code comes; 0 for a single code."""
    share, chance = rows[:, 0], np.square(rows[:, 1:]).sum(1)
    return np.where(chance < 1, (share - chance) / np.maximum(1 - chance, 1e-12), 0.0)


def _perplexity(rows: Vectors) -> Vectors:
    p = rows[:, 1:]
    return np.exp(-(p * np.log(np.where(p > 0, p, 1))).sum(1))


MEASURE = Measure(
    what="tokens of a clip that are the same in the clip a latent frame later: their share (arXiv 2204.03638, eq. 3), what"
    " of it is above chance (Cohen's kappa), and the perplexity of the tokens",
    version=1,
    of="reconstructs",
    figures={"equal_tokens": "higher", "kappa": "higher", "perplexity": "higher"},
    networks=(),
    conditions=of_clips,
    run=run,
    own=True,
)
