"""What is known of a video transformer of another library: its class, its settings, and what both ask for.

What differs between classes is a row: a module with the names of `Row`, and a line in `ROWS`.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Protocol, cast

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from longtake.training.models.common.recompute import Share

if TYPE_CHECKING:
    from longtake.training.foreign.backbone_inputs import Inputs

# name of the class -> module that is its `Row`
ROWS = {
    "WanTransformer3DModel": "longtake.training.foreign.backbone_wan",
    "LTXVideoTransformer3DModel": "longtake.training.foreign.backbone_ltx",
    "HunyuanVideoTransformer3DModel": "longtake.training.foreign.backbone_hunyuan",
}


_DYNAMIC = ("base_image_seq_len", "max_image_seq_len", "base_shift", "max_shift")  # numbers of a scheduler


class Sizes(NamedTuple):
    """What the settings of a class say about its inputs.

    channels         of the noisy latents
    text_width       channels of the states of texts
    width            channels of a token
    patch            latents in a token: in time, rows and columns
    image_channels   further channels for a start image; 0: it has none
    image_width      channels of the states of a start image; 0: it attends to none
    pooled_width     of the vector of a text beside its states; 0: it has none
    embeds_guidance  guidance is among its inputs
    longest          tokens along each side, at most, that it has positions for; 0: any
    """

    channels: int
    text_width: int
    width: int
    patch: tuple[int, int, int]
    image_channels: int = 0
    image_width: int = 0
    pooled_width: int = 0
    embeds_guidance: bool = False
    longest: int = 0


class Row(Protocol):
    """What a class needs beside its own forward. Settings are those of its config.json.

    TEXT_LENGTH   tokens of a text at most, as its pipeline has them
    STRIDE        frames, and pixels a side, in a latent of its pipeline's autoencoder
    TARGETS       what a low-rank change changes by default: patterns of names of layers
    EVEN_TIMES    whether its pipeline spreads the times of a flow scheduler evenly down to 0, before they are shifted
    """

    TEXT_LENGTH: int
    STRIDE: tuple[int, int]
    TARGETS: tuple[str, ...]
    EVEN_TIMES: bool

    def sizes(self, settings: Mapping[str, Any]) -> Sizes:
        """What they say about its inputs. ValueError for settings that are not supported."""

    def build(self, make: Callable[..., Any], settings: Mapping[str, Any]) -> nn.Module:
        """The module, by its class."""

    def blocks(self, net: Any) -> Iterator[nn.Module]:
        """Its blocks in order."""

    def tokens(self, net: Any, x: Tensor) -> Tensor:
        """The tokens `(B, N, width)` of latents `(B, channels, T, H, W)`, before the first block."""

    def velocity(self, net: Any, config: BackboneConfig, inputs: Inputs) -> Tensor:
        """The velocity. ValueError for inputs that the class does not take, or that it needs and are not there."""


class BackboneConfig(BaseModel):
    """The numbers of one backbone.

    class_name        of its library, a name in `ROWS`
    settings          its class's own config.json
    scheduler         scheduler_config.json of its pipeline, with its class under `class_name`; {}: none
    expert            of two that share the times: `high` noise or `low`; None: it is alone
    boundary          the time, 0 to 1, from which on (towards noise) the `high` expert is asked
    expand_timesteps  its pipeline gives a start image as the first latent, clean and at time 0
    text_length       tokens of a text, at most, to which texts are padded where the class wants it; 0: as its pipeline
    text_empty        tokens of ""; 0: not known yet (see `Backbone.set_empty`)
    text_dropout      probability that training hides a text, for guidance [assumption: 0.1, as for our own]
    shape             (latents, height, width) of its training windows
    stride            frames, and pixels a side, in a latent; None: as its pipeline
    embedded_guidance what a class with guidance among its inputs gets in training [assumption: 1]
    activation_checkpointing   share of the blocks that the backward pass recomputes, true is all: less memory, more time
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    class_name: str
    settings: dict[str, Any]
    scheduler: dict[str, Any] = {}
    expert: Literal["high", "low"] | None = None
    boundary: float | None = Field(None, gt=0, lt=1)
    expand_timesteps: bool = False
    text_length: NonNegativeInt = 0
    text_empty: NonNegativeInt = 0
    text_dropout: float = Field(0.1, ge=0, le=1)
    shape: tuple[PositiveInt, PositiveInt, PositiveInt] | None = None
    stride: tuple[PositiveInt, PositiveInt] | None = None
    embedded_guidance: PositiveFloat = 1.0
    activation_checkpointing: Share = False

    @model_validator(mode="after")
    def _fits(self) -> BackboneConfig:
        if self.class_name not in ROWS:
            known = ", ".join(ROWS)
            raise ValueError(
                f"class_name: {self.class_name[:80]!r} is no video transformer known here; there are {known}"
            )
        if self.expert and self.boundary is None:
            raise ValueError(f"expert: {self.expert} has no range; give boundary, such as 0.875")
        check_scheduler(self.scheduler)
        try:
            _ = self.sizes
        except (TypeError, OverflowError) as e:
            raise ValueError(f"settings: not those of a {self.class_name} ({e})") from e
        return self

    @property
    def row(self) -> Row:
        """What its class needs."""
        return cast("Row", importlib.import_module(ROWS[self.class_name]))

    @cached_property
    def sizes(self) -> Sizes:
        """What its class takes."""
        return self.row.sizes(self.settings)

    @property
    def channels(self) -> int:
        """Channels of the noisy latents, which the codec has too."""
        return self.sizes.channels

    @property
    def text_width(self) -> int:
        """Channels of the states of texts."""
        return self.sizes.text_width

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.sizes.width

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents in a token: in time, rows and columns."""
        return self.sizes.patch

    @property
    def longest_text(self) -> int:
        """Tokens of a text, at most."""
        return self.text_length or self.row.TEXT_LENGTH

    @property
    def strides(self) -> tuple[int, int]:
        """Frames, and pixels a side, in a latent."""
        return self.stride or self.row.STRIDE

    def shift_of(self, shape: tuple[int, int, int]) -> float:
        """How far its pipeline moves the times towards noise (see `flow.shifted`) for a window of latents (T, H, W)."""
        return shift_of(self.scheduler, token_count(shape, self.patch))

    @property
    def times(self) -> tuple[float, float]:
        """The range of times that it is asked for."""
        if self.expert is None or self.boundary is None:
            return 0.0, 1.0
        return (self.boundary, 1.0) if self.expert == "high" else (0.0, self.boundary)


def token_count(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> int:
    """Tokens of a window of latents (T, H, W)."""
    return math.prod(side // size for side, size in zip(shape, patch, strict=True))


def check_scheduler(scheduler: Mapping[str, Any]) -> None:
    """ValueError for numbers of a scheduler's config that no shift and no times can be computed from."""
    most = {"num_train_timesteps": 100_000.0}
    for name in ("num_train_timesteps", "shift", "flow_shift", *_DYNAMIC):
        value, high = scheduler.get(name), most.get(name, 1e9)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= high
        ):
            raise ValueError(
                f"scheduler: {name} is {str(value)[:40]!r}; it must be a number above 0 and up to {high:g}"
            )
    if scheduler.get("base_image_seq_len", 256) == scheduler.get("max_image_seq_len", 4096):
        raise ValueError("scheduler: base_image_seq_len and max_image_seq_len are the same; they must differ")


def shift_of(scheduler: Mapping[str, Any], tokens: int) -> float:
    """The shift of a scheduler's config for a window of that many tokens; 1 for {}.

    With a dynamic shift the pipelines interpolate its logarithm (or itself, if `time_shift_type` is linear) between
    `base_shift` at `base_image_seq_len` tokens and `max_shift` at `max_image_seq_len`, and beyond.
    """
    if not scheduler.get("use_dynamic_shifting"):
        flow = scheduler.get("flow_shift") if "flow_shift" in scheduler else scheduler.get("shift")
        return 1.0 if flow is None else float(flow)
    # the defaults of the pipelines, which their schedulers' files may leave out
    low, high = scheduler.get("base_image_seq_len", 256), scheduler.get("max_image_seq_len", 4096)
    first, last = scheduler.get("base_shift", 0.5), scheduler.get("max_shift", 1.15)
    mu = first + (last - first) * (tokens - low) / (high - low)
    return float(mu if scheduler.get("time_shift_type") == "linear" else math.exp(mu))
