"""The interface to models that generate videos, so that generation, serving and the judge know no family."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from longtake.datasets.errors import UserError
from longtake.training.models.common.condition import NO_CLASS
from longtake.training.models.common.guidance import Guidance, guidance_of, parts_of

_ENTRIES = ({"at", "class"}, {"at", "prompt"}, {"at", "class", "prompt"})  # the keys of an entry of a storyboard


class Scene(NamedTuple):
    """What is to be seen: a class by its id, -1 for none, and a text, None for none. An empty text is one."""

    class_id: int = NO_CLASS
    prompt: str | None = None


_REALS = ("shift", "guidance", "image_guidance", "cutoff", "fall")  # of how gaps are filled

Story = list[tuple[float, Scene]]  # the second from which on each scene is to be seen


@dataclass(frozen=True)
class Settings:
    """How to sample. PV-VAE: 100 Euler steps, no shift; the other defaults are choices.

    steps           Euler steps of a window
    guidance        towards class and prompt, 1 is none; without any it has no effect. One number for both, or a `Guidance`,
                    which plain data may stand for (see `guidance_of`)
    shift           of the flow's times towards noise
    overlap         latents (frames, for a prior of pixels) that a window shares with the one before
    history_noise   noise, 0 to 1, on the history of a model with a memory; 0 is none
    temperature     of a model of tokens: its logits are divided by it
    top_k           draw among the likeliest tokens; 0 is all [TATS: 2048]
    top_p           and among the likeliest that reach this probability together; 1 is all [TATS: 0.8]
    keep            latent frames of the past that each further window of tokens has; 0 is all that it has room for
    content         of a model that goes on from single frames: `encode` what each of them shows, or `keep` that of the first
    backward        the same in the other direction of time: the video ends where its start begins
    solver          of the flow of a transformer of another library: `euler`, or `unipc` of higher order
    guidance_2      of such a transformer for low noise, beside one for high; None: as `guidance`
    negative_guidance  away from the negative text, 1 is none; of such a transformer that has `guidance` as an input
    """

    steps: int = 100  # the name that registered models and recipes have; functions call them `solver_steps`
    guidance: float | Guidance = 1.0
    shift: float = 1.0
    overlap: int = 2
    history_noise: float = 0.0
    temperature: float = 1.0
    top_k: int = 2048
    top_p: float = 0.8
    keep: int = 0
    content: Literal["encode", "keep"] = "encode"
    backward: bool = False
    solver: Literal["euler", "unipc"] = "euler"
    guidance_2: float | None = None
    negative_guidance: float = 1.0

    def __post_init__(self) -> None:
        try:
            object.__setattr__(self, "guidance", guidance_of(self.guidance))
        except ValueError as e:
            raise ValueError(f"guidance: {e}") from e
        # of 0 the time of pure noise is 0 divided by 0
        if not isinstance(self.shift, Real) or not 0 < self.shift < math.inf:
            raise ValueError(f"shift: {self.shift!r} is no number above 0")
        if self.content not in ("encode", "keep"):
            raise ValueError(f"content: {self.content!r} is neither encode nor keep")
        if self.solver not in ("euler", "unipc"):
            raise ValueError(f"solver: {self.solver!r} is neither euler nor unipc")


class Sound(NamedTuple):
    """Sound from a video's first frame on: samples (channels, n) float32 in [-1, 1], and how many are in a second."""

    samples: np.ndarray
    rate: int


def plain(settings: Settings, names: Collection[str]) -> dict[str, Any]:
    """Those settings that a family knows, as plain data for its config.json."""
    described = asdict(settings)
    if isinstance(settings.guidance, Guidance):
        described["guidance"] = settings.guidance.plain()
    return {name: value for name, value in described.items() if name in names}


class Request(NamedTuple):
    """A video to generate.

    seed      of its draws
    story     what is to be seen over time
    negative  a text that guidance leads away from, None for none
    sound     that it is to fit, None for none
    movement  of other videos, one after the other, as `Generator.movement` gives it; none: the model's own
    """

    seed: int
    story: Story
    negative: str | None = None
    sound: Sound | None = None
    movement: Sequence[Any] = ()


