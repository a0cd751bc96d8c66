"""History for a DiT with a memory: what it is given of a batch, how steps are masked for retrieval, how they are got back.

A *step* is a latent frame. What a registered `memory_dit` says of itself in config.json, beside `config`
(`MemoryDiTConfig`) and `lineage`:

    stage        "retrieval" (of `pretrain_memory`) or "generation" (of `finetune_memory_prior`)
    rates        ["4x4x2"] and so on; [] of a memory that has none
    vae          {"uri", "sha256", "encoder"}: what decodes, and encodes what is appended; `encoder` is its `encoder_digest`
    latents      {"uri", "digest"}: the column that it has learned from
    low_latents  {"uri", "digest", "shrink": [4, 4]}: that of its low-res branch; null without one
    classes      ["cat", "dog"]: names in the order of their ids
    window       {"frames": 21, "steps": 6, "factor": 4, "fps": 24.0, "size": [480, 832]}: of a segment; a video's first
                 one has `frames`, each later one `steps * factor`. `size` is height and width in pixels
    history      {"seconds": 20.0, "steps": 120}: what the memory has learned to hold, as in `config.history`
    sampling     {"steps": 50, "guidance": 1.0, "shift": 1.0}
    posterior    "sample" or "mean", what of each latent a model of generation has learned

`registry.load_with_facts(uri)` gives the model and these.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longtake.datasets.latents import shrunk
from longtake.datasets.loader import to_model
from longtake.datasets.loader.streams import Lengths
from longtake.training.models.common import flow
from longtake.training.models.common.codec import Codec, Posterior
from longtake.training.models.common.condition import Condition
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import MemoryDiTConfig
from longtake.training.models.memory.latents import Steps, some
from longtake.training.models.memory.tokens import Memory

_CHUNK = 32  # frames on the device at once


def remembered(model: MemoryDiT, steps: Steps) -> Memory:
    """The memory that a model makes of latents in whole groups."""
    return model.remember(steps.high, steps.low, steps.start, first=steps.first, skip=steps.skip)


def lengths_of(dit: MemoryDiTConfig, none: float = 0.0, least: int = 0) -> Lengths:
    """The histories that generation comes to: whole segments from nothing, whole groups of a start and segments after it.

    Args:
        none: the probability that there is no history.
        least: steps of history that a stream must have room for.
    """
    assert dit.shape
    segment, group = dit.shape[0], dit.group
    starts = [0, *range(-(-max(dit.window, 1) // group) * group, dit.history + 1, group)]
    unit = math.gcd(segment, group)
    # no less than the memory reaches back, on the grid of all others
    most = max(unit, -(-dit.history // unit) * unit)
    reached = {min(start + n * segment, most) for start in starts for n in range(most // segment + 2)}
    return Lengths(tuple(sorted(reached - {0})), max(dit.history, 1), none, unit, least)


def true_steps(batch: Mapping[str, Any], most: int) -> Tensor:
    """How many steps of history each sample truly has, at most so many: `(B,)`."""
    return batch["history_steps"].clamp(max=most)


def steps_of(
    batch: Mapping[str, Any],
    model: MemoryDiT,
    most: int,
    posterior: Literal["sample", "mean"] = "mean",
    rng: torch.Generator | None = None,
) -> Steps:
    """The last `most` steps before the window, as many of them as each sample has, and the window's own, in order.

    A batch whose history has room for S steps has its window at time S, however many are taken.

    Args:
        batch: of a `Loader` with `histories`, of the columns `latent` and `low`, the low-res branch's, which else reads
            `latent` where nothing is to be scaled down.
        posterior: "sample" draws each full latent from what the autoencoder says of it; "mean" takes the likeliest, as
            the low-res branch always does: it reads encoded video in generation too.
    """

    def moments(name: str) -> Posterior:
        before = batch[f"history_{name}"]
        return Posterior(*torch.cat([before[:, :, :, room - most :], batch[name]], dim=3).float().unbind(1))

    room = batch["history_latent"].shape[3]
    most = min(most, room)
    small = "low" if "low" in batch else "latent" if model.config.shrink == (1, 1) else None
    low = model.normalise_low(moments(small).mode()) if small else None
    full = moments("latent")
    high = model.normalise(full.sample(rng) if posterior == "sample" else full.mode())
    places = batch["stream_step"][:, None] - most + torch.arange(high.shape[2], device=high.device)
    return Steps(high, low, room - most, places == 0, some(most - true_steps(batch, most)))


def draw_omega(batch: int, steps: int, most: int, rng: torch.Generator, skip: Tensor | None = None) -> Tensor:
    """Ω, the steps to retrieve: `(batch, k)` distinct ones of 0..steps-1 in order, other ones for each sample.

    k is uniform in 1..most (at most as many as every sample has) and the same for the samples of a call [assumption:
    1 to 4]. The first `skip` `(batch,)` steps are not drawn.
    """
    device = rng.device
    fewest = steps if skip is None else steps - int(skip.max())
    count = 1 + int(torch.randint(min(most, fewest), (), generator=rng, device=device))
    ranks = torch.rand(batch, steps, generator=rng, device=device)
    if skip is not None:
        ranks = torch.where(torch.arange(steps, device=device) < skip[:, None], 1.0, ranks)
    return ranks.argsort(1)[:, :count].sort(1).values


def mask(steps: Steps, omega: Tensor, sigma: Tensor, noise: Steps) -> Steps:
    """Noise as a mask (arXiv 2512.23851): z' = (1 - σ) z + σ ε for steps outside of Ω, and Ω untouched to the bit.

    Args:
        omega: (B, k), the steps that stay clean.
        sigma: (B, T) in 0..1, a level for each step, of both branches.
        noise: ε of both branches.
    """
    clean = torch.zeros_like(sigma, dtype=torch.bool).scatter(1, omega, True)

    def noised(z: Tensor, epsilon: Tensor) -> Tensor:
        return torch.where(clean[:, None, :, None, None], z, flow.interpolate(z, epsilon, sigma))

    low = None if steps.low is None or noise.low is None else noised(steps.low, noise.low)
    return steps._replace(high=noised(steps.high, noise.high), low=low)


def noise_like(steps: Steps, rng: torch.Generator) -> Steps:
    """Standard normal, of the same shapes."""

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=rng, device=x.device)

    return steps._replace(high=normal(steps.high), low=None if steps.low is None else normal(steps.low))


def corrupted(steps: Steps, level: Tensor, rng: torch.Generator) -> Steps:
    """As the flow has them at time `level` `(B,)`: both branches are noised, every step of a sample alike."""
    noise = noise_like(steps, rng)
    low = None
    if steps.low is not None and noise.low is not None:
        low = flow.interpolate(steps.low, noise.low, level)
    return steps._replace(high=flow.interpolate(steps.high, noise.high, level), low=low)


class Given(NamedTuple):
    """A segment and what is given of the steps before it.

    memory   what the memory is made of, in whole groups; None without a memory
    x0       (B, C, W + T, H, W) normalised: the clean steps of the window, and the segment
    window   W
    times    (B, W + T), times of `x0` on the scale of the memory's
    first    (B, W + T) bool, which of `x0` are a video's first latent
    seen     (B, W + T) bool, which of `x0` a sample has; None: all
    """

    memory: Steps | None
    x0: Tensor
    window: int
    times: Tensor
    first: Tensor
    seen: Tensor | None


def given_of(steps: Steps, segment: int, behind: Tensor, config: MemoryDiTConfig) -> Given:
    """Split steps of which the last `segment` are to be generated, and those before them history.

    Args:
        behind: `(B,)`, how many steps there have been before the segment: groups are counted from a video's first step, and
            the last steps, that fill none, are in the window alone.
    """
    most = steps.high.shape[2] - segment
    known = most - (torch.zeros_like(behind) if steps.skip is None else steps.skip)
    late = torch.minimum(behind % config.group, known)
    held = (known - late) // config.group * config.group
    if config.variant.empty:
        held = torch.zeros_like(held)
    beside = torch.where(held > 0, late.clamp(min=config.window), max(config.window, config.group - 1))
    window = torch.minimum(known, beside)
    wide = int(window.max())
    memory = None
    if not config.variant.empty:
        memory = steps.ending(most, late, _reach(config, most, held), held)
    there = torch.arange(wide + segment, device=window.device) >= (wide - window)[:, None]
    part = steps.high[:, :, most - wide :]
    times = steps.start + most - wide + torch.arange(wide + segment, device=window.device) + late[:, None]
    seen = None if bool(there.all()) else there
    return Given(memory, part, wide, times, steps.first[:, most - wide :], seen)


def whole_of(steps: Steps, behind: Tensor, config: MemoryDiTConfig) -> Steps:
    """All steps of each sample in whole groups, which are counted from a video's first step, `behind` `(B,)` before the end."""
    every, group = steps.high.shape[2], config.group
    known = every - (torch.zeros_like(behind) if steps.skip is None else steps.skip)
    late = torch.minimum(behind % group, known)
    held = (known - late) // group * group
    return steps.ending(every, late, _reach(config, every, held), held)


