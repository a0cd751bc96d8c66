"""What the configs of all transformers with a memory have: the memory, its history, and the segments that see it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveInt, model_validator

from longtake.training.models.common.recompute import Share
from longtake.training.models.memory.tokens import parse_rate
from longtake.training.models.memory.variants import VARIANTS, Variant


class MemoryModelConfig(BaseModel):
    """The memory of one model. "Assumption" marks what the paper does not give.

    memory          encoder: φ; patchify: one linear map at the rate; framepack: `baselines.FRAMEPACK`; none
    rates           of the encoders or patchifiers, HxWxT over the token grid; their tokens are concatenated
    branches        of the encoders: both, or only one for comparison
    memory_widths   of an encoder's convolutions [paper: 64, 128, 256, 512]
    memory_heads    of its attention [assumption: 8]
    cross_attention every block also attends to the encoders' last hidden states
    history         latents that the memory reaches back, at most
    shape           (T, H, W) in latents of a segment, which is generated at once
    window          recent latents, clean beside the memory [paper: 3]; config.json has this name
    history_noise   most noise, as a time of the flow, that its history had in training; it sees the level
    activation_checkpointing   share of the blocks, and of an encoder's convolutions, that the backward pass recomputes, true is
                    all: less memory, more time

    A config of a transformer adds its own numbers, and has

        channels, patch, width   of the latents, of a token's side in latents, of the tokens
        classes, label_dropout   0 classes where it has none
        text_width, text_dropout, text_length   of the text that it attends to; a width of 0 is none
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    memory: Literal["encoder", "patchify", "framepack", "none"] = "encoder"
    rates: tuple[str, ...] = Field(("4x4x2",), min_length=1)
    branches: Literal["both", "high", "low"] = "both"
    memory_widths: tuple[PositiveInt, ...] = Field((64, 128, 256, 512), min_length=1)
    memory_heads: PositiveInt = 8
    cross_attention: bool = False
    history: NonNegativeInt = 120
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    window: NonNegativeInt = 3
    history_noise: float = Field(0.0, ge=0, lt=1)
    activation_checkpointing: Share = False

    if TYPE_CHECKING:

        @property
        def channels(self) -> int: ...
        @property
        def patch(self) -> int: ...
        @property
        def width(self) -> int: ...
        @property
        def classes(self) -> int: ...
        @property
        def label_dropout(self) -> float: ...
        @property
        def text_width(self) -> int: ...
        @property
        def text_dropout(self) -> float: ...
        @property
        def text_length(self) -> int: ...

    @model_validator(mode="after")
    def _check_memory(self) -> MemoryModelConfig:
        if self.patch & (self.patch - 1):
            raise ValueError(f"patch is {self.patch}; it must be a power of two")
        if self.shape and (self.shape[1] % self.patch or self.shape[2] % self.patch):
            raise ValueError(f"shape: {self.shape[1]}x{self.shape[2]} is no multiple of patch {self.patch}")
        if len({parse_rate(rate) for rate in self.rates}) < len(self.rates):
            raise ValueError(f"rates: {', '.join(self.rates)} has one twice")
        if self.memory_widths[-1] % self.memory_heads:
            raise ValueError(
                f"memory_widths end with {self.memory_widths[-1]}, no multiple of {self.memory_heads} heads"
            )
        self._check_group()
        if self.cross_attention and (self.memory != "encoder" or self.branches == "low"):
            raise ValueError("cross_attention: needs memory: encoder with its high branch, whose states it reads")
        return self

    def _check_group(self) -> None:
        """Refuse a segment or a history that is smaller than one token of the memory."""
        if not self.variant.empty and self.history < self.group:
            raise ValueError(f"history is {self.history} steps; one token of the memory stands for {self.group}")
        if not self.shape or not self.variant.rated:
            return
        _, height, width = self.shape
        for rows, columns, _ in map(parse_rate, self.rates):
            if self.patch * rows > height or self.patch * columns > width:
                raise ValueError(
                    f"rates: one token of the memory stands for {self.patch * rows}x{self.patch * columns}, frames are"
                    f" {height}x{width}"
                )

    @property
    def variant(self) -> Variant:
        """The row of its memory."""
        return VARIANTS[self.memory]

    @property
    def shrink(self) -> tuple[int, int] | None:
        """The factors (height, width) that videos are scaled down by for `low`; None where `low` is not read."""
        if not self.variant.low or self.branches == "high":
            return None
        rates = [parse_rate(rate) for rate in self.rates]
        return min(rate[0] for rate in rates), min(rate[1] for rate in rates)

    @property
    def group(self) -> int:
        """Latents of a group; histories, and chunks of them, are whole groups."""
        return max(parse_rate(rate)[2] for rate in self.rates) if self.variant.rated else 1

    def tokens(self, shape: tuple[int, int, int]) -> int:
        """The number of tokens that stand for a history of `shape` (T, H, W) in latents."""
        return self.variant.tokens(self, shape)
