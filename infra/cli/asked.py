"""What `longtake generate` and `longtake infill` are asked for, read from its options; a mistake is one line that names the option."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from longtake.datasets.errors import UserError
from longtake.infra.cli import media
from longtake.infra.cli.jobs import Job, text_of

_LEADS = {  # what guidance leads to, by its parts
    "classes": ("class", "--class"),
    "text": ("prompt", "--prompt"),
    "audio": ("sound", "--audio"),
}


@contextmanager
def naming(option: str, path: str = "") -> Iterator[None]:
    """Put the name of the option before errors that it causes, and that of its file, if they do not begin with it."""
    try:
        yield
    except (UserError, ValueError) as e:
        message = str(e) if not path or str(e).startswith(f"{path}: ") else f"{path}: {e}"
        raise UserError(f"{option}: {message}" if option else message) from e


def guidance_of(text: str, asked: Mapping[str, bool]) -> Any:
    """The guidance of an option's text. UserError where it leads to what is not asked for."""
    from longtake.training.models.common import guidance

    with naming("--guidance"):
        strength = guidance.guidance_of(text)
    if isinstance(strength, float) and any(asked.values()):
        return strength  # of what is asked for
    parts = asdict(guidance.parts_of(strength))
    if idle := [part for part, much in parts.items() if much != 1.0 and not asked[part]]:
        nouns, options = zip(*(_LEADS[part] for part in idle), strict=True)
        raise UserError(f"--guidance: leads towards a {' or a '.join(nouns)}; name one with {' or '.join(options)}")
    return strength


def infill_settings_of(infiller: Any, options: Mapping[str, Any]) -> Any:
    """An infiller's settings with the options that are not None."""
    from longtake.training.models.generator import with_changes

    try:
        return with_changes(infiller.settings, {name: value for name, value in options.items() if value is not None})
    except ValueError as e:
        raise UserError(f"--{e}") from e


def start_of(path: str, generator: Any) -> Any:
    """The video that is continued."""
    with naming("--start", path):
        return generator.begin(media.frames_at(path, generator.size, generator.fps))


def movement_of(path: str, generator: Any) -> Any:
    """The movement of a video."""
    with naming("--movement", path):
        return generator.movement(media.frames_at(path, generator.size, generator.fps))


def sound_of(path: str, seconds: float) -> Any:
    """The sound of a file for a video of so many seconds."""
    from longtake.training.models.generator import Sound

    with naming("--audio"):
        return Sound(*media.sound_of(path, seconds))


def storyboard_of(path: str, generator: Any, frames: int, fps: float) -> Any:
    """The story of a file, for videos of so many frames."""
    from longtake.infra import yaml_text
    from longtake.training.models.generator import check_story, story_of

    content = yaml_text.parse(text_of("--storyboard", path), f"--storyboard: {path}")
    with naming("--storyboard", path):
        story = story_of(content, generator.classes)
        if "prompt" not in generator.accepts and any(scene.prompt is not None for _, scene in story):
            raise UserError("prompt: this model takes none; leave it out")
        check_story(story, frames, fps)
        return story


def requests_of(
    generator: Any,
    settings: Any,
    jobs: Sequence[Job],
    words: Sequence[str],
    story: Any,
    negative: str | None,
    sound: Any,
    moves: Sequence[Any],
) -> list[Any]:
    """The requests of all jobs, checked before any video is made. Story, sound and movement are those of them all."""
    from longtake.training.models.generator import Request, check_requests, scene_of

    def scene(job: Job) -> Any:
        return scene_of(job.name, None if job.prompt is None else words[job.prompt], generator.classes)

    requests = [Request(job.seed, story or [(0.0, scene(job))], negative, sound, moves) for job in jobs]
    check_requests(generator, requests, settings)
    return requests
