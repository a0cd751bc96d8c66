"""Text in a transformer: the states of an encoder, projected once, and cross-attention to them in every block.

What stands for no text and what stands behind the end of a text are part of a model, since its weights have learned them:
both are fields of its config.

    text_width     channels of an encoder's states; 0 is a model without text
    text_dropout   probability that training hides a text, for guidance [assumption: 0.1, as for classes]
    text_null      what stands for no text: empty, the encoder's states of ""; learned, one token; zeros, no token at all
    text_empty     tokens of ""
    text_padding   what is behind a text's last token: mask, nothing; zeros, states of zero up to `text_length`, which are
                   attended to, as Wan has them
    text_length    tokens of a text, at most

Width, length and the tokens of "" follow from the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from longtake.datasets.text import Text
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.guidance import Guidance, parts_of

FROM_DATA = ("text_width", "text_empty", "text_length")  # the fields that follow from a column of texts


def fields_of(text: Text | None) -> dict[str, int]:
    """The fields of a config that follow from a column of texts; none without."""
    if text is None:
        return {}
    return {"text_width": text.width, "text_empty": len(text.empty()), "text_length": int(text.encoder["length"])}


def check_settings(model: Mapping[str, Any], text: str | None) -> None:
    """ValueError where a stage's `model` has fields that follow from the texts, or any without texts."""
    for name in (name for name in model if name.startswith("text_")):
        if text is None:
            raise ValueError(
                f"model: {name}: has no effect without texts; name a `cache_text` stage in text, or leave it out"
            )
        if name in FROM_DATA:
            raise ValueError(f"{name} follows from the stage's other settings; leave it out")


def check_fields(config: Any) -> None:
    """ValueError where a config's text fields do not fit together."""
    if config.text_width and config.text_null == "empty" and not 1 <= config.text_empty <= config.text_length:
        raise ValueError(
            f"text_empty is {config.text_empty}; with text_null: empty it is the number of tokens of an empty text, 1 to"
            f" text_length, {config.text_length}"
        )


def check_guidance(config: Any, guidance: float | Guidance) -> None:
    """ValueError where guidance leads away from what training never hid, which the model does not know how to do without.

    Guidance of its own for what a model has not learned is refused too; one number for all is that of what it has.
    """
    parts = parts_of(guidance)
    learned = (
        ("classes", config.classes, "label_dropout", config.label_dropout, parts.classes),
        ("text", config.text_width, "text_dropout", config.text_dropout, parts.text),
        # few models hear
        (
            "audio",
            getattr(config, "audio_codes", 0),
            "audio_dropout",
            getattr(config, "audio_dropout", 0.0),
            parts.audio,
        ),
    )
    for what, has, field, dropout, strength in learned:
        if not has and isinstance(guidance, Guidance) and strength != 1.0:
            raise ValueError(f"guidance: {what} is {strength:g}, and this model has learned no {what}; leave it out")
        if has and not dropout and strength != 1.0:
            raise ValueError(
                f"guidance is {strength:g}: this model was trained with {field}: 0 and cannot do without {what};"
                " leave guidance at 1"
            )


def is_of_text(name: str) -> bool:
    """Whether a model's tensor belongs to its text."""
    return name.startswith("text_in.") or ".text." in name


def set_empty(text_in: TextIn | None, text: Text | None) -> None:
    """Give a model the states of "" of the texts that it learns."""
    if text_in is not None and text is not None:
        text_in.set_empty(torch.from_numpy(text.empty()))


