"""A video transformer of another library as a velocity of our flow: `Backbone`.

A backbone owns the scale of its times, the padding of its texts, its masks, the packing of its tokens and the scale of its
positions. All classes here predict noise - data at (1 - t) data + t noise, which is the velocity of `common/flow.py` with
its sign. What differs between them is in `backbone_wan`, `backbone_ltx` and `backbone_hunyuan`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn

from longtake.training.foreign.backbone_config import ROWS, BackboneConfig
from longtake.training.foreign.backbone_inputs import Inputs
from longtake.training.foreign.front import CLASSES, Front
from longtake.training.foreign.library import class_of
from longtake.training.models.common.condition import Condition, draw_hidden
from longtake.training.models.common.recompute import called_as_marked, mark

__all__ = ("ROWS", "Backbone", "BackboneConfig", "Front")


class Backbone(nn.Module):
    """Velocity of the rectified flow at latents x_t `(B, C, T, H, W)` as their codec gives them, for any T, H and W.

    Inputs are cast to the dtype of the weights; outputs have it. Names of weights are `net.` and the class's own.
    `empty`, `(text_empty, text_width)`, are the states of "", which stand for no text; a class that takes a vector of each
    text has that of "" in `empty_pooled`.
    """

    empty: Tensor
    empty_pooled: Tensor | None
    holds_fp32 = True

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        self.config = config
        self.net = config.row.build(class_of(config.class_name), config.settings)
        self._recomputed: bool | float = False
        self.register_buffer("empty", torch.zeros(config.text_empty, config.text_width))
        pooled = torch.zeros(config.sizes.pooled_width) if config.sizes.pooled_width else None
        self.register_buffer("empty_pooled", pooled)

    def keep_fp32(self) -> dict[str, Tensor]:
        """The weights and buffers that stay fp32 in any dtype of the others, as the class asks for, by name.

        None with `holds_fp32` false, for an engine that cannot keep them.
        """
        kept = set(getattr(self.net, "_keep_in_fp32_modules", None) or ()) if self.holds_fp32 else set()
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

    def set_empty(self, states: Tensor, pooled: Tensor | None = None) -> None:
        """Set the states of "", `(n, text_width)`, and its vector `(pooled_width,)`; n becomes `text_empty`.

        ValueError for other shapes, or a vector that is missing or of no use.
        """
        width, vector = self.config.text_width, self.config.sizes.pooled_width
        if states.ndim != 2 or not len(states) or states.shape[1] != width:
            raise ValueError(f"empty has shape {tuple(states.shape)}; this model needs (n, {width})")
        if (0 if pooled is None else pooled.numel()) != vector:
            raise ValueError(f"pooled: a text of this model has a vector of {vector} beside its states")
        self.empty = states.to(self.empty.device, self.empty.dtype, copy=True)
        if pooled is not None and self.empty_pooled is not None:
            self.empty_pooled.copy_(pooled.flatten())
        self.config = self.config.model_copy(update={"text_empty": len(states)})

    def normalise(self, latent: Tensor) -> Tensor:
        """The latent itself, fp32: a foreign codec's are in the space of its transformer."""
        return latent.float()

    def denormalise(self, latent: Tensor) -> Tensor:
        """The latent itself, fp32."""
        return latent.float()

    def shift_of(self, shape: tuple[int, int, int]) -> float:
        """How far its pipeline moves the times towards noise (see `flow.shifted`) for a window of latents (T, H, W)."""
        return self.config.shift_of(shape)

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
        pooled        one vector for each text, `(B, D)`, for a class that takes one beside its states; None: the condition's
        guidance      for a class with guidance among its inputs; None: `embedded_guidance`
        front         of a class that takes a memory: tokens in front of the window's own, which all attend to, and that are
                      no part of the result
        places        of such a class: positions of the latents in time, `(T,)` or `(B, T)`; None: 0, 1, 2 ...
        present       of such a class: `(B, T)` bool, False for latents that a sample does not have; None: it has all

        Raises:
            ValueError: another shape; text that the model does not take; something that it needs is not given.
        """
        config, net = self.config, cast("Any", self.net)
        self._check_shapes(x, t)
        if condition is not None and (condition.classes is not None or condition.audio is not None):
            condition = _text_only(condition)
        lost = draw_hidden(condition, x, 0.0, config.text_dropout, rng).text if self.training else None
        text, seen, without = self._texts(condition, x, lost)
        self._check_memory(front, places, present, seen)
        if pooled is None and condition is not None:
            pooled = condition.pooled
        pooled = self._pooled(pooled, x, without)
        if image_states is not None and not config.sizes.image_width:
            raise ValueError("image_states: this model attends to none; leave them out")
        x = x.to(self.dtype)
        image, image_states = (None if part is None else part.to(x) for part in (image, image_states))
        front = front and front._replace(tokens=front.tokens.to(x))
        none = self.empty.to(x)
        inputs = Inputs(
            x, t.float(), text, seen, none, image, image_states, fps, pooled, guidance, front, places, present
        )
        self._recompute(config.activation_checkpointing if self.training else False)
        return config.row.velocity(net, config, inputs)

    def _recompute(self, share: bool | float) -> None:
        """Compute the activations of a share of the blocks again; all modules are walked through only where it changes."""
        if share == self._recomputed:
            return
        self._recomputed, net = share, cast("Any", self.net)
        if share:
            mark(share, net.modules())
            net.enable_gradient_checkpointing(called_as_marked)
        else:
            net.disable_gradient_checkpointing()

    def _texts(self, condition: Condition | None, x: Tensor, lost: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """States `(B, N, D)`, the ones that count first and then zeros; which count; and which samples have no text `(B,)`.

        Those get the states of "". Where latents see different texts the states stay in their order, and `(B, T, N)` says
        which count; latents without a text get those of "" too.
        """
        text, mask = self._given(condition, x)
        if lost is not None:
            mask = mask & ~lost.view(-1, *[1] * (mask.ndim - 1))
        without = ~mask.any(-1)
        if not len(self.empty) and bool(without.any()):
            raise ValueError(
                'text: this model does not know the states of "", which stand for no text, yet; give a text'
            )
        text = torch.cat([text, self.empty.to(text).expand(len(x), -1, -1)], dim=1)
        seen = torch.cat([mask, without[..., None].expand(*without.shape, len(self.empty))], dim=-1)
        if seen.ndim == 3:
            return torch.where(seen.any(1)[..., None], text, 0.0), seen, without.all(1)
        order = (~seen).int().argsort(dim=1, stable=True)
        seen = seen.gather(1, order)
        text = text.gather(1, order[..., None].expand_as(text))
        # a sample has its own text or that of "", never both: no more states than the longer one can count
        room = max(mask.shape[1], len(self.empty))
        text, seen = text[:, :room], seen[:, :room]
        return torch.where(seen[..., None], text, 0.0), seen, without

    def _pooled(self, pooled: Tensor | None, x: Tensor, without: Tensor) -> Tensor | None:
        """The vectors of the texts `(B, D)`, that of "" where there is none."""
        width = self.config.sizes.pooled_width
        if not width and pooled is not None:
            raise ValueError("pooled: this model takes no vector of a text; leave it out")
        if self.empty_pooled is None:
            return None
        if pooled is None and not bool(without.all()):
            raise ValueError("pooled: this model needs a vector of each text beside its states; give pooled")
        empty = self.empty_pooled.to(x.device, self.dtype).expand(len(x), -1)
        if pooled is None:
            return empty
        if pooled.shape != (len(x), width):
            raise ValueError(f"pooled has shape {tuple(pooled.shape)}; this model needs ({len(x)}, {width})")
        return torch.where(without[:, None], empty, pooled.to(empty))

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

    def _check_memory(self, front: Front | None, places: Tensor | None, present: Tensor | None, seen: Tensor) -> None:
        """Refuse what only classes that take a memory take."""
        takes, one_text = self.config.class_name in CLASSES, self.config.sizes.pooled_width > 0
        if seen.ndim == 3 and (one_text or not takes):
            raise ValueError("text: this model sees one text in a window, not another one in each latent")
        if takes:
            return
        for name, part in (("front", front), ("places", places), ("present", present)):
            if part is not None:
                raise ValueError(f"{name}: {self.config.class_name} takes no memory; leave it out")

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
    return Condition(None, condition.text, condition.mask, condition.chances, pooled=condition.pooled)
