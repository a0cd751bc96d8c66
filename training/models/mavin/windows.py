"""Held-out windows with a gap: the flow's loss in it, and the gap filled by a model or without one."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.metrics.reconstruction import SSIM_REACH, ssim_by_frame
from longtake.training.models.common.codec import Codec, Pixels
from longtake.training.models.common.flow import TIMES, clip_rng
from longtake.training.models.generator import InfillSettings
from longtake.training.models.mavin import spans as spanning
from longtake.training.models.mavin.baselines import faded, held
from longtake.training.models.mavin.encode import frames_of_span
from longtake.training.models.mavin.infill import Hints, decoded, fill
from longtake.training.models.mavin.model import Mavin

_BORDER, _FRAME = 2, (1.0, 0.0, -1.0)  # pixels and colour of what says that a frame is made


class Window(NamedTuple):
    """A held-out window.

    video    (1, 3, T, H, W) in [-1, 1]
    latents  of it, (1, C, t, h, w), those beside the span encoded apart from it
    span     first latent of the gap, and the one after its last
    frames   first frame of the gap, and the one after its last
    hints    what the model is told
    """

    video: Tensor
    latents: Tensor
    span: tuple[int, int]
    frames: tuple[int, int]
    hints: Hints

    @property
    def length(self) -> int:
        """Frames of the gap."""
        return self.frames[1] - self.frames[0]

    @property
    def truth(self) -> Tensor:
        """The frames of the gap, (1, 3, n, H, W)."""
        return self.video[:, :, slice(*self.frames)]

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """The latents before and after the gap."""
        return self.latents[:, :, : self.span[0]], self.latents[:, :, self.span[1] :]

    def joined(self, gap: Tensor) -> Tensor:
        """The window with these frames in its gap."""
        begin, stop = self.frames
        return torch.cat([self.video[:, :, :begin], gap.to(self.video), self.video[:, :, stop:]], dim=2)


def window_of(codec: Codec, video: Tensor, latents: Tensor, span: tuple[int, int], hints: Hints) -> Window:
    """A window (1, 3, T, H, W) with its gap at the latents of `span`."""
    return Window(video, latents, span, frames_of_span(codec, *span), hints)


@torch.no_grad()
def cut(video: Tensor, least: float) -> Tensor:
    """Which windows (B, 3, T, H, W) have neighbouring frames that are less similar than `least`, bool (B,)."""
    if min(video.shape[3:]) <= SSIM_REACH or least <= -1:
        return torch.zeros(len(video), dtype=torch.bool, device=video.device)
    return ssim_by_frame(video[:, :, 1:], video[:, :, :-1]).min(1).values < least


@torch.no_grad()
def gap_losses(
    model: Mavin, window: Window, seed: int, number: int, scale: Tensor | float = 1.0
) -> tuple[float, float]:
    """The flow's loss in the gap of a window, and that of the mean velocity, at times spread evenly over 0..1."""
    latents = model.normalise(window.latents)
    x0 = latents.expand(TIMES, -1, -1, -1, -1)
    mask = spanning.mask_of([window.span], latents.shape[2]).to(x0.device).expand(TIMES, -1)
    t = (torch.arange(TIMES, device=x0.device) + 0.5) / TIMES
    noise = torch.randn(x0.shape, generator=clip_rng(seed, number)).to(x0.device)
    told = (window.hints.text, window.hints.mask, window.hints.image)
    hints = [None if hint is None else hint.expand(TIMES, *hint.shape[1:]) for hint in told]
    times = spanning.times_of(t, mask, model.config.clean_time)
    length = torch.full((TIMES,), window.length, device=x0.device)
    velocity = model(spanning.noised(x0, noise, t, mask), times, length, *hints).float()
    each = (spanning.loss(v * scale, x0 * scale, noise * scale, mask) for v in (velocity, torch.zeros_like(velocity)))
    ours, mean = (float(loss.mean()) for loss in each)
    return ours, mean


def filled(model: Mavin, codec: Codec, window: Window, settings: InfillSettings, draws: tuple[int, ...]) -> Tensor:
    """The frames of the gap as the model makes them, (1, 3, n, H, W) in [-1, 1]; `draws` decide the noise."""
    made = fill(model, codec, window.sides, window.length, [draws], window.hints, settings, model.config.clean_time)
    return made.clamp(-1, 1).to(window.video)


def filled_without(codec: Codec, window: Window) -> dict[str, Tensor]:
    """The same without a model: `held`, hold and cut; `faded`, a cross-fade; `latent`, a linear way between latents.

    Of pixels the last is a cross-fade, and left out.
    """
    (begin, stop), (before, after) = window.frames, window.sides
    sides = window.video[:, :, :begin], window.video[:, :, stop:]
    found = {"held": held(*sides, window.length), "faded": faded(*sides, window.length)}
    if not isinstance(codec, Pixels):
        between = faded(before, after, window.span[1] - window.span[0])
        found["latent"] = decoded(codec, before, between).clamp(-1, 1).to(window.video)
    return found


def framed(video: Tensor, made: tuple[int, int] = (0, 0)) -> Tensor:
    """A video (B, 3, T, H, W) with room around it, coloured around the frames that are made: first, and one after the last."""
    out = F.pad(video, (_BORDER,) * 4, value=-1.0)
    begin, stop = made
    out[:, :, begin:stop] = out.new_tensor(_FRAME)[:, None, None, None]
    out[:, :, begin:stop, _BORDER:-_BORDER, _BORDER:-_BORDER] = video[:, :, begin:stop]
    return out
