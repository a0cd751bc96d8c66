"""What all transformers with a memory have: the memory of a history, made whole or chunk by chunk, and statistics."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from longtake.training.models.common.condition import Condition
from longtake.training.models.common.statistics import Normalising, copy_statistics, normalised
from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.baselines import CellEmbedding
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.models.memory.stretch import Stretch
from longtake.training.models.memory.tokens import Memory, cropped, joined, run_encoders


class FirstLatentShift(nn.Module):
    """Adds a learned shift to those latents that are a video's first; zero at the start of training.

    Models registered before this module existed have no such weight, which is the same as zero.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = nn.Parameter(torch.zeros(channels))
        self.register_load_state_dict_pre_hook(_add_missing_shift)

    def forward(self, x: Tensor, first: Tensor | None) -> Tensor:
        """Shift x `(B, C, T, H, W)` where `first` `(B, T)` is true; None: nowhere."""
        if first is None:
            return x
        return x + first[:, None, :, None, None].to(x) * self.shift.to(x.dtype).view(-1, 1, 1, 1)


def _add_missing_shift(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
    state.setdefault(f"{prefix}shift", torch.zeros_like(module.shift))  # type: ignore[arg-type]


class MemoryModel(Normalising, ABC):
    """Velocity of the rectified flow at latents of a video, normalised, given a memory of it: what all such models share.

    The statistics per channel are saved with the weights: `latent_mean` and `latent_std`, and `low_mean` and `low_std` of the
    scaled-down video's latents. Names of the memory's weights begin with `memory.`. A model makes `first` and `memory`
    itself, in the order that its random weights have always had.
    """

    config: MemoryModelConfig
    first: FirstLatentShift
    memory: nn.ModuleList
    low_mean: Tensor
    low_std: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__(channels)
        self.register_buffer("low_mean", torch.zeros(channels))
        self.register_buffer("low_std", torch.ones(channels))

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the weights."""

    @property
    def lora_targets(self) -> tuple[str, ...]:
        """Patterns of names of the layers that a low-rank change changes by default."""
        return (r".*",)

    @property
    def shift(self) -> float:
        """How far its times are moved towards noise by default (see `flow.shifted`); 1 is not at all."""
        return 1.0

    @abstractmethod
    def blocks(self) -> Iterator[nn.Module]:
        """The blocks in order, for example for `block.compile()`."""

    @abstractmethod
    def _project(self, patches: Tensor) -> Tensor:
        """The tokens of patches: `(..., C p p)`, channels first, then rows, then columns -> `(..., D)`."""

    @abstractmethod
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
        """The velocity of x, `(B, C, T, H, W)`.

        x           any latents in any order, such as recent ones, a segment to generate, or latents to retrieve
        t           0 (data) to 1 (noise): `(B,)`, or `(B, T)` with 0 for latents that are given clean
        times       positions of the latents in their video, `(T,)` or `(B, T)`, on the scale of the memory's; only
                    differences count
        memory      or the latents to make it of: in training one call must reach all weights, as the hooks of ZeRO need it
        condition   of the batch; None is no condition. In training mode some samples lose what their config's dropouts say,
                    drawn from `rng` (on the device of `x`)
        first       `(B or 1, T)` bool, which latents are a video's first; None: none
        seen        `(B, T)` bool, False for latents that a sample does not have; None: it has all
        level       `(B,)`, the noise of the latents that the memory was made of, as `t`; None: they were clean

        Raises:
            ValueError: another shape, a class id that the model does not know, or text for a model without.
        """

    def start_memory(self) -> None:
        """Let a patchifier or FramePack begin as the patch embedding that this transformer has now."""
        cells = [module for module in self.memory.modules() if isinstance(module, CellEmbedding)]
        if not cells:
            return
        size, place = self.config.channels * self.config.patch**2, self.latent_mean.device
        with torch.no_grad():
            bias = self._project(torch.zeros(size, dtype=self.dtype, device=place))
            weight = (self._project(torch.eye(size, dtype=self.dtype, device=place)) - bias).T
        for cell in cells:
            cell.start_from(weight, bias)

    def set_statistics(
        self, mean: Tensor, std: Tensor, low_mean: Tensor | None = None, low_std: Tensor | None = None
    ) -> None:
        """Set the statistics to normalise by, `(C,)` each; those of `low` stay as they are if they are None.

        ValueError for another shape or a std that is not positive.
        """
        super().set_statistics(mean, std)
        if (low_mean is None) != (low_std is None):
            raise ValueError("low_mean and low_std: give both or none")
        if low_mean is not None and low_std is not None:
            copy_statistics(self.low_mean, self.low_std, low_mean, low_std)

    def normalise_low(self, latent: Tensor) -> Tensor:
        """Normalise latents of the scaled-down video."""
        return normalised(latent, self.low_mean, self.low_std)

    def remember(
        self,
        high: Tensor,
        low: Tensor | None = None,
        start: int = 0,
        pasts: list[Past] | None = None,
        first: Tensor | None = None,
        skip: Tensor | None = None,
    ) -> Memory:
        """The memory of a history, its encoders' tokens one after the other; or of its chunk that begins at latent `start`.

        high    `(B, C, T, H, W)`, normalised; T a multiple of `config.group`
        low     `(B, C, T, h, w)`, of the video scaled down by `config.shrink`, normalised; None where that is None
        pasts   the state of each of `self.memory` after all chunks before; they advance to the end of this one
        first   `(B, T)` bool, which latents are a video's first; None: none
        skip    `(B,)` leading latents of each sample, in whole groups, that are no part of its history; None: none

        Memories of chunks, `joined`, are that of the whole; but a framepack memory of a chunk also has what came before it
        (see `append`).

        Raises:
            ValueError: a wrong shape, or missing latents.
        """
        for name, latents in (("high", high), ("low", low)):
            if latents is not None and (latents.ndim != 5 or latents.shape[1] != self.config.channels):
                raise ValueError(
                    f"{name} has shape {tuple(latents.shape)}; it needs (B, {self.config.channels}, T, H, W)"
                )
        if not self.memory:
            empty = torch.empty(high.shape[0], 0, self.config.width, dtype=self.dtype, device=high.device)
            return Memory(empty, torch.empty(0, 3, device=high.device), empty[..., :0])
        high = self.first(high, first)
        low = None if low is None else self.first(low, first)
        skip = None if skip is None else skip.to(high.device, non_blocking=True)
        return run_encoders(list(self.memory), self._project, high, low, start, pasts, skip)

    def append(
        self,
        memory: Memory | None,
        high: Tensor,
        low: Tensor | None,
        start: int,
        pasts: list[Past],
        first: Tensor | None = None,
    ) -> Memory:
        """`memory` with a chunk as `remember` takes it, cropped to whole groups of the last `config.history` latents."""
        new = self.remember(high, low, start, pasts, first)
        if memory is not None and self.config.variant.joins:
            new = joined([memory, new])
        history, group = self.config.history, self.config.group
        return cropped(new, start + high.shape[2] - history // group * group)

    def check_shapes(self, x: Tensor, t: Tensor, times: Tensor, memory: Memory | None) -> None:
        """Refuse arguments of `forward` with another shape: ValueError."""
        patch, width = self.config.patch, self.config.width
        if x.ndim != 5 or x.shape[1] != self.config.channels:
            raise ValueError(f"x has shape {tuple(x.shape)}; this model needs (B, {self.config.channels}, T, H, W)")
        if x.shape[3] % patch or x.shape[4] % patch:
            raise ValueError(f"x is {x.shape[3]}x{x.shape[4]}; its height and width must be multiples of {patch}")
        batch, latents = x.shape[0], x.shape[2]
        if t.shape not in ((batch,), (batch, latents)):
            raise ValueError(f"t has shape {tuple(t.shape)}; it needs ({batch},) or ({batch}, {latents})")
        if times.shape not in ((latents,), (batch, latents)):
            raise ValueError(f"times has shape {tuple(times.shape)}; it needs ({latents},) or ({batch}, {latents})")
        if memory is not None and (memory.tokens.shape[0], memory.tokens.shape[2]) != (batch, width):
            raise ValueError(f"memory has tokens {tuple(memory.tokens.shape)}; it needs ({batch}, N, {width})")


def joint_mask(memory: Memory, mask: Tensor | None, tokens: Tensor) -> Tensor | None:
    """Which of the memory's tokens and then of `(B, T, N, D)` others are seen, `(B, M + T N)`; None: all."""
    if memory.seen is None and mask is None:
        return None
    parts = ((memory.seen, memory.tokens.shape[1]), (mask, tokens.shape[1] * tokens.shape[2]))
    masks = [
        torch.ones(len(tokens), count, dtype=torch.bool, device=tokens.device) if seen is None else seen
        for seen, count in parts
    ]
    return torch.cat(masks, dim=1)
