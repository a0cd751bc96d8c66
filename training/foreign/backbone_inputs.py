"""The inputs of a video transformer of another library, and what several classes make of them."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from longtake.training.foreign.front import Front

STEPS = 1000  # times of the classes are 0 to 1000


class Inputs(NamedTuple):
    """What a row's `velocity` gets: tensors on one device, floats in the dtype of the weights.

    x             `(B, C, T, H, W)`
    t             `(B,)` or `(B, T)`, fp32, 0 to 1
    text, seen    states `(B, N, D)` with those that count in front and zeros behind them, and `(B, N)` bool, which count;
                  or `(B, T, N)`, which count for each latent, in any order
    none          states of "", `(n, D)`
    image         see `Backbone.forward`; None where there is none
    image_states  the same
    fps           the same, a number or `(B,)`
    pooled        the same
    guidance      the same, a number
    front, places, present   the same
    """

    x: Tensor
    t: Tensor
    text: Tensor
    seen: Tensor
    none: Tensor
    image: Tensor | None = None
    image_states: Tensor | None = None
    fps: float | Tensor | None = None
    pooled: Tensor | None = None
    guidance: float | None = None
    front: Front | None = None
    places: Tensor | None = None
    present: Tensor | None = None


def padded(text: Tensor, seen: Tensor, length: int) -> Tensor:
    """States `(B, N, D)` that are zero where they do not count, cut or padded by zeros to `(B, length, D)`.

    ValueError where more than `length` count.
    """
    # the host waits for the device, but only where a batch is wider than the model takes
    if text.shape[1] > length and bool(seen[:, length:].any()):
        raise ValueError(f"text has {int(seen.sum(1).max())} tokens; this model takes {length}: shorten it")
    return F.pad(text, (0, 0, 0, length - text.shape[1]))


def token_times(inputs: Inputs, tokens_in_frame: int) -> Tensor:
    """Times on the scale of the classes: `(B,)`, or by token `(B, M + N)` where latents differ or tokens are in front."""
    t = inputs.t * STEPS
    if t.ndim == 1 and inputs.front is None:
        return t
    frames = inputs.x.shape[2]
    own = (t[:, None].expand(-1, frames) if t.ndim == 1 else t).repeat_interleave(tokens_in_frame, dim=1)
    if inputs.front is None:
        return own
    count, time = inputs.front.tokens.shape[1], inputs.front.time
    ahead = torch.zeros_like(own[:, :1]) if time is None else STEPS * time.to(own)[:, None]
    return torch.cat([ahead.expand(-1, count), own], dim=1)


def held(inputs: Inputs) -> Inputs:
    """Clean first latents in the place of those of `x`, at time 0."""
    if inputs.image is None:
        return inputs
    x, t, count = inputs.x, inputs.t, inputs.image.shape[2]
    if count > x.shape[2] or inputs.image.shape[3:] != x.shape[3:]:
        raise ValueError(
            f"image has shape {tuple(inputs.image.shape)}; a window of {tuple(x.shape)} needs first latents"
        )
    x = torch.cat([inputs.image, x[:, :, count:]], dim=2)
    t = t[:, None].expand(-1, x.shape[2]) if t.ndim == 1 else t
    t = torch.cat([torch.zeros_like(t[:, :count]), t[:, count:]], dim=1)
    return inputs._replace(x=x, t=t, image=None)


def positions_of(inputs: Inputs, patch: tuple[int, int, int]) -> Tensor:
    """Positions of all tokens, those in front first, in time, row and column: `(1 or B, M + N, 3)`, fp64."""
    x, front = inputs.x, inputs.front
    frames, height, width = (side // size for side, size in zip(x.shape[2:], patch, strict=True))
    places = torch.arange(frames, device=x.device) if inputs.places is None else inputs.places.to(x.device)
    times = places.double().reshape(-1, frames, 1, 1).expand(-1, -1, height, width)
    rows = torch.arange(height, device=x.device).double()[:, None].expand_as(times)
    columns = torch.arange(width, device=x.device).double().expand_as(times)
    own = torch.stack([times, rows, columns], dim=-1).flatten(1, 3)
    if front is None:
        return own
    ahead = front.positions.to(x.device).double().reshape(-1, front.tokens.shape[1], 3)
    count = max(len(ahead), len(own))
    return torch.cat([ahead.expand(count, -1, -1), own.expand(count, -1, -1)], dim=1)