class Generator(Protocol):
    """A loaded prior with all that it needs to generate videos.

    accepts    options of a request beside the seed, and the settings that have an effect (see `kind.Kind`)
    classes    names of its classes in the order of their ids
    frames     of a video of the default length
    fps, size  frames per second, and (height, width), of its training videos
    settings   the ones that it was registered with

    One that accepts "movement" also has `movement(frames)`, the movement of a video from its frames as `begin` takes them;
    one that accepts "size" has `sized(height, width)`, the same for such videos, or UserError for sides it does not divide.
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

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that it cannot encode, where it accepts any: UserError that names what is missing or too long."""

    def begin(self, frames: Iterator[np.ndarray]) -> Any:
        """The `start` of `videos` from a video's frames `(H, W, 3)` uint8. UserError if the video is too short."""

    def frames_of_seconds(self, seconds: float, fps: float, start: Any = None) -> int:
        """The smallest number of frames, after `start`, that it can generate and that last at least `seconds`."""

    def rounds(self, frames: int, settings: Settings, start: Any = None) -> int:
        """How often `videos` calls `each_step`. ValueError if it cannot generate videos of `frames` frames."""

    def joints(self, frames: int, settings: Settings, start: Any = None) -> list[int]:
        """The numbers of the frames at which another window, segment or clip begins; none in a video that is made at once."""

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
        """Generate a batch of videos: chunks `(B, t, H, W, 3)` uint8 in order.

        The same model, request and settings give the same video.

        Args:
            frames: of each video, without those of `start`.
            requests: their stories change at the same seconds.
            fps: frame rate for the seconds of stories; None is the model's.
            start: result of `begin`, to continue from.
            folder: URL where the model may keep finished parts, after which the same call continues.
            tile: pixels a side; decode larger frames in overlapping tiles.
            each_step: called after each step of sampling, `rounds` times.

        Raises:
            ValueError: at the call, for arguments that do not fit together.
            UserError, Failure: the folder cannot be used.
        """

    def forget(self, folder: str) -> None:
        """Remove what `videos` has kept in `folder`."""


def fields_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a `Generator` that its config.json names: `classes`, `frames`, `fps`, `size` and `settings`."""
    window = facts["window"]
    described = {"classes": tuple(facts["classes"]), "settings": Settings(**facts["sampling"])}
    return described | {"frames": window["frames"], "fps": window["fps"], "size": tuple(window["size"])}


class Retriever(NamedTuple):
    """A loaded model that retrieves frames of a video from its memory of it.

    fps, size   frames per second, and (height, width), of the videos that it takes
    settings    the ones that it was registered with
    holds       `holds(frames)`: how many of that many frames one memory takes; 0 for too few
    recall      `recall(frames, last, seed, settings)`: retrieved frames, and those that its autoencoder alone keeps
    """

    fps: float
    size: tuple[int, int]
    settings: Settings
    holds: Callable[[int], int]
    recall: Callable[[np.ndarray, int, int, Settings], tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class InfillSettings:
    """How to fill a gap between clips. The defaults are choices; MAVIN's own are 50 steps and a guidance of 9.

    steps           Euler steps
    shift           of the flow's times towards noise
    guidance        towards the prompt, 1 is none; without a prompt it has no effect
    image_guidance  towards the frames beside the gap, 1 is none
    mixer           what a gap begins from: none, noise alone; paper or per_frame, low frequencies of the frames beside it
    noise           of the high frequencies: the same noise, or fresh
    cutoff, fall    of the low frequencies beside the gap, and by how much less for each latent further in
    """

    steps: int = 50
    shift: float = 1.0
    guidance: float = 1.0
    image_guidance: float = 1.0
    mixer: Literal["none", "paper", "per_frame"] = "none"
    noise: Literal["same", "fresh"] = "same"
    cutoff: float = 0.6
    fall: float = 0.1


def with_changes(settings: InfillSettings, changes: Mapping[str, Any]) -> InfillSettings:
    """Settings of which some are others. ValueError for wrong numbers, and for a change to a mixer where there is none."""
    for name, value in changes.items():
        if name == "steps" and (isinstance(value, bool) or not isinstance(value, Integral) or value < 1):
            raise ValueError(f"steps: {value!r} is no whole number above 0")
        if name in _REALS and (not isinstance(value, Real) or not math.isfinite(value) or value < 0):
            raise ValueError(f"{name}: {value!r} is no number from 0 on")
        if name == "shift" and not value:
            raise ValueError("shift: must be above 0")
    changed = replace(settings, **changes)
    if changed.mixer == "none" and (idle := [name for name in ("noise", "cutoff", "fall") if name in changes]):
        raise ValueError(f"{idle[0]}: is of a mixer, and there is none; set mixer to paper or per_frame")
    return changed


class Gap(NamedTuple):
    """Frames to make between others.

    before, after  the frames on its sides, `(t, H, W, 3)` uint8
    frames         how many to make
    prompt         what is to be seen, None for none
    """

    before: np.ndarray
    after: np.ndarray
    frames: int
    prompt: str | None = None


class Infiller(Protocol):
    """A loaded model that makes the frames between clips.

    fps, size  frames per second, and (height, width), of the clips that it takes
    settings   the ones that it was registered with
    context    the fewest and the most frames that it sees on a side of a gap
    longest    frames of the longest gap in its training

    One with `takes_prompts` has learned of texts.
    """

    @property
    def fps(self) -> float: ...

    @property
    def size(self) -> tuple[int, int]: ...

    @property
    def settings(self) -> InfillSettings: ...

    @property
    def context(self) -> tuple[int, int]: ...

    @property
    def longest(self) -> int: ...

    @property
    def takes_prompts(self) -> bool: ...

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Refuse prompts that it cannot encode: UserError."""

    def fill(
        self,
        gaps: Sequence[Gap],
        seed: int,
        settings: InfillSettings,
        *,
        negative: str | None = None,
        first: int = 0,
        folder: str | None = None,
        batch: int = 1,
        each_step: Callable[[], object] | None = None,
    ) -> Iterator[np.ndarray]:
        """The frames of each gap, `(frames, H, W, 3)` uint8, in order. A gap depends on the seed and on its number.

        Args:
            first: number of the first gap.
            negative: a text that guidance leads away from.
            folder: URL where the model may keep finished gaps, after which the same call continues.
            batch: gaps at once.
            each_step: called `settings.steps` times for each gap.

        Raises:
            ValueError: at the call, for what does not fit together.
            UserError, Failure: the folder cannot be used.
        """

    def forget(self, folder: str) -> None:
        """Remove what `fill` has kept in subfolders of `folder`."""


