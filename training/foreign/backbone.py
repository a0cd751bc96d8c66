"""A video transformer of another library as a velocity of our flow: `Backbone`.

What differs between classes is a row, a module with the names of `Row`, and a line in `ROWS`. A backbone owns the scale of
its times, the padding of its texts, its masks, the packing of its tokens and the scale of its positions. All classes here
predict noise - data at (1 - t) data + t noise, which is the velocity of `common/flow.py` with its sign.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple, Protocol, cast

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator
from torch import Tensor, nn

from longtake.training.foreign.front import Front
from longtake.training.foreign.library import class_of
from longtake.training.models.common.condition import Condition, draw_hidden

# name of the class -> module that is its `Row`
ROWS = {
    "WanTransformer3DModel": "longtake.training.foreign.backbone_wan",
}
STEPS = 1000  # times of the classes are 0 to 1000
FRONT = frozenset({"WanTransformer3DModel"})  # classes that take tokens in front, missing latents, and texts by latent


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


class Row(Protocol):
    """What a class needs beside its own forward. Settings are those of its config.json.

    TEXT_LENGTH   tokens of a text at most, as its pipeline has them
    STRIDE        frames, and pixels a side, in a latent of its pipeline's autoencoder
    TARGETS       what a low-rank change changes by default: patterns of names of layers
    """

    TEXT_LENGTH: int
    STRIDE: tuple[int, int]
    TARGETS: tuple[str, ...]

    def channels(self, settings: Mapping[str, Any]) -> int:
        """Channels of the noisy latents."""

    def text_width(self, settings: Mapping[str, Any]) -> int:
        """Channels of the states of texts."""

    def width(self, settings: Mapping[str, Any]) -> int:
        """Channels of a token."""

    def patch(self, settings: Mapping[str, Any]) -> tuple[int, int, int]:
        """Latents in a token: in time, rows and columns."""

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
    activation_checkpointing   recompute blocks in the backward pass: less memory, more time
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
    activation_checkpointing: bool = False

    @model_validator(mode="after")
    def _fits(self) -> BackboneConfig:
        if self.class_name not in ROWS:
            known = ", ".join(ROWS)
            raise ValueError(
                f"class_name: {self.class_name[:80]!r} is no video transformer known here; there are {known}"
            )
        if self.expert and self.boundary is None:
            raise ValueError(f"expert: {self.expert} has no range; give boundary, such as 0.875")
        return self

    @property
    def row(self) -> Row:
        """What its class needs."""
        return cast("Row", importlib.import_module(ROWS[self.class_name]))

    @property
    def channels(self) -> int:
        """Channels of the noisy latents, which the codec has too."""
        return self.row.channels(self.settings)

    @property
    def text_width(self) -> int:
        """Channels of the states of texts."""
        return self.row.text_width(self.settings)

    @property
    def width(self) -> int:
        """Channels of a token."""
        return self.row.width(self.settings)

    @property
    def patch(self) -> tuple[int, int, int]:
        """Latents in a token: in time, rows and columns."""
        return self.row.patch(self.settings)

    @property
    def longest_text(self) -> int:
        """Tokens of a text, at most."""
        return self.text_length or self.row.TEXT_LENGTH

    @property
    def strides(self) -> tuple[int, int]:
        """Frames, and pixels a side, in a latent."""
        return self.stride or self.row.STRIDE

    @property
    def times(self) -> tuple[float, float]:
        """The range of times that it is asked for."""
        if self.expert is None or self.boundary is None:
            return 0.0, 1.0
        return (self.boundary, 1.0) if self.expert == "high" else (0.0, self.boundary)


class Backbone(nn.Module):
    """Velocity of the rectified flow at latents x_t `(B, C, T, H, W)` as their codec gives them, for any T, H and W.

    Inputs are cast to the dtype of the weights; outputs have it. Names of weights are `net.` and the class's own.
    `empty`, `(text_empty, text_width)`, are the states of "", which stand for no text.
    """

    empty: Tensor

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.net = config.row.build(class_of(config.class_name), config.settings)
        self.register_buffer("empty", torch.zeros(config.text_empty, config.text_width))

    def keep_fp32(self) -> dict[str, Tensor]:
        """The weights and buffers that stay fp32 in any dtype of the others, as the class asks for, by name."""
        kept = set(getattr(self.net, "_keep_in_fp32_modules", None) or ())
        tensors = [*self.named_parameters(), *self.named_buffers()]
        return {name: tensor for name, tensor in tensors if kept & set(name.split("."))}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Backbone:
        """As of any module, which `to`, `half` and `bfloat16` call; of what stays fp32 only the device changes."""
        kept = self.keep_fp32().values()
        held = {id(tensor) for tensor in kept} | {id(tensor.grad) for tensor in kept if tensor.grad is not None}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            keeps = id(tensor) in held and result.is_floating_point() and result.dtype != torch.float32
            return tensor.to(result.device, torch.float32) if keeps else result

        return cast("Backbone", super()._apply(moved, recurse))

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights, but for those that stay fp32."""
        kept = self.keep_fp32()
        return next(p.dtype for name, p in self.named_parameters() if name not in kept)

    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in order, for example for `block.compile()`."""
        return self.config.row.blocks(self.net)

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Patterns of names of the layers that a low-rank change changes by default."""
        return self.config.row.TARGETS

    def set_empty(self, states: Tensor) -> None:
        """Set the states of "", `(n, text_width)`; their number becomes `text_empty`. ValueError for another width."""
        if states.ndim != 2 or not len(states) or states.shape[1] != self.config.text_width:
            raise ValueError(f"empty has shape {tuple(states.shape)}; this model needs (n, {self.config.text_width})")
        self.empty = states.to(self.empty.device, self.empty.dtype, copy=True)
        self.config = self.config.model_copy(update={"text_empty": len(states)})

    def normalise(self, latent: Tensor) -> Tensor:
        """The latent itself, fp32: a foreign codec's are in the space of its transformer."""
        return latent.float()

    def denormalise(self, latent: Tensor) -> Tensor:
        """The latent itself, fp32."""
        return latent.float()

    def shift_of(self, shape: tuple[int, int, int]) -> float:
        """How far its pipeline moves the times towards noise (see `flow.shifted`) for a window of latents (T, H, W)."""
        return shift_of(self.config.scheduler, token_count(shape, self.config.patch))

    def tokens(self, x: Tensor) -> Tensor:
        """The tokens `(B, N, width)` of latents `(B, C, T, H, W)`, by time, row and column, before the first block."""
        return self.config.row.tokens(self.net, x.to(self.dtype))

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        condition: Condition | None = None,
        rng: torch.Generator | None = None,
        *,
        image: Tensor | None = None,
        image_states: Tensor | None = None,
        fps: float | Tensor | None = None,
        pooled: Tensor | None = None,
        guidance: float | None = None,
        front: Front | None = None,
        places: Tensor | None = None,
        present: Tensor | None = None,
    ) -> Tensor:
        """The velocity `(B, C, T, H, W)`.

        t             0 (data) to 1 (noise): `(B,)`, or `(B, T)` with 0 for clean latents
        condition     of the batch; None, or a sample without text: the text "". In training mode a share `text_dropout` of
                      the samples loses its text, drawn from `rng` (on the device of `x`)
        image         for a class with channels for a start image: the codec's latents `(B, C, T, H, W)` of a video that
                      shows it and then grey. For all others: clean first latents `(B, C, k, H, W)`, that take the place of
                      those of `x` at time 0
        image_states  states of the image of a vision encoder, `(B, N, D)`, for a class that attends to them
        fps           frames a second of the videos, one for all or `(B,)`, for a class whose positions are in seconds
        pooled        one vector for each text, `(B, D)`, for a class that takes one beside its states
        guidance      for a class with guidance among its inputs; None: `embedded_guidance`
        front         tokens in front of the window's own, which all attend to, and that are no part of the result
        places        positions of the latents in time, `(T,)` or `(B, T)`; None: 0, 1, 2 ...
        present       `(B, T)` bool, False for latents that a sample does not have; None: it has all

        Raises:
            ValueError: another shape; text that the model does not take; something that it needs is not given.
        """
        config = self.config
        self._check_shapes(x, t)
        if condition is not None and (condition.classes is not None or condition.audio is not None):
            condition = _text_only(condition)
        lost = draw_hidden(condition, x, 0.0, config.text_dropout, rng).text if self.training else None
        text, seen = self._texts(condition, x, lost)
        if config.class_name not in FRONT and (front is not None or present is not None or seen.ndim == 3):
            known = ", ".join(sorted(FRONT))
            raise ValueError(f"{config.class_name}: takes no memory, missing latents or texts by latent; {known} does")
        x = x.to(self.dtype)
        if image is not None:
            image = image.to(x)
        front = front and front._replace(tokens=front.tokens.to(x))
        inputs = Inputs(
            x, t.float(), text, seen, self.empty.to(x), image, None, fps, None, guidance, front, places, present
        )
        inputs = inputs._replace(
            image_states=None if image_states is None else image_states.to(x),
            pooled=None if pooled is None else pooled.to(x),
        )
        net: Any = self.net
        net.gradient_checkpointing = config.activation_checkpointing and self.training
        return config.row.velocity(net, config, inputs)

    def _texts(self, condition: Condition | None, x: Tensor, lost: Tensor | None) -> tuple[Tensor, Tensor]:
        """States `(B, N, D)`, the ones that count first and then zeros, and which count: those of "" where there is no text.

        With texts by latent they stay in their order, and `(B, T, N)` says which count.
        """
        text, mask = self._given(condition, x)
        if lost is not None:
            mask = mask & ~lost.view(-1, *[1] * (mask.ndim - 1))
        without = ~mask.any(-1, keepdim=True)
        if not len(self.empty) and bool(without.any()):
            raise ValueError(
                'text: this model does not know the states of "" yet, which stand for no text; give a text'
            )
        text = torch.cat([text, self.empty.to(text).expand(len(x), -1, -1)], dim=1)
        seen = torch.cat([mask, without.expand(*mask.shape[:-1], len(self.empty))], dim=-1)
        if seen.ndim == 3:
            return torch.where(seen.any(1)[..., None], text, 0.0), seen
        order = (~seen).int().argsort(dim=1, stable=True)
        seen = seen.gather(1, order)
        text = text.gather(1, order[..., None].expand_as(text))
        return torch.where(seen[..., None], text, 0.0), seen

    def _given(self, condition: Condition | None, x: Tensor) -> tuple[Tensor, Tensor]:
        """The texts of a batch on its device, and their mask; without any, texts of no token."""
        batch, width = x.shape[0], self.config.text_width
        if condition is None or condition.text is None or condition.mask is None:
            nothing = torch.zeros(batch, 0, width, dtype=self.dtype, device=x.device)
            return nothing, torch.zeros(batch, 0, dtype=torch.bool, device=x.device)
        text, mask = condition.text, condition.mask
        if text.shape[0] != batch or text.shape[2] != width:
            raise ValueError(f"text has shape {tuple(text.shape)}; this model needs ({batch}, N, {width})")
        if mask.ndim == 3 and mask.shape[1] != x.shape[2]:
            raise ValueError(
                f"mask has shape {tuple(mask.shape)}; {x.shape[2]} latents need ({batch}, {x.shape[2]}, N)"
            )
        if mask.ndim == 3 and bool((mask == mask[:, :1]).all()):
            mask = mask[:, 0]
        return text.to(x.device, self.dtype), mask.to(x.device)

    def _check_shapes(self, x: Tensor, t: Tensor) -> None:
        config = self.config
        if x.ndim != 5 or x.shape[1] != config.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; this model needs (B, {config.channels}, T, H, W)")
        if any(side % patch for side, patch in zip(x.shape[2:], config.patch, strict=True)):
            raise ValueError(
                f"x has shape {tuple(x.shape)}; this model needs T, H and W in multiples of {config.patch}"
            )
        if t.shape not in (x.shape[:1], (x.shape[0], x.shape[2])):
            raise ValueError(f"t has shape {tuple(t.shape)}; it needs ({x.shape[0]},) or ({x.shape[0]}, {x.shape[2]})")


