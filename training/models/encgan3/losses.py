"""The losses of EncGAN3 and REncGAN3 (arXiv 2512.21776), from what a pass has made.

Equation 4 is an absolute error and the KL divergences; 7 and 8 are the discriminators', on real and generated clips.
How much each counts, and how reconstructions and samples share in 7 and 8, the paper does not say [assumption].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.training.models.encgan3.config import Adversarial
from longtake.training.models.encgan3.model import Drawn

Terms = dict[str, Tensor]


class Seen(NamedTuple):
    """What the discriminators see of a pass: T frames of each clip, and one frame of each.

    real    `(B, T, 3, H, W)`, of the same time as those that are made
    made    `(M, T, 3, H, W)`: reconstructions, then samples
    still   `(B, 3, H, W)`, real
    drawn   `(M, 3, H, W)`
    """

    real: Tensor
    made: Tensor
    still: Tensor
    drawn: Tensor


def evidence(drawn: Drawn, clips: Tensor, index: int) -> Terms:
    """The terms of equation 4: `l1` and `l2` of all clips, `kl` of content and movement, and `frame`, the first frame's error.

    Args:
        clips: real, `(B, K, T, 3, H, W)`, as `drawn.clips`.
        index: of the first clip's reference.
    """
    kl = drawn.content.kl().mean() + drawn.movement.kl().mean()
    wrong = drawn.clips - clips
    return {
        "l1": wrong.abs().mean(),
        "l2": wrong.square().mean(),
        "kl": kl,
        "frame": (drawn.frame - clips[:, 0, index]).abs().mean(),
    }


def out_of_range(clips: Tensor) -> Tensor:
    """How far pixels are beyond [-1, 1], on the average. A clamp instead would give no gradient [assumption]."""
    return F.relu(clips.abs() - 1).mean()


def drift(clips: Tensor) -> Tensor:
    """How much a clip `(B, T, 3, H, W)` brightens or darkens from frame to frame: |mean of v|, averaged over clips.

    A small mean is added up by the recursion, over a long video to any brightness [assumption].
    """
    return ((clips[:, -1] - clips[:, 0]).mean((1, 2, 3)).abs() / (clips.shape[1] - 1)).mean()


def seen(drawn: Drawn, video: Tensor, frames: int, start: int, real_frame: int, made_frame: int) -> Seen:
    """The `frames` frames from `start` on of real and made videos, and a frame of each, of the whole batch the same [G3AN]."""
    made = torch.cat([drawn.joined, drawn.sampled])
    window = slice(start, start + frames)
    return Seen(video[:, window], made[:, window], video[:, real_frame], made[:, made_frame])


def straddling(frames: int, total: int, joint: int) -> range:
    """Where a window of `frames` frames may begin in `total`, so that it has frames `joint` and `joint` + 1."""
    return range(max(0, joint + 2 - frames), min(joint, total - frames) + 1)


def pleasing(discriminators: nn.Module, made: Seen, kind: Adversarial) -> Terms:
    """The generator's adversarial losses, `gan_clip` and `gan_frame`, from frozen discriminators (equation 8).

    hinge: minus the logit; log: minus the logarithm of the probability of being real.
    """
    logits = discriminators(made.made, made.drawn)
    losses = [-each.mean() if kind == "hinge" else F.softplus(-each).mean() for each in logits]
    return dict(zip(("gan_clip", "gan_frame"), losses, strict=True))


def judging(engine: nn.Module, shown: Seen, kind: Adversarial) -> tuple[Tensor, Terms]:
    """The loss of both discriminators, whose engine is called once, and terms to log (equation 7).

    For each the mean over real ones and the mean over made ones are added [G3AN: no half]; hinge halves their sum, as is
    usual there.
    """
    # one call, since ZeRO allows one forward for each backward
    logits = engine(torch.cat([shown.real, shown.made]), torch.cat([shown.still, shown.drawn]))
    terms, total = Terms(), logits[0].new_zeros(())
    for name, each in zip(("clip", "frame"), logits, strict=True):
        real, made = each[: len(shown.real)], each[len(shown.real) :]
        if kind == "hinge":
            loss = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + made).mean())
        else:
            loss = F.softplus(-real).mean() + F.softplus(made).mean()
        total = total + loss
        terms |= {f"judged_real_{name}": real.detach().mean(), f"judged_made_{name}": made.detach().mean()}
    return total, terms | {"discriminator": total.detach()}
