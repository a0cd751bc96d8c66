"""The config of a `memory_dit` and its presets."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from longtake.training.models.common.text import check_fields
from longtake.training.models.memory.model_config import MemoryModelConfig

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {  # parameters with 64 channels, patch 1, no classes, one encoder at 4x4x2
    "memory_dit_xl":   dict(depth=28, width=1152, heads=16),  # 678M, of which the encoder has 4.6M
    "memory_dit_l":    dict(depth=24, width=1024, heads=16),  # 461M
    "memory_dit_b":    dict(depth=12, width=768,  heads=12),  # 134M
    "memory_dit_s":    dict(depth=12, width=384,  heads=6),   # 37M
    "memory_dit_tiny": dict(depth=4,  width=128,  heads=4, memory_widths=(32, 64, 128, 256)),  # 2.3M
}
# fmt: on


class MemoryDiTConfig(MemoryModelConfig):
    """The config of one model: its memory (`MemoryModelConfig`) and its own transformer.

    depth, width, heads   of the transformer; a head's width must be even, 6 at least
    channels        of the latents
    patch           positions a side that make one token, a power of two
    mlp_ratio       hidden width of the MLPs over `width`
    classes         their number: ids are 0..classes-1; 0 is an unconditional model
    label_dropout   probability that training hides a class, for guidance [assumption: 0.1]
    text_width, text_dropout, text_null, text_empty, text_padding, text_length   of text (see `common.text`)
    """

    depth: PositiveInt
    width: PositiveInt
    heads: PositiveInt
    channels: PositiveInt = 64
    patch: PositiveInt = 1
    mlp_ratio: PositiveInt = 4
    classes: NonNegativeInt = 0
    label_dropout: float = Field(0.1, ge=0, le=1)
    text_width: NonNegativeInt = 0
    text_dropout: float = Field(0.1, ge=0, le=1)
    text_null: Literal["empty", "zeros", "learned"] = "empty"
    text_empty: NonNegativeInt = 0
    text_padding: Literal["mask", "zeros"] = "mask"
    text_length: PositiveInt = 512

    @model_validator(mode="after")
    def _check_fields(self) -> MemoryDiTConfig:
        if self.width % self.heads or self.width // self.heads % 2 or self.width // self.heads < 6:
            raise ValueError(f"width is {self.width}; divided by heads, {self.heads}, it must be even and 6 at least")
        check_fields(self)
        return self


def config_from_preset(preset: str, **overrides: Any) -> MemoryDiTConfig:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if not isinstance(preset, str) or preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return MemoryDiTConfig(**PRESETS[preset] | overrides)
