"""What generates videos, behind one face: `longtake generate`, the served model and the judge know no family."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from longtake.datasets.errors import UserError
from longtake.training.models.common.condition import NO_CLASS

Story = list[tuple[float, int]]  # from which second on a video is of which class; -1 is none


@dataclass(frozen=True)
class Settings:
    """How to sample. PV-VAE: 100 Euler steps, no shift; the others are choices.

    steps      Euler steps of a window
    guidance   towards the class, 1 is none; without a class it has no effect
    shift      of the flow's times towards noise
    overlap    latents (frames, for a prior of pixels) of a window that are given by the one before
    history_noise   level of noise, 0 to 1, that a model with a memory is given its past with; 0 is none
    """

    steps: int = 100
    guidance: float = 1.0
    shift: float = 1.0
    overlap: int = 2
    history_noise: float = 0.0


class Request(NamedTuple):
    """A video that is asked for: its seed, and what it is of at which second."""

    seed: int
    story: Story


class Generator(Protocol):
    """A loaded prior with all that it needs to make videos.

    accepts    what may be asked for beside a seed (see `kind.Kind`)
    classes    names of its classes in the order of their ids
    frames     of a video, unless another length is asked for
    fps, size  frames per second, and (height, width), of the videos that it has learned
    settings   those that it was registered with
    """

    @property
    def accepts(self) -> frozenset[str]: ...

    @property
    def classes(self) -> Sequence[str]: ...

    @property
    def frames(self) -> int: ...

    @property
    def fps(self) -> float: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def settings(self) -> Settings: ...

    def begin(self, frames: Iterator[np.ndarray]) -> Any:
        """What to continue from: of the end of a video `(H, W, 3)` uint8. UserError where it is too short."""

    def frames_of_seconds(self, seconds: float, fps: float, start: Any = None) -> int:
        """The least number of frames that it can make and that last so long, after `start`."""

    def rounds(self, frames: int, settings: Settings, start: Any = None) -> int:
        """How often `videos` calls `each_step`. ValueError where it makes no videos of so many frames."""

    def videos(
        self,
        requests: Sequence[Request],
        frames: int,
        settings: Settings,
        *,
        fps: float | None = None,
        start: Any = None,
        folder: str | None = None,
        tile: int | None = None,
        each_step: Callable[[], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """The videos of some requests side by side: chunks `(B, t, H, W, 3)` uint8 that follow each other.

        The same model, request and settings give the same video.

        Args:
            frames: of each video, beside those of `start`.
            fps: that the seconds of stories count by; None is the model's.
            start: of `begin`; continue from there.
            folder: URL for what is finished, if the model keeps any: the same call continues after it.
            tile: pixels a side; decode larger frames in overlapping tiles.
            each_step: called after each of the `rounds`.

        Raises:
            ValueError: at the call, for what does not fit together.
            UserError, Failure: of the folder.
        """

    def forget(self, folder: str) -> None:
        """Remove what `videos` has kept in the folders of this one."""


def class_id(name: str | None, classes: Sequence[str]) -> int:
    """Which of a model's classes, by name or number, is meant; -1 for None. UserError where there is none such."""
    if name is None:
        return NO_CLASS
    if name in classes:
        return classes.index(name)
    try:
        number = int(name)
        if not 0 <= number < len(classes):
            raise ValueError
    except ValueError as e:
        if not classes:
            raise UserError(f"class {name!r}: this model has no classes; leave it out") from e
        near = difflib.get_close_matches(name, classes, 3, 0.4) or classes[:5]
        raise UserError(
            f"class {name!r}: this model has {len(classes)} classes, by name such as {', '.join(near)},"
            f" or by number 0 to {len(classes) - 1}"
        ) from e
    return number


def story_of(storyboard: Any, classes: Sequence[str]) -> Story:
    """A storyboard as (seconds, class id): a list of `{at: 3.5s, class: NAME}`, times rising; a class of null is none.

    Raises:
        UserError: anything else.
    """
    if not isinstance(storyboard, list) or not storyboard:
        raise UserError("needs a list with entries such as {at: 3.5s, class: NAME}")
    story: Story = []
    for number, entry in enumerate(storyboard, 1):
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
            story.append((at, class_id(None if name is None else str(name), classes)))
        except UserError as e:
            raise UserError(f"entry {number}: {e}") from e
    return story


def seconds_of(text: Any) -> float:
    """`3.2s`, `3.2` or 3.2 as seconds. ValueError for anything else."""
    try:
        seconds = float(str(text).strip().removesuffix("s"))
    except ValueError:
        seconds = math.nan
    if isinstance(text, bool) or not 0 <= seconds < math.inf:
        raise ValueError(f"{str(text)[:40]!r} is no time; write seconds, such as 3.2s")
    return seconds
