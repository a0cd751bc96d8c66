"""Rectified flow (arXiv 2209.03003; in the form of 2403.03206): straight lines from data (t = 0) to noise (t = 1).

X_t = (1 - t) X_0 + t ε, and a network learns the velocity ε - X_0 from X_t and t. All arithmetic is in fp32.
Samples are `(B, C, T, ...)`. Times are `(B,)`, or `(B, T)` where frames differ: a frame at t = 0 is clean, so a clip
whose first frames have t = 0 is denoised given those frames. That is how a window continues the one before it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import reduce
from itertools import groupby, pairwise
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longtake.training.models.common.condition import Condition
from longtake.training.models.common.guidance import Guidance, parts_of

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> velocity, of the shape of x_t
ConditionedVelocity = Callable[[Tensor, Tensor, Condition | None], Tensor]  # (x_t, t, condition) -> velocity
TIMES = 8  # times of the flow at which the loss of a held-out clip is measured


def shifted(t: Tensor, shift: float) -> Tensor:
    """Move times in 0..1 towards noise (shift > 1) or data (< 1): s t / (1 + (s - 1) t) (2403.03206, eq. 23)."""
    return shift * t / (1 + (shift - 1) * t)


def sample_t(
    batch: int,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    rng: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Training times: sigmoid of N(mean, std²), then `shifted`. `(batch,)` fp32 in 0..1; `rng` on `device`."""
    normal = torch.randn(batch, generator=rng, device=device)
    return shifted(torch.sigmoid(mean + std * normal), shift)


