"""From a batch of the loader to what a model is given: a stretch of latents, a segment with its history, whole groups.

Groups are counted from a video's first latent, as generation does: its memory holds whole groups, and the latents that
fill no group yet are among the recent ones, clean beside the segment.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longtake.datasets.latents import shrunk
from longtake.datasets.loader import to_model
from longtake.datasets.loader.streams import Lengths
from longtake.training.models.common.codec import Codec, Posterior
from longtake.training.models.memory.model import MemoryModel
from longtake.training.models.memory.model_config import MemoryModelConfig
from longtake.training.models.memory.stretch import Stretch, skip_or_none
from longtake.training.models.memory.tokens import Memory

ON_HOST = ("history_steps", "stream_step")  # of a batch: they decide how long a history is
_CHUNK = 32  # frames on the device at once


def memory_of(model: MemoryModel, stretch: Stretch) -> Memory:
    """The memory that a model makes of a stretch in whole groups."""
    return model.remember(stretch.high, stretch.low, stretch.start, first=stretch.first, skip=stretch.skip)


def history_lengths(dit: MemoryModelConfig, no_history: float = 0.0, least: int = 0) -> Lengths:
    """The lengths of history, in latents, that occur in generation: whole segments, after nothing or a start in whole groups.

    Args:
        no_history: the probability that there is no history.
        least: latents of history that a stream must have room for.
    """
    assert dit.shape
    segment, group = dit.shape[0], dit.group
    starts = [0, *range(-(-max(dit.window, 1) // group) * group, dit.history + 1, group)]
    unit = math.gcd(segment, group)
    # no less than the memory reaches back, on the grid of all others
    most = max(unit, -(-dit.history // unit) * unit)
    lengths = {min(start + n * segment, most) for start in starts for n in range(most // segment + 2)}
    return Lengths(tuple(sorted(lengths - {0})), max(dit.history, 1), no_history, unit, least)


def true_lengths(batch: Mapping[str, Any], most: int) -> Tensor:
    """The number of latents of history that each sample truly has, `(B,)` on the host, capped at `most`."""
    return batch["history_steps"].cpu().clamp(max=most)


def stretch_of(
    batch: Mapping[str, Any],
    model: MemoryModel,
    most: int,
    posterior: Literal["sample", "mean"] = "mean",
    rng: torch.Generator | None = None,
) -> Stretch:
    """The last `most` latents of history, as many of them as each sample has, and those of the segment, in order.

    A batch with room for S latents of history has its segment at time S, whatever `most` is.

    Args:
        batch: of a `Loader` with `histories`, of the columns `latent` and `low`. The low-res branch reads `latent` where
            there is no `low` and nothing is to be scaled down. In its keys `stream_step` and `history_steps` a step is
            a latent; so it is in config.json.
        posterior: "sample" draws each full latent from the autoencoder's distribution; "mean" takes the likeliest. The
            low-res branch always takes the likeliest: in generation, too, it reads encoded video.
    """

    def moments(name: str) -> Posterior:
        before = batch[f"history_{name}"]
        return Posterior(*torch.cat([before[:, :, :, room - most :], batch[name]], dim=3).float().unbind(1))

    room = batch["history_latent"].shape[3]
    most = min(most, room)
    low_column = "low" if "low" in batch else "latent" if model.config.shrink == (1, 1) else None
    low = model.normalise_low(moments(low_column).mode()) if low_column else None
    full = moments("latent")
    high = model.normalise(full.sample(rng) if posterior == "sample" else full.mode())
    first = batch["stream_step"].cpu()[:, None] - most + torch.arange(high.shape[2]) == 0
    first = first.to(high.device, non_blocking=True)
    return Stretch(high, low, room - most, first, skip_or_none(most - true_lengths(batch, most)))


class Segment(NamedTuple):
    """A segment to generate and what the model is given of the latents before it.

    history  what the memory is made of, in whole groups; None without a memory
    x0       (B, C, W + T, H, W) normalised: the recent latents, clean, and the segment
    recent   W, the number of recent latents
    times    (B, W + T), times of `x0` on the scale of the history's
    first    (B, W + T) bool, which of `x0` are a video's first latent
    seen     (B, W + T) bool, which of `x0` a sample has; None: all
    """

    history: Stretch | None
    x0: Tensor
    recent: int
    times: Tensor
    first: Tensor
    seen: Tensor | None


def segment_of(
    batch: Mapping[str, Any],
    model: MemoryModel,
    most: int,
    posterior: Literal["sample", "mean"] = "mean",
    rng: torch.Generator | None = None,
) -> Segment:
    """A batch's segments, given at most `most` latents of history."""
    stretch = stretch_of(batch, model, most, posterior, rng)
    return split_segment(stretch, batch["latent"].shape[3], batch["stream_step"], model.config)