class TextIn(nn.Module):
    """Texts -> the tokens `(B, N, width)` that all blocks attend to, and which of them are seen.

    `config` has the fields above. A sample, or a frame of it, that has no text sees `null` in its place.
    """

    null: Tensor | None  # (tokens, text_width)

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.width, self.padding, self.length = config.text_width, config.text_padding, config.text_length
        self.norm = nn.LayerNorm(self.width)
        self.project = nn.Linear(self.width, config.width)
        if config.text_null == "learned":
            self.null = nn.Parameter(torch.randn(1, self.width))
        else:
            states = torch.zeros(config.text_empty, self.width) if config.text_null == "empty" else None
            self.register_buffer("null", states)

    def set_empty(self, states: Tensor) -> None:
        """Set the states of "", `(text_empty, text_width)`, if they stand for no text. ValueError for another shape."""
        null = self._buffers.get("null")
        if null is None:
            return
        if states.shape != null.shape:
            raise ValueError(f"empty has shape {tuple(states.shape)}; this model needs {tuple(null.shape)}")
        null.copy_(states)

    def forward(
        self, condition: Condition | None, x: Tensor, hidden: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The tokens for a batch of video, and which are seen, `(B, N)` or by frame `(B, T, N)`; None: all.

        Args:
            condition: of the batch `x` `(B, C, T, H, W)`; None is an empty one.
            hidden: bool `(B,)`, samples that lose their text; None: none do.

        Raises:
            ValueError: texts of another width, of too many tokens, or for another number of samples or frames.
        """
        text, mask = self._given(condition or Condition(), x)
        if hidden is not None:
            mask = mask & ~hidden.view(-1, *[1] * (mask.ndim - 1))
        text, seen = self._padded(text, mask) if self.padding == "zeros" else self._masked(text, mask)
        return self.project(self.norm(text)), seen

    def _given(self, condition: Condition, x: Tensor) -> tuple[Tensor, Tensor]:
        """The texts of a batch on its device, and their mask; without any, texts of no token."""
        batch, frames, dtype = x.shape[0], x.shape[2], self.project.weight.dtype
        if condition.text is None or condition.mask is None:
            empty = torch.zeros(batch, 0, self.width, dtype=dtype, device=x.device)
            return empty, torch.zeros(batch, 0, dtype=torch.bool, device=x.device)
        text, mask = condition.text, condition.mask
        if text.shape[0] != batch or text.shape[2] != self.width:
            raise ValueError(f"text has shape {tuple(text.shape)}; this model needs ({batch}, N, {self.width})")
        if mask.ndim == 3 and mask.shape[1] != frames:
            raise ValueError(f"mask has shape {tuple(mask.shape)}; a window of {frames} needs ({batch}, {frames}, N)")
        if mask.ndim == 2 and text.shape[1] > self.length:
            raise ValueError(f"text has {text.shape[1]} tokens; this model takes {self.length}: shorten it")
        return text.to(x.device, dtype), mask.to(x.device)

    def _masked(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The null tokens and then the texts: one of both is seen."""
        text, seen = self._with_null(text, mask)
        if not text.shape[1]:
            # attention needs a key, also where nobody sees it
            text, seen = F.pad(text, (0, 0, 0, 1)), F.pad(seen, (0, 1))
        return text, seen

    def _padded(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor | None]:
        """Texts, or the null tokens in their place, with states of zero up to `length`; all are seen."""
        if mask.ndim == 2:
            # most attention kernels are faster without a mask. The order of keys does not matter
            text = torch.where(mask[..., None], text, 0.0)
            text, null = (F.pad(part, (0, 0, 0, self.length - part.shape[-2])) for part in (text, self._none(text)))
            return torch.where(mask.any(1)[:, None, None], text, null), None
        text, seen = self._with_null(text, mask)
        missing = self.length - seen.sum(-1, keepdim=True)
        zeros = torch.arange(self.length, device=text.device) < missing
        return F.pad(text, (0, 0, 0, self.length)), torch.cat([seen, zeros], dim=-1)

    def _with_null(self, text: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """The null tokens in front of the texts, seen where no text is."""
        null = self._none(text).expand(len(text), -1, -1)
        instead = (~mask.any(-1, keepdim=True)).expand(*mask.shape[:-1], null.shape[1])
        return torch.cat([null, text], dim=1), torch.cat([instead, mask], dim=-1)

    def _none(self, like: Tensor) -> Tensor:
        """The tokens of no text, maybe none."""
        return like.new_zeros(0, self.width) if self.null is None else self.null.to(like.dtype)


class TextAttention(nn.Module):
    """What a text adds to video tokens `(B, T, S, D)`; nothing at the start of training, whatever the text.

    So a model that has learned video without text continues as it was. Queries and keys are normed in each head, as in Wan
    [arXiv 2503.20314]: encoders differ in the size of their states, and bf16 has few digits.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.query_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.key_norm = nn.RMSNorm(width // heads, eps=1e-6)
        self.out = nn.Linear(width, width)
        self.start()

    def start(self) -> None:
        """Let it add nothing."""
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def keys(self, text: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, `(B, heads, N, D / heads)`, of the tokens of `TextIn`, for several calls with the same text."""
        key, value = self.key_value(text).unflatten(-1, (2, self.heads, -1)).unbind(2)
        return self.key_norm(key).transpose(1, 2), value.transpose(1, 2)

    def forward(
        self, x: Tensor, text: Tensor, seen: Tensor | None, keys: tuple[Tensor, Tensor] | None = None
    ) -> Tensor:
        """What to add to `x`, given the tokens of `TextIn`, or their `keys` too, and which are seen; zero where none is."""
        normed = F.layer_norm(x.float(), x.shape[-1:], eps=1e-6).to(x.dtype).flatten(1, 2)
        query = self.query_norm(self.query(normed).unflatten(-1, (self.heads, -1))).transpose(1, 2)
        key, value = keys or self.keys(text)
        if seen is None:
            return self._added(F.scaled_dot_product_attention(query, key, value), x)
        some = seen.any(-1, keepdim=True)
        # a softmax over nothing is NaN: who sees nothing sees all, and then gets zero
        mask = seen | ~some
        mask = mask[:, None] if mask.ndim == 2 else mask.repeat_interleave(x.shape[2], dim=1)
        added = self._added(F.scaled_dot_product_attention(query, key, value, mask[:, None]), x)
        return torch.where(some.view(len(x), -1, 1, 1), added, 0.0)

    def _added(self, mixed: Tensor, x: Tensor) -> Tensor:
        added: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return added.view_as(x)


def text_tokens(
    text_in: TextIn | None, condition: Condition | None, x: Tensor, hidden: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """What `text_in` makes of a batch's texts; nothing for a model without text, which refuses any: ValueError."""
    if text_in is not None:
        tokens, seen = text_in(condition, x, hidden)
        return tokens, seen
    if condition is not None and condition.text is not None:
        raise ValueError("text: this model takes none; leave it out")
    return None, None
