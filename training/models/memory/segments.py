"""Videos of any length by a prior with a memory (arXiv 2512.23851): segment by segment, each given what came before.

A segment sees the past as compressed tokens and, clean beside them, the last steps. Once made it is decoded, and only
its own steps are encoded into the memory, by streams that stay open: what a segment costs does not depend on how much
came before. A *step* is a latent frame.

What it gives up: a run that goes on from kept segments decodes and encodes them again, since no state of a stream is
kept; that is little beside the many passes that each of them was sampled with, and exact.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors import torch as safetensors
from torch import Tensor

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.datasets.latents import shrunk
from longtake.datasets.loader import to_pixels
from longtake.training.models.common.codec import Codec, Posterior
from longtake.training.models.common.condition import Condition, check_classes
from longtake.training.models.common.flow import euler, guided, interpolate
from longtake.training.models.common.streaming import Past
from longtake.training.models.generator import Settings
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.tokens import Memory, cropped, repeated

Story = Sequence[tuple[int, Condition]]  # from which new step on, and what each video is asked to be
_Made = TypeVar("_Made")

_SETTINGS = "settings.json"
_SUFFIX = ".safetensors"


class History:
    """What a model is given of the steps so far, which come piece by piece and are encoded once.

    steps    how many there have been
    memory   of the last `config.history` of them, None without any
    window   `(B, C, n, h, w)`, normalised: the last `config.window` steps, and whatever else the memory does not have
             yet, since it takes steps in groups; None without any
    level    of noise, as a time of the flow, that memory and window have: what was generated is then trusted less, as
             the model has learned it; 0 is none. `seeds` are the videos', whose noise does not depend on each other
    """

    def __init__(self, model: MemoryDiT, level: float = 0.0, seeds: Sequence[int] = ()) -> None:
        self.steps, self.level, self._seeds = 0, level, seeds
        self.memory: Memory | None = None
        self.window: Tensor | None = None
        self._model = model
        self._pasts = [Past() for _ in model.memory]
        self._waiting = 0  # of the last steps, that fill no group yet
        self._low: Tensor | None = None  # of these

    @torch.no_grad()
    def append(self, latent: Tensor, low: Tensor | None = None) -> None:
        """Steps that come next, `(B, C, T, h, w)` as the autoencoder makes them; `low` is of the scaled-down video."""
        model = self._model
        high = model.normalise(latent)
        held = high if self.window is None else torch.cat([self.window, high], dim=2)
        if low is not None:
            low = model.normalise_low(low)
            low = low if self._low is None else torch.cat([self._low, low], dim=2)
        self.steps += high.shape[2]
        waiting = self._waiting + high.shape[2]
        group = model.config.group
        if whole := waiting // group * group:
            first = held.shape[2] - waiting
            begin = self.steps - waiting
            piece = self._noised(held[:, :, first : first + whole], begin, "high")
            small = None if low is None else self._noised(low[:, :, :whole], begin, "low")
            begins = begin + torch.arange(whole, device=piece.device)[None] == 0
            self.memory = model.append(self.memory, piece, small, begin, self._pasts, begins.expand(len(piece), -1))
            waiting -= whole
        if self.memory is not None:
            # whole groups, as in training: of one that begins earlier no rate keeps a token
            reach = (model.config.history - waiting) // group * group
            self.memory = cropped(self.memory, self.steps - waiting - reach)
        self._waiting = waiting
        # a view would keep all of the piece
        self._low = None if low is None else low[:, :, low.shape[2] - waiting :].clone()
        seen = min(max(model.config.window, waiting), held.shape[2])
        self.window = held[:, :, held.shape[2] - seen :].clone() if seen else None

    def given(self) -> Tensor | None:
        """The window as the next segment sees it."""
        return None if self.window is None else self._noised(self.window, self.steps, "window")

    def _noised(self, steps: Tensor, at: int, what: str) -> Tensor:
        if not self.level:
            return steps
        kind = ("high", "low", "window").index(what) + 1
        noise = torch.stack([torch.randn(steps.shape[1:], generator=_draws(seed, at, kind)) for seed in self._seeds])
        return interpolate(steps, noise.to(steps.device), torch.full((len(steps),), self.level, device=steps.device))


def _draws(*numbers: int) -> torch.Generator:
    """On the CPU: the same noise on every device."""
    state = np.random.SeedSequence(numbers).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0] >> 1))


def drawn(posterior: Posterior, seeds: Sequence[int], how: Literal["sample", "mean"]) -> Tensor:
    """Latents `(B, C, T, h, w)` of one video to go on from, for each seed: its own draw, or as every other's the mean."""
    if how == "mean":
        return posterior.mode().float().expand(len(seeds), -1, -1, -1, -1)
    on_cpu = Posterior(*(moment.float().cpu() for moment in posterior))
    draws = [on_cpu.sample(_draws(seed, 0, 4)) for seed in seeds]
    return torch.cat(draws).to(posterior.mean.device)