def segment_after(batch: Mapping[str, Any], model: MemoryModel, count: int) -> Segment:
    """A batch's segments, given the last `count` latents of history as if the stream began with them.

    Groups are counted from the first of these, as after a start clip, but none of them is a video's first latent.
    """
    stretch = stretch_of(batch, model, count)
    return split_segment(stretch, batch["latent"].shape[3], batch["stream_step"].clamp(max=count), model.config)


def groups_of(
    batch: Mapping[str, Any],
    model: MemoryModel,
    posterior: Literal["sample", "mean"] = "mean",
    rng: torch.Generator | None = None,
) -> Stretch:
    """The history and the segment of each sample, in whole groups."""
    room, segment = batch["history_latent"].shape[3], batch["latent"].shape[3]
    stretch = stretch_of(batch, model, room, posterior, rng)
    return cut_to_groups(stretch, batch["stream_step"] + segment, model.config)


def split_segment(stretch: Stretch, length: int, position: Tensor, config: MemoryModelConfig) -> Segment:
    """Split a stretch into history and the segment, its last `length` latents.

    Args:
        position: `(B,)`, latents of the video before the segment. The last of these, which fill no group, are not in the
            memory, but among the recent ones.
    """
    # counts stay on the host: they decide what is computed
    most, position, on = stretch.high.shape[2] - length, position.cpu(), stretch.high.device
    lengths, lag, remembered = _in_groups(stretch, most, position, config.group)
    if config.variant.empty:
        remembered = torch.zeros_like(remembered)

    # Beside a memory: the latents that it does not have yet, and at least the window. Else all that could fill no group.
    limits = torch.where(remembered > 0, lag.clamp(min=config.window), max(config.window, config.group - 1))
    recents = torch.minimum(lengths, limits)
    recent = int(recents.max())
    history = None
    if not config.variant.empty:
        history = stretch.ending(most, lag, _memory_length(config, most, remembered), remembered)

    begin, index = most - recent, torch.arange(recent + length)
    seen = index >= (recent - recents)[:, None]
    return Segment(
        history,
        stretch.high[:, :, begin:],
        recent,
        (stretch.start + begin + index + lag[:, None]).to(on, non_blocking=True),
        stretch.first[:, begin:],
        None if bool(seen.all()) else seen.to(on, non_blocking=True),
    )


def cut_to_groups(stretch: Stretch, position: Tensor, config: MemoryModelConfig) -> Stretch:
    """Each sample's latents in whole groups, of a stretch that ends `position` `(B,)` latents after its video's beginning."""
    total = stretch.high.shape[2]
    _, lag, remembered = _in_groups(stretch, total, position.cpu(), config.group)
    return stretch.ending(total, lag, _memory_length(config, total, remembered), remembered)


def _in_groups(stretch: Stretch, end: int, position: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Counts of latents before index `end`, `position` latents into the video, `(B,)` each.

    They are those that a sample has, the last of these that fill no group, and those in the whole groups before them.
    """
    lengths = end - (torch.zeros_like(position) if stretch.skip is None else stretch.skip)
    lag = torch.minimum(position % group, lengths)
    return lengths, lag, (lengths - lag) // group * group


def _memory_length(config: MemoryModelConfig, most: int, remembered: Tensor) -> int:
    """The number of latents that a batch's memory is made of, where samples have `remembered` `(B,)` of `most`."""
    # a packed one has other layers for older latents, which all ranks must call: ZeRO-3 gathers their weights together
    return max(config.group, int(remembered.max()) if config.variant.joins else most)


def full_tokens(patch: int, batch: Mapping[str, Any]) -> int:
    """The number of tokens that a batch's segments and their history would be without a memory."""
    latents = len(batch["key"]) * batch["latent"].shape[3] + int(batch["history_steps"].sum())
    height, width = (side // patch for side in batch["latent"].shape[4:])
    return latents * height * width


@torch.no_grad()
def encode_video(model: MemoryModel, vae: Codec, video: Tensor) -> Stretch:
    """The latents of a video `(1, 3, T, H, W)`, uint8, encoded in one stream: what `memory_of` takes, on the model's device."""
    shrink = model.config.shrink
    low = model.normalise_low(posterior_of(vae, video, shrink).mode()) if shrink else None
    high = model.normalise(posterior_of(vae, video).mode())
    return Stretch(high, low, 0, torch.arange(high.shape[2], device=high.device)[None] == 0)


@torch.no_grad()
def posterior_of(codec: Any, video: Tensor, shrink: tuple[int, int] = (1, 1)) -> Posterior:
    """The autoencoder's posterior of a video `(1, 3, T, H, W)`, uint8, scaled down by `shrink`, encoded in one stream."""
    device, stride = next(codec.parameters()).device, codec.config.spatial_stride
    chunks = (shrunk(to_model(chunk.to(device)), shrink, stride) for chunk in video.split(_CHUNK, 2))
    return Posterior(*(torch.cat(parts, dim=2) for parts in zip(*codec.encode_stream(chunks), strict=True)))
