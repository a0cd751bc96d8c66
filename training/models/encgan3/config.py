"""The numbers of EncGAN3 (arXiv 2512.21776), and its presets."""

from __future__ import annotations

import math
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from longtake.training.models.encgan3.blocks import LEAST_FRAMES
from longtake.training.models.encgan3.recursion import Merge

# fmt: off
PRESETS: dict[str, dict[str, Any]] = {
    "encgan3":      dict(size=64,  width=64, attention=32),
    "encgan3_128":  dict(size=128, width=64, attention=32),
    "encgan3_tiny": dict(size=32,  width=8,  attention=16, groups=2),
}
# fmt: on

Differences = Literal["absolute", "signed"]


class EncGAN3Config(BaseModel):
    """The numbers of one EncGAN3. "G3AN" marks those of the code that the paper builds on (arXiv 1912.05523).

    size            height and width of frames in pixels, a power of 2 [G3AN: 64]
    frames          T of a clip, 12 + 4k [paper: 16]
    overlap         frames that two clips in a row have in common [assumption: a quarter of T]
    reference       frame of a clip that the next one begins from, in the overlap; null is the last before its middle
                    [assumption]
    merge           cut: clips are joined at the reference; fade: one becomes the other over the overlap [assumption: cut]
    width           channels of the last block and of the first layer of each trunk; up to 8 times as many inside [G3AN: 64]
    content         numbers that say what is to be seen, z_x [G3AN: 128]
    movement        numbers that say how it moves, z_v, one vector a clip [G3AN: 10; the paper leaves open how many]
    differences     of frames, which the movement encoder sees: absolute [paper], or signed, which have a direction
    recursion       previous: x_j = x_{j-1} + v_j [paper]; reference: x_j = x_r + v_j [assumption, for comparison]
    attention       side of the frames in pixels at which factorised attention looks; null has none [G3AN: 32 of 64]
    groups          of channels that are normalised together, at most [assumption: 16]
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: int = Field(64, ge=16)
    frames: int = Field(16, ge=LEAST_FRAMES)
    overlap: int = Field(4, ge=2)
    reference: int | None = None
    merge: Merge = "cut"
    width: PositiveInt = 64
    content: PositiveInt = 128
    movement: PositiveInt = 10
    differences: Differences = "absolute"
    recursion: Literal["previous", "reference"] = "previous"
    attention: PositiveInt | None = 32
    groups: PositiveInt = 16

    @model_validator(mode="before")
    @classmethod
    def _last_before_the_middle(cls, fields: Any) -> Any:
        if isinstance(fields, dict) and fields.get("reference") is None:
            frames, overlap = (fields.get(name, cls.model_fields[name].default) for name in ("frames", "overlap"))
            if isinstance(frames, int) and isinstance(overlap, int):
                return fields | {"reference": frames - overlap + (overlap + 1) // 2 - 1}
        return fields

    @model_validator(mode="after")
    def _fits(self) -> EncGAN3Config:
        if self.size & (self.size - 1):
            raise ValueError(f"size is {self.size}; it must be a power of 2, such as 64")
        if self.frames % 4:
            raise ValueError(
                f"frames is {self.frames}; it must be 12 + 4k, such as {self.frames // 4 * 4} or {self.frames // 4 * 4 + 4}"
            )
        if self.overlap >= self.frames:
            raise ValueError(f"overlap is {self.overlap}; it must be less than frames, {self.frames}")
        if not self.frames - self.overlap <= self.joint < self.frames:
            raise ValueError(
                f"reference is {self.joint}; it must be in the overlap, {self.frames - self.overlap} to {self.frames - 1}"
            )
        sides = [2**n for n in range(2, int(math.log2(self.size)) + 1)]
        if self.attention is not None and self.attention not in sides:
            raise ValueError(f"attention is {self.attention}; it must be null or one of {', '.join(map(str, sides))}")
        return self

    @property
    def joint(self) -> int:
        """Frame of a clip that the next one begins from."""
        assert self.reference is not None
        return self.reference

    @property
    def index(self) -> int:
        """Number that the frame `joint` of a clip has in the next one."""
        return self.joint - (self.frames - self.overlap)

    @property
    def span(self) -> int:
        """Frames of two clips that overlap."""
        return 2 * self.frames - self.overlap


def config_from_preset(preset: str, **overrides: Any) -> EncGAN3Config:
    """The preset's config with some fields replaced. ValueError for an unknown preset or field."""
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; choose one of: {', '.join(PRESETS)}")
    return EncGAN3Config(**PRESETS[preset] | overrides)
