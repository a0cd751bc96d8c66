"""What a model does, as calls whose time and memory are measured: of pixels without a meaning, which cost as much as others."""

from __future__ import annotations

import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from longtake.datasets.errors import UserError
from longtake.training.evaluation import coded
from longtake.training.evaluation.asking import known, refusing, settings_of
from longtake.training.evaluation.subject import Subject, aspects
from longtake.training.evaluation.suite import Suite
from longtake.training.models.generator import Gap, Request, Scene, with_changes


class Work(NamedTuple):
    """One thing that a model does.

    name    what it does to the frames: made, encoded, decoded, filled or retrieved
    frames  how many
    run     does it once
    told    for people
    """

    name: str
    frames: int
    run: Callable[[], object]
    told: str


def of(subject: Subject, suite: Suite) -> Iterator[Work]:
    """All that a model does in a suite whose `clips.fps` is a number, once each: a video of the first length, a clip, a gap,
    a memory.

    Raises:
        UserError: the model does not take such clips, gaps or settings.
    """
    each = {"generates": _made, "reconstructs": _coded, "fills": _filled, "retrieves": _retrieved}
    for aspect, works in each.items():
        if aspect in aspects(subject.kind):
            for work in works(subject, suite):
                yield work._replace(run=partial(_refusing, subject.uri, work.run))


def _refusing(uri: str, run: Callable[[], object]) -> object:
    with refusing(uri):
        return run()


def machine() -> dict[str, Any]:
    """What time and memory depend on beside the model: the machine's name, its device, and the threads of the CPU."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
    return {"machine": platform.node(), "device": device, "threads": torch.get_num_threads()}


def _made(subject: Subject, suite: Suite) -> Iterator[Work]:
    generator, fps = _part(subject.kind.generator, subject), suite.clips.fps
    if not suite.videos:
        return
    assert fps
    first = suite.videos[0]
    seconds = first.seconds or (first.frames or 1) / fps
    frames = generator.frames_of_seconds(seconds, generator.fps)
    settings = settings_of(generator, suite.settings)
    prompt = suite.prompts[0] if suite.prompts and "prompt" in generator.accepts else None
    request = Request(suite.seed, [(0.0, Scene(prompt=prompt))])
    run = partial(_spent, partial(generator.videos, [request], frames, settings))
    yield Work("made", frames, run, f"{_size(generator.size)} at {generator.fps:g} fps, in {settings.steps} steps")


def _coded(subject: Subject, suite: Suite) -> Iterator[Work]:
    pixels = torch.from_numpy(_pixels(suite.clips.frames, suite.clips.size, suite.seed)).permute(3, 0, 1, 2)[None]
    video = coded.whole(subject, pixels.to(next(subject.module.parameters()).device))
    with torch.inference_mode():
        latent = coded.latents(subject, video).to(subject.module.dtype)
    told = _size(suite.clips.size)
    yield Work("encoded", video.shape[2], torch.inference_mode()(partial(coded.latents, subject, video)), told)
    yield Work("decoded", video.shape[2], torch.inference_mode()(partial(subject.module.decode, latent)), told)


def _filled(subject: Subject, suite: Suite) -> Iterator[Work]:
    infiller, frames = _part(subject.kind.infiller, subject), suite.gaps.frames
    shown = max(suite.gaps.context, infiller.context[0])
    before, after = (_pixels(shown, infiller.size, suite.seed + side) for side in range(2))
    with refusing(subject.uri):
        settings = with_changes(infiller.settings, known(suite.settings, infiller.settings))
    run = partial(_spent, partial(infiller.fill, [Gap(before, after, frames)], suite.seed, settings))
    yield Work("filled", frames, run, f"{_size(infiller.size)}, in {settings.steps} steps")


def _retrieved(subject: Subject, suite: Suite) -> Iterator[Work]:
    retriever = _part(subject.kind.retriever, subject)
    count = retriever.holds(round(suite.seconds * retriever.fps))
    if not count:
        raise UserError(f"seconds: {suite.seconds:g} are too few for the memory of {subject.uri}; give more")
    frames = _pixels(count, retriever.size, suite.seed)
    settings = replace(retriever.settings, **known(suite.settings, retriever.settings))
    run = partial(retriever.recall, frames, count - 1, suite.seed, settings)
    yield Work("retrieved", count, run, f"{_size(retriever.size)}, in {settings.steps} steps")


def _part(make: Any, subject: Subject) -> Any:
    return make(subject.pinned, subject.module, subject.facts, None, torch.float32)


def _spent(videos: Callable[[], Iterable[Any]]) -> None:
    deque(videos(), maxlen=0)


def _pixels(frames: int, size: tuple[int, int], seed: int) -> np.ndarray[Any, Any]:
    """Frames (T, H, W, 3) uint8 of noise."""
    return np.random.default_rng(seed).integers(0, 256, (frames, *size, 3), np.uint8)


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"
