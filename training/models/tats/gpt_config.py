"""The numbers of one transformer of TATS, and the order in which it reads a window."""

from __future__ import annotations

from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator
from torch import Tensor

from longtake.training.models.common.recompute import Share
from longtake.training.models.common.text import check_fields

Mode = Literal["base", "anchors", "interpolate"]
ANCHORS = 2  # frames that are given in a gap between anchors

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {  # parameters with 16,384 codes and a window of 4x16x16
    "tats_paper": dict(depth=24, width=1024, heads=16),  # 337M
    "tats_small": dict(depth=12, width=512,  heads=8),   # 55M
    "tats_tiny":  dict(depth=4,  width=128,  heads=4),   # 5.1M
}
# fmt: on


class TATSConfig(BaseModel):
    """The numbers of one TATS. "Assumption" marks what the paper does not say.

    depth           blocks [paper: 24]
    width           channels of a token, a multiple of `heads` [paper: 1024]
    heads           of the attention [paper: 16]
    codes           of the video's tokenizer [paper: 16,384]
    shape           (latent frames, height, width) of a window of tokens [paper: 4x16x16; 16 and 5 frames for the two
                    modes of the hierarchy]
    mode            base: all frames, one after the other; anchors: every `every`-th; interpolate: first the first and the last
                    frame, which are given, then those between
    every           latent frames from an anchor to the next [paper: 4]
    mlp_ratio       hidden width of the MLPs over `width` [paper: 4]
    classes         number of classes, with ids 0..classes-1; 0 is an unconditional model
    label_dropout   probability that training hides a class, for guidance [assumption: 0.1]
    words           size of the vocabulary of texts whose embeddings the model learns itself; 0 is none
    word_length     tokens of such a text, at most [paper: 256]
    text_width, text_dropout, text_null, text_empty, text_padding, text_length   of texts whose states an encoder has made
                    (see `common.text`); `text_dropout` is that of words, too
    audio_codes     of the sound's tokenizer; 0 is a model without sound [paper: 1024]
    audio_tokens    of a latent frame's sound [paper: 16]
    audio_dropout   probability that training hides the sound of a window, for guidance [assumption: 0.1]
    activation_checkpointing   share of the blocks that the backward pass recomputes, true is all: less memory, more time
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    depth: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    codes: PositiveInt
    shape: tuple[PositiveInt, PositiveInt, PositiveInt]
    mode: Mode = "base"
    every: int = Field(4, ge=2)
    mlp_ratio: PositiveInt = 4
    classes: NonNegativeInt = 0
    label_dropout: float = Field(0.1, ge=0, le=1)
    words: NonNegativeInt = 0
    word_length: PositiveInt = 256
    text_width: NonNegativeInt = 0
    text_dropout: float = Field(0.1, ge=0, le=1)
    text_null: Literal["empty", "zeros", "learned"] = "empty"
    text_empty: NonNegativeInt = 0
    text_padding: Literal["mask", "zeros"] = "mask"
    text_length: PositiveInt = 512
    audio_codes: NonNegativeInt = 0
    audio_tokens: NonNegativeInt = 0
    audio_dropout: float = Field(0.1, ge=0, le=1)
    activation_checkpointing: Share = False

    @model_validator(mode="after")
    def _fits(self) -> TATSConfig:
        frames = self.shape[0]
        if self.width % self.heads:
            raise ValueError(f"width is {self.width}; it must be a multiple of heads, {self.heads}")
        if self.mode == "interpolate" and frames != self.every + 1:
            raise ValueError(
                f"shape: mode interpolate reads windows of every + 1 = {self.every + 1} latent frames, not {frames}"
            )
        if self.mode == "anchors" and frames <= self.every:
            raise ValueError(
                f"shape: mode anchors reads every {self.every}th latent frame, and its windows have {frames}: needs"
                f" {self.every + 1} or more"
            )
        if self.words and self.text_width:
            raise ValueError("words and text: a model learns its texts in one of the two ways; leave one out")
        if bool(self.audio_codes) != bool(self.audio_tokens):
            raise ValueError("audio_codes and audio_tokens: give both or none")
        check_fields(self)
        return self

    @property
    def cells(self) -> int:
        """Tokens of a latent frame."""
        return self.shape[1] * self.shape[2]

    @property
    def order(self) -> tuple[int, ...]:
        """The window's frames that are read, in the order in which they are."""
        frames = self.shape[0]
        if self.mode == "interpolate":
            return (0, frames - 1, *range(1, frames - 1))
        return tuple(range(0, frames, self.every if self.mode == "anchors" else 1))

    @property
    def given(self) -> int:
        """The frames at the beginning of the order that are never predicted."""
        return ANCHORS if self.mode == "interpolate" else 0

    @property
    def predicted(self) -> int:
        """The tokens of a window that are predicted, at the end of its sequence."""
        return (len(self.order) - self.given) * self.cells

    @property
    def conditions(self) -> int:
        """The tokens in front of the video's: the class or the start, words, and the sound of the window's frames."""
        return 1 + (self.word_length if self.words else 0) + self.audio_tokens * self.shape[0]

    @property
    def condition_ids(self) -> int:
        """The size of the conditions' vocabulary, which is in front of the video's: start, padding, classes, words, sound."""
        return 2 + self.classes + self.words + self.audio_codes

    def sequence(self, tokens: Tensor) -> Tensor:
        """A window's tokens `(B, t, h, w)` in the order in which they are read: `(B, n)`."""
        if tokens.shape[1:] != self.shape:
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}; this model needs (B, {self._sides})")
        # a list as an index would be copied to the device, which waits for all before it
        return torch.stack([tokens[:, place] for place in self.order], dim=1).flatten(1)

    @property
    def _sides(self) -> str:
        return ", ".join(map(str, self.shape))


def config_from_preset(preset: str, **overrides: Any) -> TATSConfig:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return TATSConfig(**PRESETS[preset] | overrides)
