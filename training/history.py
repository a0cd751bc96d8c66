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

`registry.load_with_facts(uri)` gives the model and these.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from longtake.training import flow
from longtake.training.engines import device
from longtake.training.models.memory import Memory
from longtake.training.models.memory_dit import MemoryDiT, MemoryDiTConfig
from longtake.training.models.pv_vae import Posterior


class Steps(NamedTuple):
    """Steps that follow each other: of the full latents, of the low-res branch's, and the time of the first.

    high   (B, C, T, H, W) normalised, fp32
    low    (B, C, T, h, w) normalised with its own statistics, or None without such a branch
    start  in steps; times are absolute, and whatever is cut off at the front, what is left keeps its own
    """

    high: Tensor
    low: Tensor | None
    start: int

    def of(self, first: int, end: int | None = None) -> "Steps":
        """Steps `first` to `end` of these, counted from 0."""
        low = None if self.low is None else self.low[:, :, first:end]
        return Steps(self.high[:, :, first:end], low, self.start + first)

    def whole(self, group: int) -> "Steps":
        """Cut at the front to a multiple of `group`, as a memory needs them."""
        return self.of(self.high.shape[2] % group)


def true_steps(batch: Mapping[str, Any]) -> int:
    """How many steps of history all samples of the batch truly have, 0 without any."""
    return int(batch["history_steps"].min()) if "history_steps" in batch else 0


def steps_of(
    batch: Mapping[str, Any],
    model: MemoryDiT,
    known: int,
    posterior: Literal["sample", "mean"] = "mean",
    generator: torch.Generator | None = None,
) -> Steps:
    """The last `known` steps before the window and the window's own, in order.

    A batch whose history has room for S steps has its window at time S, however many are taken.

    Args:
        batch: of a `Loader`; a second column of latents is the low-res branch's, which else reads the first one where
            nothing is to be scaled down.
        known: at most `true_steps(batch)`.
        posterior: "sample" draws each full latent from what the autoencoder says of it; "mean" takes the likeliest, as
            the low-res branch always does: it reads encoded video in generation too.
    """

    def moments(name: str) -> Posterior:
        before = batch.get(f"history_{name}")
        parts = [batch[name]] if before is None else [before[:, :, :, before.shape[3] - known :], batch[name]]
        return Posterior(*torch.cat(parts, dim=3).float().unbind(1))

    room = batch["history_latent"].shape[3] if "history_latent" in batch else 0
    small = "latent_2" if "latent_2" in batch else "latent" if model.config.shrink == (1, 1) else None
    low = model.normalise_low(moments(small).mode()) if small else None
    full = moments("latent")
    return Steps(model.normalise(full.sample(generator) if posterior == "sample" else full.mode()), low, room - known)


def draw_omega(batch: int, steps: int, most: int, generator: torch.Generator) -> Tensor:
    """Ω, the steps to retrieve: `(batch, k)` distinct ones of 0..steps-1 in order, other ones for each sample.

    k is uniform in 1..most (at most `steps`) and the same for the samples of a call [assumption: 1 to 4].
    """
    device = generator.device
    count = 1 + int(torch.randint(min(most, steps), (), generator=generator, device=device))
    ranks = torch.rand(batch, steps, generator=generator, device=device).argsort(1)
    return ranks[:, :count].sort(1).values


def picked(steps: Tensor, omega: Tensor) -> Tensor:
    """The steps Ω `(B, k)` of `(B, C, T, H, W)`: `(B, C, k, H, W)`."""
    return steps.gather(2, omega[:, None, :, None, None].expand(-1, steps.shape[1], -1, *steps.shape[3:]))


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
    return Steps(noised(steps.high, noise.high), low, steps.start)


def noise_like(steps: Steps, generator: torch.Generator) -> Steps:
    """Standard normal, of the same shapes."""

    def normal(x: Tensor) -> Tensor:
        return torch.randn(x.shape, generator=generator, device=x.device)

    return Steps(normal(steps.high), None if steps.low is None else normal(steps.low), steps.start)


