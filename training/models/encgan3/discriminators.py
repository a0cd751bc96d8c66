"""The two discriminators of EncGAN3, which are G3AN's (arXiv 1912.05523): one of clips, one of single frames.

G3AN's discriminator of clips takes 16 frames of 64 pixels and no others. This one slides over time: it gives a logit for
each place at which it fits, so that merged clips may be longer [assumption].
"""

from __future__ import annotations

from torch import Tensor, nn

from longtake.training.models.encgan3.blocks import Norm, Trunk


class Discriminators(nn.Module):
    """Clips `(B, T, 3, H, W)` and frames `(B', 3, H, W)` in [-1, 1] -> logits `(B, t)` and `(B', 1)`, high for real.

    Args:
        norm: group: of channels within a sample; spectral: of the weights [G3AN], whose buffers ZeRO-3 cannot keep.
    """

    def __init__(self, size: int, width: int, norm: Norm = "group", groups: int = 16) -> None:
        super().__init__()
        self.clip = Trunk(size, width, 1, True, norm, groups)
        self.frame = Trunk(size, width, 1, False, norm, groups)

    def forward(self, clips: Tensor, frames: Tensor) -> tuple[Tensor, Tensor]:
        return self.clip(clips.transpose(1, 2))[:, 0].float(), self.frame(frames.unsqueeze(2))[:, 0].float()