def _text_only(condition: Condition) -> Condition:
    """The texts of a condition without classes and sounds. ValueError if it asks for any of those."""
    if condition.asks_for_class or condition.asks_for_audio:
        raise ValueError("class: this model takes neither classes nor sound; leave them out")
    return Condition(None, condition.text, condition.mask, condition.chances)


def padded(text: Tensor, seen: Tensor, length: int) -> Tensor:
    """States `(B, N, D)` that are zero where they do not count, cut or padded by zeros to `(B, length, D)`.

    ValueError where more than `length` count.
    """
    if text.shape[1] > length and bool(seen[:, length:].any()):
        raise ValueError(f"text has {int(seen.sum(1).max())} tokens; this model takes {length}: shorten it")
    return F.pad(text, (0, 0, 0, length - text.shape[1]))


def token_count(shape: tuple[int, int, int], patch: tuple[int, int, int]) -> int:
    """Tokens of a window of latents (T, H, W)."""
    return math.prod(side // size for side, size in zip(shape, patch, strict=True))


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


def frame_times(t: Tensor, inputs: Inputs, tokens_in_frame: int) -> Tensor:
    """Times on the scale of the classes: `(B,)`, or by token `(B, M + N)` where latents differ or tokens are in front."""
    t = t * STEPS
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