def segments(model: MemoryDiT, steps: int) -> int:
    """How many segments `generate` makes for so many new steps."""
    return -(-steps // _shape(model)[0])


def generate(
    model: MemoryDiT,
    vae: Codec,
    steps: int,
    seeds: Sequence[int],
    *,
    start: Tensor | None = None,
    story: Story = (),
    settings: Settings | None = None,
    folder: str | None = None,
    models: str = "",
    tile: int | None = None,
    each_step: Callable[[], object] | None = None,
) -> Iterator[np.ndarray]:
    """A video of `steps` new latent steps for each seed: chunks `(B, t, H, W, 3)` uint8, one for each segment.

    The same seed gives the same video, and a longer one begins with the shorter one: the last segment is sampled
    whole and cut. Without `start` the first step is one frame; all others are as many as the autoencoder has in a step.

    Args:
        start: `(1 or B, C, T, h, w)`, latents as the autoencoder makes them of a video from its first frame on. The
            result goes on after them, and they are not part of it.
        story: (step, condition) in order: from which new step on the videos are asked to be what. A change takes
            effect with the first segment that begins there or later.
        settings: Euler steps of a segment, guidance, shift, and the noise of what it is given of the past.
        folder: a URL where finished segments are kept. The same call goes on after them, to the same bytes.
        models: digests of the weights: what decides the result beside the other arguments.
        tile: pixels a side; decode larger frames in overlapping tiles.
        each_step: called after each of the `segments(...) * settings.steps` steps, those of kept segments included.

    Raises:
        ValueError: at the call, for what does not fit together.
        UserError: at the first chunk, where the folder has segments of other settings.
        Failure: a kept segment is damaged.
    """
    settings = settings or Settings()
    _check(model, vae, steps, seeds, start, story, settings)
    deque(vae.decode_stream((), 1, tile), maxlen=0)  # refuses a tile that does not fit before anything is sampled
    given = None if start is None else start.to(model.latent_mean.device).expand(len(seeds), -1, -1, -1, -1)
    record = {
        "models": models,
        "precision": [str(model.dtype), str(vae.dtype)],
        "seeds": list(seeds),
        "start": None if start is None else _digest(start),
        "story": [[step, condition.record()] for step, condition in story],
        "settings": {name: value for name, value in vars(settings).items() if name != "overlap"},
        "tile": tile,
    }
    return _chunks(model, vae, steps, seeds, given, story, settings, folder, record, tile, each_step)


def _chunks(
    model: MemoryDiT,
    vae: Codec,
    steps: int,
    seeds: Sequence[int],
    start: Tensor | None,
    story: Story,
    settings: Settings,
    folder: str | None,
    record: Mapping[str, Any],
    tile: int | None,
    each_step: Callable[[], object] | None,
) -> Iterator[np.ndarray]:
    device, length, shrink = model.latent_mean.device, _shape(model)[0], model.config.shrink
    decode = _kept_open(lambda latents: vae.decode_stream(latents, 1, tile))
    encode = _kept_open(lambda video: vae.encode_stream(video, 1))
    history = History(model, settings.history_noise, seeds)

    def appended(latent: Tensor) -> np.ndarray:
        """The frames of the steps that come next, which from then on are history."""
        frames, lows = [], []
        for step in latent.split(1, dim=2):
            video = decode(step)
            frames.append(to_pixels(video).permute(0, 2, 3, 4, 1).cpu().numpy())
            if shrink:
                lows.append(encode(shrunk(video.float().clamp(-1, 1), shrink, vae.config.spatial_stride)).mode())
        history.append(latent, torch.cat(lows, dim=2) if lows else None)
        return np.concatenate(frames, axis=1)

    if folder:
        _claim(folder, record)
    for piece in () if start is None else start.split(length, dim=2):
        appended(piece)
    for number, done in enumerate(range(0, steps, length)):
        place = storage.join(folder, f"{number:05d}{_SUFFIX}") if folder else ""
        latent = _kept(place, (len(seeds), model.config.channels, *_shape(model)))
        if latent is None:
            latent = _sample(model, history, seeds, number, _condition(story, done), settings, each_step).cpu()
            if place:
                storage.write(place, safetensors.save({"latent": latent}))
        elif each_step:
            for _ in range(settings.steps):
                each_step()
        yield appended(latent[:, :, : steps - done].to(device))


def _sample(
    model: MemoryDiT,
    history: History,
    seeds: Sequence[int],
    number: int,
    condition: Condition | None,
    settings: Settings,
    each_step: Callable[[], object] | None,
) -> Tensor:
    """Segment `number`: `(B, C, T, h, w)`, fp32, denormalised."""
    device, shape, clean = model.latent_mean.device, _shape(model), history.given()
    known = 0 if clean is None else clean.shape[2]
    times = torch.arange(history.steps - known, history.steps + shape[0], device=device)
    # by segment: each can be made without the draws of those before
    noise = torch.stack([torch.randn(model.config.channels, *shape, generator=_draws(seed, number)) for seed in seeds])
    first = (times == 0)[None]
    asked = condition if model.config.classes else None

    def velocity(x: Tensor, t: Tensor, part: Condition | None) -> Tensor:
        memory = None if history.memory is None else repeated(history.memory, len(x) // len(seeds))
        level = torch.full((len(x),), history.level, device=x.device) if history.level else None
        return model(x, t, times, memory, part, first=first, level=level)

    training = model.training
    model.eval()
    try:
        moves = guided(velocity, asked, settings.guidance)
        made = euler(moves, noise.to(device), settings.steps, settings.shift, clean, each_step, history.level)
        return model.denormalise(made)
    finally:
        model.train(training)


def _condition(story: Story, step: int) -> Condition | None:
    """What a segment that begins at `step` is asked to be; None before the story begins."""
    return next((condition for begins, condition in reversed(story) if begins <= step), None)


def _kept_open(stream_of: Callable[[Iterator[Tensor]], Iterator[_Made]]) -> Callable[[Tensor], _Made]:
    """A stream as a function of its next piece, of which it must make one thing, at once."""
    waiting: deque[Tensor] = deque()

    def pieces() -> Iterator[Tensor]:
        while True:
            yield waiting.popleft()

    made = stream_of(pieces())

    def push(piece: Tensor) -> _Made:
        waiting.append(piece)
        return next(made)

    return push


def _claim(folder: str, record: Mapping[str, Any]) -> None:
    """Note what the segments of a folder are of. Raises UserError where they are of something else."""
    url = storage.join(folder, _SETTINGS)
    try:
        noted = storage.read(url)
    except FileNotFoundError:
        storage.write(url, storage.canonical_json(record))
        return
    if noted != storage.canonical_json(record):
        try:
            found = json.loads(noted)
            other = [name for name in record if found.get(name) != json.loads(json.dumps(record[name]))]
        except (ValueError, AttributeError):
            other = ["damaged settings"]
        raise UserError(
            f"{folder}: has segments of a run that was stopped, with other {', '.join(other)};"
            " delete it, or give the same command again to go on with that run"
        )


def forget(folder: str) -> None:
    """Remove what `generate` has kept in the folders of this one, and these where nothing else is in them."""
    fs, path = storage.filesystem(folder)
    for name in storage.names(folder):
        inner = storage.join(folder, name)
        for file in storage.names(inner):
            if file == _SETTINGS or file.endswith(_SUFFIX):
                fs.rm_file(f"{path}/{name}/{file}")
        with suppress(OSError):
            fs.rmdir(f"{path}/{name}")
    with suppress(OSError):
        fs.rmdir(path)


def _kept(url: str, shape: tuple[int, ...]) -> Tensor | None:
    """The latents of a finished segment. Raises Failure where they are damaged."""
    if not url:
        return None
    try:
        latent = safetensors.load(storage.read(url))["latent"]
    except FileNotFoundError:
        return None
    except (SafetensorError, KeyError) as e:
        raise Failure(f"{url}: damaged ({e}); delete it and give the same command again") from e
    if latent.shape != shape:
        raise Failure(f"{url}: has shape {tuple(latent.shape)}, not {shape}; delete it and give the same command again")
    return latent


def _digest(latent: Tensor) -> str:
    return hashlib.sha256(latent.detach().float().cpu().contiguous().numpy().tobytes()).hexdigest()


def _shape(model: MemoryDiT) -> tuple[int, int, int]:
    if model.config.shape is None:
        raise ValueError("shape: the model's config names no segment; it was not trained to generate")
    return model.config.shape


def _check(
    model: MemoryDiT,
    vae: Codec,
    steps: int,
    seeds: Sequence[int],
    start: Tensor | None,
    story: Story,
    settings: Settings,
) -> None:
    """Raises ValueError for what does not fit together."""
    config, (_, height, width) = model.config, _shape(model)
    if steps < 1 or not seeds:
        raise ValueError(f"steps is {steps}, seeds are {len(seeds)}; there is nothing to generate")
    if settings.steps < 1:
        raise ValueError(f"steps is {settings.steps}; sampling needs at least 1")
    if not 0 <= settings.history_noise <= config.history_noise:
        raise ValueError(
            f"history_noise is {settings.history_noise:g}; the model has learned 0 to {config.history_noise:g}"
        )
    if vae.config.latent_channels != config.channels:
        raise ValueError(f"the prior has {config.channels} channels, the autoencoder {vae.config.latent_channels}")
    if start is not None and (
        start.ndim != 5
        or start.shape[0] not in (1, len(seeds))
        or start.shape[1] != config.channels
        or start.shape[3:] != (height, width)
        or not start.shape[2]
    ):
        raise ValueError(
            f"start has shape {tuple(start.shape)}; it needs (1 or {len(seeds)}, {config.channels}, T, {height}, {width})"
        )
    if [step for step, _ in story] != sorted({step for step, _ in story}):
        raise ValueError("story: its steps must rise")
    for step, condition in story:
        if condition.classes is None:
            continue
        if len(condition.classes) != len(seeds):
            raise ValueError(f"story: at step {step} are {len(condition.classes)} classes for {len(seeds)} seeds")
        check_classes(condition.classes.tolist(), config.classes)
    if settings.guidance != 1.0 and not any(condition.asks for _, condition in story):
        raise ValueError(f"guidance is {settings.guidance}; it needs a class to guide to")
