"""The losses of the VQGAN (TATS, arXiv 2204.03638, section 3.1): reconstruction, and two discriminators that it must please.

One discriminator judges a random frame of each clip, the other the clip; both are the same network, which takes an image as
a still clip. The perceptual loss looks at the same frame.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from longtake.training.models.common import patchgan
from longtake.training.models.common.patchgan import PatchGAN, PatchGANConfig


class Discriminators(nn.Module):
    """Frames `(B, 3, 1, H, W)` and their videos `(B, 3, T, H, W)` -> what each layer makes of either, at last logits."""

    def __init__(self, config: PatchGANConfig) -> None:
        super().__init__()
        self.image, self.video = PatchGAN(config), PatchGAN(config)

    def forward(self, frames: Tensor, video: Tensor) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        return tuple(self.image.features(frames)), tuple(self.video.features(video))


def frame_numbers(video: Tensor, rng: torch.Generator) -> Tensor:
    """A random frame's number for each clip, `(B,)`."""
    return torch.randint(video.shape[2], (video.shape[0],), generator=rng, device=rng.device).to(video.device)


def frames_at(video: Tensor, numbers: Tensor) -> Tensor:
    """The frame with its number of each clip, `(B, 3, 1, H, W)`."""
    return video[torch.arange(len(video), device=video.device), :, numbers].unsqueeze(2)


def pleasing(discriminators: nn.Module, made: Tensor, real: Tensor, numbers: Tensor) -> tuple[Tensor, Tensor]:
    """The hinge loss of a reconstruction, and how far its features are from the clip's (feature matching).

    Both are sums over the discriminators; the second also over all layers but the logits, of mean absolute differences.
    """
    # one call, since ZeRO allows one forward for each backward
    both = torch.cat([made, real])
    judged = discriminators(frames_at(both, numbers.repeat(2)), both)
    hinge = sum(patchgan.generator_loss(layers[-1].chunk(2)[0]) for layers in judged)
    matching = sum(_difference(layers[:-1]) for layers in judged)
    assert isinstance(hinge, Tensor) and isinstance(matching, Tensor)
    return hinge, matching


def _difference(layers: Sequence[Tensor]) -> Tensor:
    pairs = [layer.float().chunk(2) for layer in layers]
    return torch.stack([(made - real.detach()).abs().mean() for made, real in pairs]).sum()


def judging(engine: nn.Module, made: Tensor, real: Tensor, numbers: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The hinge loss of both discriminators, whose engine is called once, and the mean logits to log."""
    both = torch.cat([real, made])
    logits = [layers[-1].float().chunk(2) for layers in engine(frames_at(both, numbers.repeat(2)), both)]
    loss = torch.stack([patchgan.discriminator_loss(*pair) for pair in logits]).sum()
    names = [f"judged_{what}_{kind}" for kind in ("image", "video") for what in ("real", "made")]
    terms = dict(zip(names, (value.detach().mean() for pair in logits for value in pair), strict=True))
    return loss, terms | {"discriminator": loss.detach()}