def _reach(config: MemoryDiTConfig, most: int, held: Tensor) -> int:
    """How many steps a memory is made of, where samples have `held` `(B,)` of `most`."""
    # a packed one has other layers for older steps, which all ranks must call: ZeRO-3 gathers their weights together
    return max(config.group, int(held.max()) if config.variant.joins else most)


def full_tokens(patch: int, batch: Mapping[str, Any]) -> int:
    """Tokens that a batch's steps, with their history, would be without a memory."""
    steps = len(batch["key"]) * batch["latent"].shape[3] + int(batch["history_steps"].sum())
    height, width = (side // patch for side in batch["latent"].shape[4:])
    return steps * height * width


def with_history(batch: Mapping[str, Any]) -> Tensor:
    """The pixels of a batch of one, uint8 `(1, 3, T, H, W)`: those before its segment that are true, and its own."""
    before = batch["history_video"]
    return torch.cat([before[:, :, before.shape[2] - int(batch["history_frames"]) :], batch["video"]], dim=2)


@torch.no_grad()
def retrieve(
    model: MemoryDiT,
    memory: Memory,
    times: Sequence[int],
    shape: tuple[int, int],
    rng: torch.Generator,
    steps: int = 50,
    shift: float = 1.0,
    condition: Condition | None = None,
    at_once: int = 4,
    first: int | None = 0,
) -> Tensor:
    """What a memory holds of some steps: `(B, C, len(times), H, W)`, normalised, fp32, in the order of `times`.

    Args:
        times: true times of the steps, as the memory was made with.
        shape: height and width of a step in latents.
        rng: on the CPU: the same noise on every device.
        steps: Euler steps.
        at_once: steps that are denoised together; a model has learned as many as its training retrieved.
        first: the time of the video's first step, None where the memory begins later.
    """
    batch, device = memory.tokens.shape[0], model.latent_mean.device
    made = []
    for part in torch.tensor(times).split(at_once):
        noise = torch.randn(batch, model.config.channels, len(part), *shape, generator=rng).to(device)
        at = part.to(device)
        begins = None if first is None else (at == first)[None]
        velocity = partial(_velocity, model, memory, at, condition, begins)
        made.append(flow.euler(velocity, noise, steps, shift))
    return torch.cat(made, dim=2)


def _velocity(
    model: MemoryDiT,
    memory: Memory,
    times: Tensor,
    condition: Condition | None,
    first: Tensor | None,
    x: Tensor,
    t: Tensor,
) -> Tensor:
    velocity: Tensor = model(x, t, times, memory, condition, first=first)
    return velocity


@torch.no_grad()
def encoded(model: MemoryDiT, vae: Codec, video: Tensor) -> Steps:
    """The steps of a video `(1, 3, T, H, W)`, uint8, in one stream: what `MemoryDiT.remember` takes, on its device."""
    shrink = model.config.shrink
    low = model.normalise_low(posterior_of(vae, video, shrink).mode()) if shrink else None
    high = model.normalise(posterior_of(vae, video).mode())
    return Steps(high, low, 0, torch.arange(high.shape[2], device=high.device)[None] == 0)


@torch.no_grad()
def posterior_of(codec: Any, video: Tensor, by: tuple[int, int] = (1, 1)) -> Posterior:
    """What the autoencoder says of a video `(1, 3, T, H, W)`, uint8, scaled down `by` that, in one stream."""
    at, stride = next(codec.parameters()).device, codec.config.spatial_stride
    chunks = (shrunk(to_model(chunk.to(at)), by, stride) for chunk in video.split(_CHUNK, 2))
    return Posterior(*(torch.cat(parts, dim=2) for parts in zip(*codec.encode_stream(chunks), strict=True)))