def class_id(name: str | None, classes: Sequence[str]) -> int:
    """The id of a class by its name or number; -1 for None. UserError if the model has no such class."""
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


def scene_of(name: Any, prompt: Any, classes: Sequence[str]) -> Scene:
    """The scene of a class's name or number and of a prompt, None for none. UserError: no such class, or no text."""
    if prompt is not None and not isinstance(prompt, str):
        raise UserError(f"prompt: {str(prompt)[:40]} is no text; put it in quotes")
    return Scene(class_id(None if name is None else str(name), classes), prompt)


def story_of(storyboard: Any, classes: Sequence[str]) -> Story:
    """Parse a storyboard, a list of `{at: 3.5s, class: NAME, prompt: TEXT}` with rising times and one or both of the others.

    A scene has only what its own entry says; null is none.

    Raises:
        UserError: it is anything else.
    """
    if not isinstance(storyboard, list) or not storyboard:
        raise UserError("needs a list with entries such as {at: 3.5s, class: NAME} or {at: 3.5s, prompt: TEXT}")
    story: Story = []
    for number, entry in enumerate(storyboard, 1):
        if not isinstance(entry, Mapping) or set(entry) not in _ENTRIES:
            has = ", ".join(map(str, entry)) if isinstance(entry, Mapping) else repr(entry)[:60]
            raise UserError(f"entry {number} needs `at` and `class` or `prompt`, and has {has or 'none of them'}")
        try:
            second = seconds_of(entry["at"])
        except ValueError as e:
            raise UserError(f"entry {number}: at: {e}") from e
        if story and second <= story[-1][0]:
            raise UserError(f"entry {number}: at: {second:g} s must be later than the {story[-1][0]:g} s before")
        try:
            story.append((second, scene_of(entry.get("class"), entry.get("prompt"), classes)))
        except UserError as e:
            raise UserError(f"entry {number}: {e}") from e
    return story


def check_story(story: Story, frames: int, fps: float) -> None:
    """Refuse a scene of which a video of so many frames shows nothing. Raises UserError."""
    for number, (second, _) in enumerate(story, 1):
        if math.ceil(second * fps - 1e-6) >= frames:  # its first frame, as `story.latent_at` counts
            raise UserError(
                f"entry {number}: at: {second:g} s is beyond the end of the video, which has {frames / fps:g} s;"
                " begin it earlier, or make the video longer"
            )


def check_requests(generator: Generator, requests: Sequence[Request], settings: Settings) -> None:
    """Refuse texts and sounds that a generator cannot be led by, before any video is made.

    Raises:
        UserError: the model takes no prompts, or not these, or no sound; a negative prompt without guidance away from it.
    """
    if "audio" not in generator.accepts and any(request.sound is not None for request in requests):
        raise UserError("audio: this model takes none; leave it out")
    negatives = [request.negative for request in requests if request.negative is not None]
    prompts = [scene.prompt for request in requests for _, scene in request.story if scene.prompt is not None]
    if not prompts and not negatives:
        return
    if "prompt" not in generator.accepts:
        raise UserError("prompt: this model takes none; leave it out")
    name, strength = "guidance", parts_of(settings.guidance).text
    if "negative_guidance" in generator.accepts:
        name, strength = "negative_guidance", settings.negative_guidance
    if negatives and strength <= 1:
        raise UserError(f"negative: {name} leads away from it, and is {strength:g}; set {name} above 1, such as 4")
    generator.check_prompts(list(dict.fromkeys(prompts + negatives)))


def seconds_of(text: Any) -> float:
    """Parse `3.2s`, `3.2` or 3.2. ValueError for anything else."""
    try:
        seconds = float(str(text).strip().removesuffix("s"))
    except ValueError:
        seconds = math.nan
    if isinstance(text, bool) or not 0 <= seconds < math.inf:
        raise ValueError(f"{str(text)[:40]!r} is no time; write seconds, such as 3.2s")
    return seconds
