"""Conditions over time, and what latents that are sampled together see of them.

A text is seen by the latents of its own scene alone. A class is that of all latents that are sampled together: it changes
with the first window or segment that begins at its scene's first latent or later. So does a text that has a vector of its own,
which its model takes once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from longtake.training.models.common.condition import Condition

Story = Sequence[tuple[int, Condition]]  # the new latent from which on each condition holds


def latent_at(second: float, fps: float, factor: int, goes_on: bool) -> int:
    """The new latent with the first frame at or after `second`; latents have `factor` frames.

    The first latent of a video that does not go on from another has one frame.
    """
    frame = math.ceil(second * fps - 1e-6)
    return frame // factor if goes_on else -(-frame // factor)


def asks(story: Story) -> bool:
    """Whether any of the conditions has a class or a text."""
    return any(condition.asks for _, condition in story)


def held(story: Story, latent: int) -> Condition | None:
    """The condition that holds at a new latent; None before the story begins."""
    return next((condition for begin, condition in reversed(story) if begin <= latent), None)


def seen(story: Story, begin: int, latents: Sequence[int]) -> Condition | None:
    """The condition of latents that are sampled together, of which `begin` is the first new one.

    Given latents, whose numbers are below 0, see what the first new one sees.
    """
    now, scenes = held(story, begin), [held(story, max(0, latent)) for latent in latents]
    texts = [scene for scene in dict.fromkeys(scenes) if scene is not None and scene.text is not None]
    if not texts or all(scene is now for scene in scenes) or any(scene.pooled is not None for scene in texts):
        return now
    text = torch.cat([scene.text for scene in texts if scene.text is not None], dim=1)
    masks = [_by_latent(scene.mask, [other is scene for other in scenes]) for scene in texts if scene.mask is not None]
    return Condition(None if now is None else now.classes, text, torch.cat(masks, dim=2))


def _by_latent(mask: Tensor, which: list[bool]) -> Tensor:
    """A mask `(B, N)` for each latent, `(B, T, N)`; without any True for those that are not of its scene."""
    return mask[:, None] & torch.tensor(which, device=mask.device)[None, :, None]
