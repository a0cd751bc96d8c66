"""What the gap is told beside its clean neighbours: a text, and the two frames beside it as an image encoder sees them.

Boundary frame guidance (arXiv 2405.18003): the tokens of the last frame before the gap and of the first one after it come
after those of the text, and the spatial blocks attend to all of them.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.training import engines
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.text import TextIn
from longtake.training.models.mavin.config import MavinConfig
from longtake.training.pictures import ImageEncoder, load_image_encoder

SIDES = 2  # frames beside a gap


def checked_encoder(name: str, size: tuple[int, int], key: str) -> ImageEncoder:
    """The encoder that the setting `key` names, on this rank's device, after it has seen a frame of this size.

    Raises:
        UserError: as `load_image_encoder`; it takes no such frames.
    """
    encoder = load_image_encoder(name, where := engines.device(), key)
    try:
        encoder.embeddings(torch.zeros(1, 3, *size, device=where))
    except RuntimeError as e:
        reason = str(e).splitlines()[0][:120]
        raise UserError(f"{key}: {name}: takes no frames of {size[0]}x{size[1]} ({reason})") from e
    return encoder


def load_learned(uri: str, image: Mapping[str, Any], device: torch.device | str, remedy: str) -> ImageEncoder:
    """The encoder that a model's config.json names, the one that it has learned from.

    Raises:
        UserError: there is none, or another one; `remedy` says what to do.
    """
    try:
        encoder = load_image_encoder(image["encoder"], device)
    except UserError as e:
        raise UserError(f"{uri}: {e}; {remedy}") from e
    if encoder.digest != image["digest"]:
        raise UserError(
            f"{uri}: has learned from another image encoder than {image['encoder']} (digest {image['digest'][:12]}, not"
            f" {encoder.digest[:12]}); {remedy}"
        )
    return encoder


@torch.no_grad()
def boundary_tokens(encoder: ImageEncoder, frames: Tensor) -> Tensor:
    """The tokens of the two frames beside each gap: (B, 2, 3, H, W) in [-1, 1] -> (B, 2, K, E), fp32."""
    return encoder.tokens(frames.flatten(0, 1)).unflatten(0, (-1, SIDES))


class ImageIn(nn.Module):
    """The tokens of both frames, (B, 2, K, E) -> (B, 2 K, width), each with a learned vector that says which side it is of.

    Where the widths are the same it begins as the identity, as the paper has it: its widths coincide, and it maps nothing.
    """

    def __init__(self, image_width: int, width: int) -> None:
        super().__init__()
        self.project = nn.Linear(image_width, width)
        self.sides = nn.Parameter(torch.zeros(SIDES, 1, width))
        _begin(self.project)

    def forward(self, image: Tensor) -> Tensor:
        return (self.project(image.to(self.project.weight.dtype)) + self.sides).flatten(1, 2)


class Guide(nn.Module):
    """Text and boundary frames as the tokens that spatial blocks attend to."""

    def __init__(self, config: MavinConfig) -> None:
        super().__init__()
        self.image_width = config.image_width
        fields = {name: getattr(config, name) for name in ("text_width", "text_null", "text_empty")}
        fields |= {name: getattr(config, name) for name in ("text_padding", "text_length")}
        self.text_in = TextIn(SimpleNamespace(**fields, width=config.cross)) if config.text_width else None
        if self.text_in is not None and config.body == "unet":
            # a base has learned states as they are
            self.text_in.norm = nn.Identity()  # type: ignore[assignment]
            _begin(self.text_in.project)
        self.image_in = ImageIn(config.image_width, config.cross) if config.image_width else None

    def forward(
        self,
        x: Tensor,
        text: Tensor | None = None,
        text_mask: Tensor | None = None,
        image: Tensor | None = None,
        image_mask: Tensor | None = None,
    ) -> tuple[Tensor | None, Tensor | None]:
        """The tokens (B, N, width) for latents `x`, and which are seen, bool (B, N); None for a model without any.

        Args:
            text, text_mask: states (B, N, W) and which of them there are; without a text its null stands for it.
            image, image_mask: tokens (B, 2, K, E), and of which side they are seen, bool (B, 2); None: of both.

        Raises:
            ValueError: what the model does not take, or in another shape.
        """
        parts, seen = list[Tensor](), list[Tensor]()
        if text is not None and self.text_in is None:
            raise ValueError("text: this model takes none; leave it out")
        if image is not None and self.image_in is None:
            raise ValueError("image: this model takes none; leave it out")
        if self.text_in is not None:
            condition = None if text is None else Condition(text=text, mask=_mask(text, text_mask))
            tokens, there = self.text_in(condition, x)
            parts.append(tokens)
            seen.append(torch.ones(tokens.shape[:2], dtype=torch.bool, device=x.device) if there is None else there)
        if self.image_in is not None:
            # also without an image, so that all weights take part in every step of every rank
            given = x.new_zeros(len(x), SIDES, 1, self.image_width) if image is None else image
            if given.shape[:2] != (len(x), SIDES) or given.shape[-1] != self.image_width:
                raise ValueError(
                    f"image has shape {tuple(given.shape)}; this model needs ({len(x)}, {SIDES}, K, {self.image_width})"
                )
            which = torch.ones(len(x), SIDES, dtype=torch.bool) if image_mask is None else image_mask
            which = which.to(x.device) & (image is not None)
            parts.append(self.image_in(given))
            seen.append(which.repeat_interleave(given.shape[2], dim=1))
        if not parts:
            return None, None
        return torch.cat(parts, dim=1), torch.cat(seen, dim=1)


def _mask(text: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(text.shape[:2], dtype=torch.bool, device=text.device) if mask is None else mask


def _begin(linear: nn.Linear) -> None:
    """Let a map begin as the identity where its widths are the same."""
    if linear.in_features == linear.out_features:
        nn.init.eye_(linear.weight)
    nn.init.zeros_(linear.bias)
