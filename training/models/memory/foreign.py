"""A transformer of diffusers with a memory, as the paper has it (arXiv 2512.23851): its tokens come in front of the class's own.

The class's own forward runs, with positions of any times, and a time of its own for each latent: recent latents and the
memory are clean. Where blocks attend to a text beside their tokens, as Wan's, a memory's tokens attend to the text "" and
not to the window's: each token of such a class attends to some text. Where text and video are one sequence, as
HunyuanVideo's, they attend to the window's. Cross-attention to φ's states is added to the output of each block.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from pydantic import model_validator
from torch import Tensor, nn

from longtake.training.foreign.backbone import Backbone, BackboneConfig, Front
from longtake.training.foreign.front import CLASSES, attend
from longtake.training.models.common.condition import Condition
from longtake.training.models.common.rotary import CrossAttention, grid_positions, rotation
from longtake.training.models.memory.model import FirstLatentShift, MemoryModel
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.models.memory.stretch import Stretch
from longtake.training.models.memory.tokens import Memory


class MemoryBackboneConfig(MemoryModelConfig):
    """The config of one model: its memory (`MemoryModelConfig`) and its transformer, whose blocks recompute with the memory.

    backbone    the transformer's own
    """

    backbone: BackboneConfig

    @property
    def classes(self) -> int:
        """It takes none."""
        return 0

    @property
    def label_dropout(self) -> float:
        return 0.0

    @property
    def channels(self) -> int:
        return self.backbone.channels

    @property
    def patch(self) -> int:
        return self.backbone.patch[1]

    @property
    def width(self) -> int:
        return self.backbone.width

    @property
    def heads(self) -> int:
        """Of the cross-attention to φ's states: those of the blocks."""
        return int(self.backbone.settings["num_attention_heads"])

    @property
    def text_width(self) -> int:
        return self.backbone.text_width

    @property
    def text_dropout(self) -> float:
        return self.backbone.text_dropout

    @property
    def text_length(self) -> int:
        return self.backbone.longest_text

    @model_validator(mode="after")
    def _takes_a_memory(self) -> MemoryBackboneConfig:
        if reason := why_not(self.backbone):
            raise ValueError(f"backbone: {reason}")
        return self


def why_not(transformer: BackboneConfig) -> str | None:
    """Why a transformer takes no memory; None where it does."""
    if transformer.class_name not in CLASSES:
        return f"{transformer.class_name} takes no memory; {' and '.join(sorted(CLASSES))} do"
    time, rows, columns = transformer.patch
    if time != 1 or rows != columns:
        return f"its tokens stand for {time}x{rows}x{columns} latents; a memory needs those of one latent, and square"
    if transformer.sizes.image_channels:
        return "it goes on from a start image, which segments do not have; name one from text alone"
    if transformer.expert is not None:
        return f"it is the {transformer.expert}-noise expert of two; a memory needs one transformer for all times"
    return None


class MemoryBackbone(MemoryModel):
    """The transformer and its memory. Latents are those of a foreign codec, so that normalising them changes nothing.

    Names of weights begin with `backbone.`, `memory.`, `cross.` and `first.`. Only the memory and what is beside it differ
    from the class's own: without a memory, and before `first` has learned, the velocity is that of the class.
    """

    config: MemoryBackboneConfig

    def __init__(self, config: MemoryBackboneConfig, backbone: Backbone | None = None) -> None:
        """`backbone` is taken as it is, its weights too; None makes one with random weights."""
        super().__init__(config.channels)
        self.config = config
        own = config.backbone.model_copy(update={"activation_checkpointing": config.activation_checkpointing})
        self.backbone = Backbone(own) if backbone is None else backbone
        self.backbone.config = own
        self.first = FirstLatentShift(config.channels)
        blocks, shape = list(self.backbone.blocks()), (config.width, config.memory_widths[-1], config.heads)
        self.cross = nn.ModuleList(CrossAttention(*shape) for _ in blocks if config.cross_attention)
        attend(blocks, self.cross if config.cross_attention else [None] * len(blocks))
        self.memory = nn.ModuleList(config.variant.build(config))
        self.start_memory()

    @property
    def dtype(self) -> torch.dtype:
        return self.backbone.dtype

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Patterns of names of the layers that a low-rank change changes by default: the transformer's."""
        return tuple(rf"backbone\.{target}" for target in self.backbone.lora_targets)

    @property
    def shift(self) -> float:
        """As the transformer's own pipeline moves them for a segment."""
        assert self.config.shape
        return self.backbone.shift_of(self.config.shape)

    def blocks(self) -> Iterator[nn.Module]:
        yield from self.backbone.blocks()

    def set_empty(self, states: Tensor, pooled: Tensor | None = None) -> None:
        """Set the states of "", and its vector (see `Backbone.set_empty`)."""
        self.backbone.set_empty(states, pooled)
        self.config = self.config.model_copy(update={"backbone": self.backbone.config})

    def _project(self, patches: Tensor) -> Tensor:
        cell = (self.config.channels, 1, self.config.patch, self.config.patch)
        return self.backbone.tokens(patches.reshape(-1, *cell)).view(*patches.shape[:-1], self.config.width)

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        times: Tensor,
        memory: Memory | Stretch | None = None,
        condition: Condition | None = None,
        rng: torch.Generator | None = None,
        first: Tensor | None = None,
        seen: Tensor | None = None,
        level: Tensor | None = None,
    ) -> Tensor:
        """See `MemoryModel.forward`: the transformer's `text_dropout` is the dropout of training."""
        if isinstance(memory, Stretch):
            memory = self.remember(memory.high, memory.low, memory.start, first=memory.first, skip=memory.skip)
        self.check_shapes(x, t, times, memory)
        x = self.first(x, None if first is None else first.to(x.device).expand(len(x), -1))
        front = self._front(memory, x, times, level) if memory is not None and memory.tokens.shape[1] else None
        # a class may see places beside a text, which has none: a window begins at 0, as it has learned
        first_place = (times if seen is None else times.where(seen, times.max())).amin(-1, keepdim=True)
        if front is not None:
            moved = F.pad(first_place.to(front.positions).view(-1, 1, 1), (0, 2))
            front = front._replace(positions=front.positions - moved)
        return self.backbone(x, t, condition, rng, front=front, places=times - first_place, present=seen)

    def _front(self, memory: Memory, x: Tensor, times: Tensor, level: Tensor | None) -> Front:
        """The memory's tokens, and what the attention of each block to its states takes."""
        states = None
        if self.config.cross_attention:
            rows, columns = (side // self.config.patch for side in x.shape[3:])
            head = self.config.width // self.config.heads
            here = rotation(grid_positions(times, rows, columns, x.device), head)
            there = rotation(memory.positions[None], head)
            states = (memory.hidden.to(self.dtype), here, there, memory.seen)
        return Front(memory.tokens, memory.positions, level, memory.seen, states)
