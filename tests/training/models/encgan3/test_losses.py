"""The losses and the discriminators: those of the formulas, windows across the joint, logits that slide over longer clips."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.models.common.codec import Posterior
from longtake.training.models.encgan3 import losses
from longtake.training.models.encgan3.discriminators import Discriminators
from longtake.training.models.encgan3.model import Drawn

pytestmark = pytest.mark.usefixtures("one_thread")


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def judges(size: int = 16, norm: str = "group") -> Discriminators:
    torch.manual_seed(0)
    return Discriminators(size, 4, norm, 2)  # type: ignore[arg-type]


def drawn(recall: bool = True) -> Drawn:
    clips, whole = 1 + recall, 28 if recall else 16
    return Drawn(
        random(2, clips, 16, 3, 16, 16),
        random(2, whole, 3, 16, 16, seed=1),
        random(2, whole, 3, 16, 16, seed=2),
        random(2, 3, 16, 16, seed=3),
        Posterior(random(2, clips, 8, seed=4), random(2, clips, 8, seed=5)),
        Posterior(random(2, clips, 4, seed=6), random(2, clips, 4, seed=7)),
    )


@pytest.mark.parametrize("norm", ["group", "spectral"])
def test_a_logit_for_16_frames_of_64_pixels_and_one_more_for_each_further_frame(norm: str) -> None:
    discriminators = judges(64, norm).eval()
    clips = random(1, 18, 3, 64, 64)
    logits, frames = discriminators(clips, clips[:, 0])
    assert logits.shape == (1, 3) and frames.shape == (1, 1)
    if norm == "spectral":
        # norms of groups see the whole clip, those of weights do not: then each logit is that of a window
        each = [discriminators.clip(clips[:, start : start + 16].transpose(1, 2))[:, 0] for start in range(3)]
        torch.testing.assert_close(logits, torch.cat(each, 1))
    assert judges(128)(random(1, 16, 3, 128, 128), random(1, 3, 128, 128))[0].shape == (1, 1)
    assert judges(16)(random(2, 16, 3, 16, 16), random(3, 3, 16, 16))[0].shape == (2, 7)


@pytest.mark.parametrize("kind", ["hinge", "log"])
def test_the_losses_of_the_discriminators_are_those_of_the_formulas(kind: str) -> None:
    discriminators, made, video = judges(), drawn(), random(2, 28, 3, 16, 16, seed=9)
    shown = losses.seen(made, video, 16, 5, 7, 20)
    assert torch.equal(shown.real, video[:, 5:21]) and torch.equal(shown.still, video[:, 7])
    assert torch.equal(shown.made, torch.cat([made.joined[:, 5:21], made.sampled[:, 5:21]]))
    assert torch.equal(shown.drawn, torch.cat([made.joined[:, 20], made.sampled[:, 20]]))
    real, fake = discriminators(shown.real, shown.still), discriminators(shown.made, shown.drawn)
    total, terms = losses.judging(discriminators, shown, kind)  # type: ignore[arg-type]
    if kind == "hinge":
        expected = sum(0.5 * (F.relu(1 - r).mean() + F.relu(1 + f).mean()) for r, f in zip(real, fake, strict=True))
        pleasing = [-f.mean() for f in fake]
    else:
        ones, zeros = (torch.ones_like(fake[0]), torch.zeros_like(fake[0]))
        bce = F.binary_cross_entropy_with_logits
        expected = sum(
            bce(r, torch.ones_like(r)) + bce(f, torch.zeros_like(f)) for r, f in zip(real, fake, strict=True)
        )
        pleasing = [bce(fake[0], ones), bce(fake[1], torch.ones_like(fake[1]))]
        assert zeros.shape == fake[0].shape
    torch.testing.assert_close(total, expected)
    found = losses.pleasing(discriminators, shown, kind)  # type: ignore[arg-type]
    torch.testing.assert_close([found["gan_clip"], found["gan_frame"]], pleasing)
    assert terms["judged_real_clip"].item() == pytest.approx(real[0].mean().item(), abs=1e-6)
    assert terms["judged_made_frame"].item() == pytest.approx(fake[1].mean().item(), abs=1e-6)


def test_the_evidence_is_that_of_equation_4() -> None:
    made, clips = drawn(), random(2, 2, 16, 3, 16, 16, seed=9)
    terms = losses.evidence(made, clips, 3)
    assert terms["l1"].item() == pytest.approx((made.clips - clips).abs().mean().item())
    assert terms["frame"].item() == pytest.approx((made.frame - clips[:, 0, 3]).abs().mean().item())

    def divergence(posterior: Posterior) -> float:
        ours = torch.distributions.Normal(posterior.mean, (0.5 * posterior.logvar).exp())
        return float(torch.distributions.kl_divergence(ours, torch.distributions.Normal(0.0, 1.0)).mean())

    assert terms["kl"].item() == pytest.approx(divergence(made.content) + divergence(made.movement), rel=1e-5)


def test_every_window_that_the_discriminator_sees_has_the_joint() -> None:
    # frames 0 to 13 are of the first clip, from 14 on of the second
    assert list(losses.straddling(16, 28, 13)) == list(range(13))
    assert list(losses.straddling(16, 36, 24)) == list(range(10, 21))
    assert list(losses.straddling(16, 40, 20)) == list(range(6, 21))


def test_penalties_of_pixels_out_of_range_and_of_brightening() -> None:
    clips = torch.tensor([-3.0, -1.0, 0.5, 1.5]).view(1, 4, 1, 1, 1)
    assert losses.out_of_range(clips).item() == pytest.approx((2 + 0 + 0 + 0.5) / 4)
    assert losses.drift(clips).item() == pytest.approx(4.5 / 3)
    swing = torch.tensor([0.2, 5.0, 0.2]).view(1, 3, 1, 1, 1)
    assert losses.drift(torch.cat([swing, -swing])).item() == pytest.approx(0)