def sample_conditioning(
    batch: int,
    frames: int,
    probability: float,
    rng: torch.Generator | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Draw the number of clean leading frames of each training sample: `(batch,)` int64.

    Uniform in 1..frames-1 with `probability`, else 0; always 0 for a single frame. The distribution is an assumption.
    """
    if frames < 2:
        return torch.zeros(batch, dtype=torch.long, device=device)
    conditioned = torch.rand(batch, generator=rng, device=device) < probability
    return conditioned * torch.randint(1, frames, (batch,), generator=rng, device=device)


def noised_frames(clean: Tensor, frames: int) -> Tensor:
    """A mask `(B, frames)` fp32: 0 for the first `clean` `(B,)` frames, 1 for the noised ones after them."""
    return (torch.arange(frames, device=clean.device) >= clean[:, None]).float()


def interpolate(x0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """X_t, fp32. Equal to `x0` to the bit where t is 0."""
    t = t.float() if t.ndim == 1 else t.float().unsqueeze(1)
    t = t.reshape(*t.shape, *[1] * (x0.ndim - t.ndim))
    return (1 - t) * x0.float() + t * noise.float()


def target(x0: Tensor, noise: Tensor) -> Tensor:
    """The velocity of X_t at any t, fp32."""
    return noise.float() - x0.float()


def loss(velocity: Tensor, x0: Tensor, noise: Tensor, counted: Tensor | None = None) -> Tensor:
    """Mean squared error of a velocity per sample: `(B,)` fp32.

    `counted` `(B, T)` of 1 and 0 leaves frames out; a sample with no counted frame has loss 0.
    """
    error = (velocity.float() - target(x0, noise)).square().transpose(1, 2).flatten(2).mean(2)
    if counted is None:
        return error.mean(1)
    # where, not a product: a frame that does not count must not spread its inf or nan
    return torch.where(counted > 0, error, 0.0).sum(1) / counted.sum(1).clamp(min=1)


def training_loss(
    velocity: Velocity,
    x0: Tensor,
    rng: torch.Generator | None = None,
    mean: float = 0.0,
    std: float = 1.0,
    shift: float = 1.0,
    conditioning: float = 0.0,
) -> Tensor:
    """The loss `(B,)` fp32 of `velocity` at one draw of times, clean frames and noise.

    `conditioning` is the probability that a sample has clean leading frames (`sample_conditioning`), which do not count.
    `rng` is on the device of `x0`.
    """
    batch, frames = x0.shape[0], x0.shape[2]
    t = sample_t(batch, mean, std, shift, rng, x0.device)
    counted = None
    if conditioning:
        clean = sample_conditioning(batch, frames, conditioning, rng, x0.device)
        counted = noised_frames(clean, frames)
        t = t[:, None] * counted
    noise = torch.randn(x0.shape, generator=rng, device=x0.device)
    return loss(velocity(interpolate(x0, noise, t), t), x0, noise, counted)


def clip_rng(seed: int, number: int) -> torch.Generator:
    """The random state of held-out clip `number`, on the CPU: independent of the device and of the other clips."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence([seed, number]).generate_state(1)[0]))


@torch.no_grad()
def losses_over_time(
    velocity: Velocity,
    x0: Tensor,
    rng: torch.Generator,
    clean: int | None = None,
    scale: Tensor | float = 1.0,
) -> np.ndarray[Any, Any]:
    """The loss `(TIMES,)` of one clip `(1, C, T, H, W)` at times spread evenly over 0..1, each with its own noise.

    Args:
        velocity: called once, with a batch of TIMES; its times are `(TIMES,)`, or `(TIMES, T)` with `clean`.
        rng: draws the noise, on the CPU.
        clean: number of clean leading frames, which do not count.
        scale: `(1, C, 1, 1, 1)`, the unit of errors, for comparing models with different normalisation.
    """
    t = (torch.arange(TIMES, device=x0.device) + 0.5) / TIMES
    x0, counted = x0.expand(TIMES, -1, -1, -1, -1), None
    noise = torch.randn(x0[:, :, clean or 0 :].shape, generator=rng).to(x0.device)
    if clean is not None:
        counted = noised_frames(torch.full((TIMES,), clean, device=x0.device), x0.shape[2])
        t, noise = t[:, None] * counted, torch.cat([torch.zeros_like(x0[:, :, :clean]), noise], dim=2)
    predicted = velocity(interpolate(x0, noise, t), t)
    return loss(predicted * scale, x0 * scale, noise * scale, counted).cpu().numpy()


def guided(
    velocity: ConditionedVelocity,
    condition: Condition | None,
    guidance: float | Guidance,
    negative: Condition | None = None,
) -> Velocity:
    """Classifier-free guidance (arXiv 2207.12598): v(null) + guidance (v(condition) - v(null)).

    Where class, text and sound have guidance of their own, they are led to in this order (arXiv 2211.09800); without sound:
    v(null) + classes (v(class) - v(null)) + text (v(condition) - v(class)).

    All come from one call with two to four times the batch. With guidance 1, or an empty condition, `velocity` is called
    directly.

    Args:
        negative: of the batch; guidance leads away from its text in place of no text.
    """
    null, full = _ends(condition, negative)
    conditions, strengths = _ladder(null, full, parts_of(guidance))
    if all(strength == 1.0 for strength in strengths):
        return lambda x, t: velocity(x, t, condition)
    joined = reduce(Condition.join, reversed(conditions))

    def combined(x: Tensor, t: Tensor) -> Tensor:
        count = len(conditions)
        made, *others = velocity(torch.cat([x] * count), torch.cat([t] * count), joined).float().chunk(count)[::-1]
        for strength, (lower, upper) in zip(strengths, pairwise([made, *others]), strict=True):
            made = made + strength * (upper - lower)
        return made

    return combined


def _ends(condition: Condition | None, negative: Condition | None) -> tuple[Condition, Condition]:
    """What guidance leads away from, and what it leads to, with the same fields."""
    full = condition or Condition()
    null = full.null
    if negative is None or negative.text is None or negative.mask is None:
        return null, full
    if full.text is None:
        full = replace(full, text=negative.text, mask=torch.zeros_like(negative.mask), pooled=negative.pooled)
    return replace(null, text=negative.text, mask=negative.mask, pooled=negative.pooled), full


def _ladder(null: Condition, condition: Condition, guidance: Guidance) -> tuple[list[Condition], list[float]]:
    """The conditions from none to all, and how far each step leads; none where nothing is asked for."""
    parts = [
        (condition.asks_for_class, guidance.classes, {"classes": condition.classes}),
        (
            condition.asks_for_text or null.asks_for_text,
            guidance.text,
            {"text": condition.text, "mask": condition.mask, "pooled": condition.pooled},
        ),
        (condition.asks_for_audio, guidance.audio, {"audio": condition.audio}),
    ]
    asked = [(strength, fields) for asks, strength, fields in parts if asks]
    conditions, strengths = [null], list[float]()
    # what is led to as far is one step
    for strength, alike in groupby(asked, key=itemgetter(0)):
        conditions.append(reduce(lambda now, part: replace(now, **part[1]), alike, conditions[-1]))
        strengths.append(strength)
    if strengths[:1] == [1.0]:
        return conditions[1:], strengths[1:]
    return conditions, strengths


@torch.no_grad()
def euler(
    velocity: Velocity,
    noise: Tensor,
    solver_steps: int,
    shift: float = 1.0,
    clean: Tensor | None = None,
    each_step: Callable[[], object] | None = None,
    level: float = 0.0,
) -> Tensor:
    """Follow the velocity from noise (t = 1) to data (t = 0) in `solver_steps` Euler steps: fp32, of the shape of `noise`.

    Args:
        velocity: its t is `(B,)`, or `(B, n + T)` with `clean`.
        shift: of the times towards noise, see `shifted`.
        clean: frames `(B, C, n, ...)` in front of the noise, which `velocity` always sees unchanged and with t = `level`;
            they are not part of the result.
        each_step: called after each Euler step.
        level: noise in the `clean` frames, as t.

    Raises:
        ValueError: fewer than one step.
    """
    if solver_steps < 1:
        raise ValueError(f"steps is {solver_steps}; sampling needs at least 1")
    x, batch, frames = noise.float(), noise.shape[0], noise.shape[2]
    times = shifted(torch.linspace(1, 0, solver_steps + 1, dtype=torch.float64), shift).tolist()
    for now, after in pairwise(times):
        if clean is None:
            v = velocity(x, x.new_full((batch,), now)).float()
        else:
            t = torch.cat([x.new_full((batch, clean.shape[2]), level), x.new_full((batch, frames), now)], dim=1)
            v = velocity(torch.cat([clean.float(), x], dim=2), t).float()[:, :, clean.shape[2] :]
        x = x + (after - now) * v
        if each_step:
            each_step()
    return x