class Given(NamedTuple):
    """A segment and what is given of the steps before it.

    memory   what the memory is made of, in whole groups; None at a video's start, or without a memory
    x0       (B, C, W + T, H, W) normalised: the clean steps of the window, and the segment
    window   W
    times    (W + T,), true times of `x0`
    """

    memory: Steps | None
    x0: Tensor
    window: int
    times: Tensor


def given_of(steps: Steps, known: int, config: MemoryDiTConfig, late: int = 0) -> Given:
    """Split steps of which the first `known` are history, and the others the segment.

    Args:
        late: so many of the last steps of the history fill no group of the memory yet; the window has them all.
    """
    late = min(late, known)
    held = 0 if config.memory == "none" else (known - late) // config.group * config.group
    window = min(known, max(config.window, late if held else config.group - 1))
    part = steps.of(known - window)
    times = part.start + torch.arange(part.high.shape[2], device=part.high.device)
    return Given(steps.of(known - late - held, known - late) if held else None, part.high, window, times)


def draw_late(config: MemoryDiTConfig, generator: torch.Generator) -> int:
    """How many steps a memory is behind after some segments: any number that generation comes to, as likely."""
    assert config.shape
    each = math.gcd(config.shape[0], config.group)
    return each * int(torch.randint(config.group // each, (), generator=generator, device=generator.device))


def agreed(least: int, *drawn: int) -> list[int]:
    """The least of a number over all ranks, and numbers as the first rank has drawn them; every rank must call it.

    So all ranks call the same modules, as ZeRO needs it.
    """
    if not torch.distributed.is_initialized() or torch.distributed.get_world_size() == 1:
        return [least, *drawn]
    mine = drawn if torch.distributed.get_rank() == 0 else [torch.iinfo(torch.int64).max] * len(drawn)
    numbers = torch.tensor([least, *mine], device=device())
    torch.distributed.all_reduce(numbers, torch.distributed.ReduceOp.MIN)
    return [int(number) for number in numbers]


def full_tokens(patch: int, batch: Mapping[str, Any]) -> int:
    """Tokens that a batch's steps, with their history, would be without a memory."""
    steps = batch["latent"].shape[3] + int(batch["history_steps"].min())
    height, width = (side // patch for side in batch["latent"].shape[4:])
    return len(batch["key"]) * steps * height * width


def with_history(batch: Mapping[str, Any]) -> Tensor:
    """The pixels of a batch of one, uint8 `(1, 3, T, H, W)`: those before its segment that are true, and its own."""
    before = batch["history_video"]
    return torch.cat([before[:, :, before.shape[2] - int(batch["history_frames"]) :], batch["video"]], dim=2)


class Remembering(MemoryDiT):
    """A MemoryDiT that may be called with a history in place of the memory of it.

    So that one call goes through all that learns, as the hooks of ZeRO need it.
    """

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        times: Tensor,
        memory: Memory | Steps | None = None,
        classes: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        if isinstance(memory, Steps):
            memory = self.remember(memory.high, memory.low, memory.start)
        return super().forward(x, t, times, memory, classes, generator)


@torch.no_grad()
def retrieve(
    model: MemoryDiT,
    memory: Memory,
    times: Sequence[int],
    shape: tuple[int, int],
    generator: torch.Generator,
    steps: int = 50,
    shift: float = 1.0,
    classes: Tensor | None = None,
    at_once: int = 4,
) -> Tensor:
    """What a memory holds of some steps: `(B, C, len(times), H, W)`, normalised, fp32, in the order of `times`.

    Args:
        times: true times of the steps, as the memory was made with.
        shape: height and width of a step in latents.
        generator: on the CPU: the same noise on every device.
        steps: Euler steps.
        at_once: steps that are denoised together; a model has learned as many as its training retrieved.
    """
    batch, device = memory.tokens.shape[0], model.latent_mean.device
    made = []
    for some in torch.tensor(times).split(at_once):
        noise = torch.randn(batch, model.config.channels, len(some), *shape, generator=generator).to(device)
        at = some.to(device)
        made.append(flow.euler(lambda x, t, at=at: model(x, t, at, memory, classes), noise, steps, shift))  # type: ignore[misc]
    return torch.cat(made, dim=2)
