"""MAVIN (arXiv 2405.18003): a flow over the latents of a gap, given the clean ones before and after it.

The house's rectified flow, X_t = (1 - t) X_0 + t ε with velocity ε - X_0, in place of the paper's ε-prediction. All latents
go through the body together, clean ones and those of the gap, and no channel says which is which, unless asked for.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from longtake.training.models.common.statistics import Normalising
from longtake.training.models.mavin import schedule
from longtake.training.models.mavin.config import MavinConfig
from longtake.training.models.mavin.dit import DiT
from longtake.training.models.mavin.guidance import Guide
from longtake.training.models.mavin.unet import UNet


class Mavin(Normalising):
    """Velocity at latents A | M | B, normalised by `normalise`; inputs are cast to the dtype of the weights."""

    def __init__(self, config: MavinConfig) -> None:
        super().__init__(config.channels)
        self.config = config
        self.guide = Guide(config)
        self.body: DiT | UNet = DiT(config) if config.body == "dit" else UNet(config)

    @property
    def dtype(self) -> torch.dtype:
        return self.body.dtype

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in order, for example for `block.compile()`."""
        yield from self.body.blocks()

    def forward(
        self,
        latents: Tensor,
        times: Tensor,
        length: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> Tensor:
        """The velocity `(B, C, T, h, w)`; that of clean latents has no meaning.

        Args:
            latents: `(B, C, T, h, w)`, clean ones as they are and those of the gap at their time.
            times: `(B, T)`, 0 (data) to 1 (noise); clean latents have 0 or, with `clean_time: same`, the time of the gap.
            length: of the gap, in frames, `(B,)`.
            text, text_mask: states of a text's tokens `(B, N, W)`, and which there are, bool `(B, N)`; a sample that sees
                none has no text.
            image, image_mask: tokens of the last frame before and the first one after the gap, `(B, 2, K, E)`, and of which
                of both a sample sees them, bool `(B, 2)`.

        Raises:
            ValueError: another shape, or what the model does not take.
        """
        if latents.ndim != 5 or latents.shape[1] != self.config.channels:
            raise ValueError(
                f"latents have shape {tuple(latents.shape)}; this model needs (B, {self.config.channels}, T, h, w)"
            )
        batch, frames = latents.shape[0], latents.shape[2]
        if times.shape != (batch, frames) or length.shape != (batch,):
            raise ValueError(
                f"times have shape {tuple(times.shape)} and length {tuple(length.shape)};"
                f" these latents need ({batch}, {frames}) and ({batch},)"
            )
        tokens, seen = self.guide(latents, text, text_mask, image, image_mask)
        inputs, steps, of_noise = latents, times, self.config.prediction == "noise"
        if of_noise:
            # the body counts times in thousandths
            inputs, steps = schedule.shown(latents, times), schedule.steps_of(times) / 1000
        if self.config.mask_channel:
            made = (times > 0)[:, None, :, None, None].expand(-1, -1, -1, *latents.shape[3:])
            inputs = torch.cat([inputs, made.to(inputs)], dim=1)
        out: Tensor = self.body(inputs, steps, length, tokens, seen)
        return schedule.velocity_of(out, latents, times) if of_noise else out
