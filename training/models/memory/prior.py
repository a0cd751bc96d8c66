"""A registered model with a memory, and what it is used for: to go on with a video, and to get back steps of one.

The first is `segments.generate` in frames, seconds and names; the second shows what a memory holds (arXiv 2512.23851).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from longtake.datasets.errors import UserError
from longtake.datasets.loader import to_pixels
from longtake.training import registry
from longtake.training.models.common import sampling
from longtake.training.models.common.flow import NO_CLASS
from longtake.training.models.common.sampling import Settings
from longtake.training.models.memory import history, segments
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.retrieval import encoded, posterior_of
from longtake.training.models.pv_vae.model import PVVAE, Posterior, frames_of, latent_groups

Stage = Literal["generation", "retrieval"]
_KINDS = {"generation": "finetune_memory_prior", "retrieval": "pretrain_memory"}


@dataclass(frozen=True)
class MemoryPrior:
    """A registered `memory_dit` with the autoencoder that makes videos of its latents, and encodes what it remembers.

    `classes` are the names of its classes in the order of their ids, `frames` those of a video's first segment, `fps`
    and `size` (height, width) those of what it has learned from; `digest` is of all weights.
    """

    model: MemoryDiT
    vae: PVVAE
    classes: Sequence[str]
    frames: int
    fps: float
    size: tuple[int, int]
    settings: Settings
    digest: str
    posterior: Literal["sample", "mean"] = "mean"  # what of each latent it has learned

    def class_id(self, given: str | None) -> int:
        """The id of a class by its name or number; -1 for None. UserError where there is none such."""
        return sampling.class_id(given, self.classes)

    def steps(self, frames: int, goes_on: bool = False) -> int:
        """What so many new frames are in steps. ValueError where no steps are of so many."""
        if not goes_on:
            return sampling.latent_frames(frames, self.vae)
        factor = self.vae.config.temporal_stride
        if frames < 1 or frames % factor:
            low = max(1, frames // factor) * factor
            raise ValueError(
                f"frames is {frames}; going on from a video makes {factor}n frames, such as {low} or {low + factor}"
            )
        return frames // factor

    def frames_of_seconds(self, seconds: float, fps: float, goes_on: bool = False) -> int:
        """The least number of new frames that `steps` knows and that last so long."""
        if not goes_on:
            return sampling.frames_of_seconds(seconds, fps, self.vae)
        factor = self.vae.config.temporal_stride
        return max(1, math.ceil((seconds * fps - 1e-6) / factor)) * factor

    def holds(self, frames: int) -> int:
        """How many of so many frames a memory takes at once: 1 + 4n that make whole groups of steps; 0 for too few."""
        factor, group = self.vae.config.temporal_stride, self.model.config.group
        most = max(group, self.model.config.history)
        steps = min(latent_groups(frames, factor), most) // group * group if frames > 0 else 0
        return frames_of(steps, factor) if steps else 0

    def start(self, frames: Iterable[np.ndarray]) -> Posterior:
        """What the autoencoder says, `(1, C, T, h, w)`, of the end of a video `(H, W, 3)` uint8, as much as a segment can know of.

        UserError where it is too short to go on from.
        """
        config, factor = self.model.config, self.vae.config.temporal_stride
        most = frames_of(max(config.history, config.window, 1), factor)
        held = deque(frames, maxlen=most)
        least = frames_of(max(config.window, 1), factor)
        if len(held) < least:
            raise UserError(f"has {len(held)} frames at {self.fps:g} a second; the model goes on from {least} or more")
        count = self.holds(len(held))
        if count < least:
            count = sampling.nearest_lengths(len(held), factor)[0]
        return posterior_of(self.vae, _video(np.stack(list(held)[-count:])))


def load_prior(uri: str, stage: Stage, vae: str | None = None, dtype: torch.dtype = torch.float32) -> MemoryPrior:
    """A model of the registry or of a model folder, on the GPU where there is one.

    Args:
        stage: what it is for.
        vae: decode by this autoencoder and not by the one that the model names; its encoder must be the same.

    Raises:
        UserError: no such model; it has no memory, or is for something else; the autoencoder is another one.
        Failure: the store cannot be reached; or a model is damaged.
    """
    return prior_of(uri, *registry.load_with_facts(uri), stage, vae, dtype)


def prior_of(
    uri: str, model: nn.Module, facts: Mapping[str, Any], stage: Stage, vae: str | None, dtype: torch.dtype
) -> MemoryPrior:
    """`load_prior` of a model that is loaded."""
    if not isinstance(model, MemoryDiT):
        raise UserError(f"{uri}: is a {type(model).__name__}, which has no memory; name a `{_KINDS[stage]}` model")
    if facts["stage"] != stage:
        raise UserError(f"{uri}: has been trained for {facts['stage']}, not {stage}; name a `{_KINDS[stage]}` model")
    decoder, digest = sampling.decoder_of(uri, facts["vae"], vae)
    device, window = sampling.best_device(), facts["window"]
    return MemoryPrior(
        model.to(device, dtype),
        decoder.to(device, dtype),
        tuple(facts["classes"]),
        window["frames"],
        window["fps"],
        (window["size"][0], window["size"][1]),
        Settings(**facts["sampling"]),
        f"{registry.digest(facts)} {digest}",
        facts.get("posterior", "mean"),
    )


def story_of(given: Any, prior: MemoryPrior) -> list[tuple[float, int]]:
    """A storyboard as (seconds, class id): a list of `{at: 3.5s, class: NAME}`, times rising; a class of null is none.

    Raises:
        UserError: anything else.
    """
    if not isinstance(given, list) or not given:
        raise UserError("needs a list with entries such as {at: 3.5s, class: NAME}")
    story: list[tuple[float, int]] = []
    for number, entry in enumerate(given, 1):
        if not isinstance(entry, Mapping) or set(entry) != {"at", "class"}:
            has = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)[:60]
            raise UserError(f"entry {number} needs `at` and `class`, and has {has or 'neither'}")
        try:
            at = seconds_of(entry["at"])
        except ValueError as e:
            raise UserError(f"entry {number}: at: {e}") from e
        if story and at <= story[-1][0]:
            raise UserError(f"entry {number}: at: {at:g} s must be later than the {story[-1][0]:g} s before")
        name = entry["class"]
        try:
            story.append((at, prior.class_id(None if name is None else str(name))))
        except UserError as e:
            raise UserError(f"entry {number}: {e}") from e
    return story


def seconds_of(given: Any) -> float:
    """`3.2s`, `3.2` or 3.2 as seconds. ValueError for anything else."""
    try:
        seconds = float(str(given).strip().removesuffix("s"))
    except ValueError:
        seconds = math.nan
    if isinstance(given, bool) or not 0 <= seconds < math.inf:
        raise ValueError(f"{str(given)[:40]!r} is no time; write seconds, such as 3.2s")
    return seconds


def generate_videos(
    prior: MemoryPrior,
    frames: int,
    seeds: Sequence[int],
    story: Sequence[tuple[float, Sequence[int]]] = (),
    settings: Settings | None = None,
    *,
    fps: float | None = None,
    start: Posterior | None = None,
    folder: str | None = None,
    tile: int | None = None,
    each_step: Callable[[], object] | None = None,
) -> Iterator[np.ndarray]:
    """A video of so many new frames for each seed: chunks `(B, t, H, W, 3)` uint8 (see `segments.generate`).

    Args:
        frames: as `prior.steps` knows them.
        story: (seconds, class ids): from when on each video is of which class; without any guidance has no effect.
        settings: None is what the model was registered with.
        fps: that seconds count by; None is the model's.
        start: of `prior.start`; latents are drawn of it as in training, by each video's own seed.
        folder, tile, each_step: see `segments.generate`.

    Raises:
        ValueError: at the call, for what does not fit together.
        UserError, Failure: of a folder.
    """
    factor, goes_on = prior.vae.config.temporal_stride, start is not None
    beats: dict[int, Sequence[int]] = {}
    for at, ids in story:
        frame = math.ceil(at * (fps or prior.fps) - 1e-6)
        beats[frame // factor if goes_on else -(-frame // factor)] = ids
    settings = settings or prior.settings
    if all(c == NO_CLASS for ids in beats.values() for c in ids):
        settings = replace(settings, guidance=1.0)
    return segments.generate(
        prior.model,
        prior.vae,
        prior.steps(frames, goes_on),
        seeds,
        start=None if start is None else segments.drawn(start, seeds, prior.posterior),
        story=list(beats.items()),
        settings=settings,
        folder=folder,
        models=prior.digest,
        tile=tile,
        each_step=each_step,
    )


@torch.no_grad()
def recall(
    prior: MemoryPrior, frames: np.ndarray, last: int | None = None, seed: int = 0, settings: Settings | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What a memory of a video has kept of its frames, and what the autoencoder alone keeps: both `(n, H, W, 3)` uint8.

    The memory is of the first `prior.holds(...)` frames. The steps from the first on to that of frame `last` are
    retrieved, since the decoder looks back, and n is how many frames they make.

    Args:
        frames: `(t, H, W, 3)` uint8.
        last: the last frame that is wanted; None is the last of the memory.
        settings: None is what the model was registered with.

    Raises:
        UserError: another array, too few frames, or a model without a memory.
    """
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        got = f"{frames.dtype} {frames.shape}" if isinstance(frames, np.ndarray) else type(frames).__name__
        raise UserError(f"video: needs a uint8 array (T, H, W, 3), got {got}")
    model, settings = prior.model, settings or prior.settings
    if not len(model.memory):
        raise UserError("this model has no memory to retrieve from; name one with another `memory` than none")
    factor = prior.vae.config.temporal_stride
    count = prior.holds(len(frames))
    if not count:
        raise UserError(
            f"video: has {len(frames)} frames; a memory takes at least {frames_of(model.config.group, factor)}"
        )
    last = count - 1 if last is None else last
    if not 0 <= last < count:
        raise UserError(f"video: frame {last} is none of the {count} that the memory is of")
    try:
        steps = encoded(model, prior.vae, _video(frames[:count]))
        memory = history.remembered(model, steps)
    except ValueError as e:
        raise UserError(f"video: {e}") from e
    draws = torch.Generator().manual_seed(seed)
    # some random ones at a time, as in training
    times = torch.randperm(1 + -(-last // factor), generator=draws)
    shape = (steps.high.shape[3], steps.high.shape[4])
    made = history.retrieve(model, memory, times.tolist(), shape, draws, settings.steps, settings.shift)
    return _decoded(prior, made[:, :, times.argsort()]), _decoded(prior, steps.high[:, :, : len(times)])


def _video(frames: np.ndarray) -> Tensor:
    """`(1, 3, t, H, W)` uint8."""
    return torch.from_numpy(np.ascontiguousarray(frames)).permute(3, 0, 1, 2)[None]


def _decoded(prior: MemoryPrior, steps: Tensor) -> np.ndarray:
    """Normalised steps as frames `(n, H, W, 3)` uint8."""
    chunks = prior.vae.decode_stream([prior.model.denormalise(steps)])
    return np.concatenate([to_pixels(chunk)[0].permute(1, 2, 3, 0).cpu().numpy() for chunk in chunks])
