"""`longtake generate`: videos of a registered prior."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import click

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.infra.cli import media

_MOST_AT_ONCE = 64  # videos in a grid, which are all decoded side by side

Job = tuple[int, str | None]  # a seed, and a class by name or number


@click.command()
@click.argument("model")
@click.option(
    "--frames",
    type=int,
    metavar="N",
    help="Of each video, 1 + 4n; longer than the model's window is fine. [default: its window]",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    metavar="S",
    help="In place of --frames: as many as last so long.",
)
@click.option("--class", "classes", multiple=True, metavar="C", help="Class by name or number. Repeat it for several.")
@click.option(
    "--start",
    metavar="FILE",
    help="Go on from the end of this video, which is no part of the result. For models with a memory.",
)
@click.option(
    "--storyboard",
    metavar="FILE.yaml",
    help="What is to be seen when: a list of {at: 3.5s, class: C}. For models with a memory.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="The first video's.")
@click.option(
    "--count", type=click.IntRange(min=1), metavar="K", help="Videos, of the seeds from --seed on. [default: 1]"
)
@click.option("--seeds", metavar="A,B,...", help="These seeds, such as 0,7,40-47, in place of --seed and --count.")
@click.option(
    "--out",
    required=True,
    metavar="FILE.mp4",
    help="Where to write. Several videos get their seed (and class) in the name.",
)
@click.option("--grid", is_flag=True, help="All videos side by side in one file.")
@click.option(
    "--guidance", type=click.FloatRange(min=0), metavar="G", help="Towards the class; 1 is none. [default: the model's]"
)
@click.option(
    "--history-noise",
    type=click.FloatRange(min=0, max=1, max_open=True),
    metavar="L",
    help="Level of noise that a model with a memory is given its past with, of those that it has learned. [default: the model's]",
)
@click.option(
    "--steps", type=click.IntRange(min=1), metavar="S", help="Euler steps of a window. [default: the model's]"
)
@click.option(
    "--fps",
    type=click.FloatRange(min=0, min_open=True),
    metavar="F",
    help="Of the file. [default: of the training clips]",
)
@click.option("--vae", metavar="MODEL", help="Decode by this autoencoder, of the same encoder. [default: the model's]")
@click.option(
    "--batch",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Videos at once: faster on a GPU, more memory; their last bits may differ.",
)
@media.tile_option
@media.precision_option
def generate(
    model: str,
    frames: int | None,
    seconds: float | None,
    classes: tuple[str, ...],
    start: str | None,
    storyboard: str | None,
    seed: int,
    count: int | None,
    seeds: str | None,
    out: str,
    grid: bool,
    guidance: float | None,
    history_noise: float | None,
    steps: int | None,
    fps: float | None,
    vae: str | None,
    batch: int,
    tile: int | None,
    precision: str,
) -> None:
    """Generate videos by MODEL, a prior of the registry (models:/latte@champion) or a model folder.

    The same model, seed and options give the same file. The registry is the one that MLFLOW_TRACKING_URI names. A model
    with a memory keeps what it has made in FILE.mp4.part until the file is whole: stopped, the same command goes on.

    \b
    Examples:
      export MLFLOW_TRACKING_URI=sqlite:///runs/quickstart/mlflow.db
      longtake generate models:/latte@champion --out x.mp4
      longtake generate models:/latte@champion --frames 97 --seed 7 --out long.mp4
      longtake generate models:/latte@champion --class dog --guidance 4 --count 9 --grid --out dogs.mp4
      longtake generate models:/memory-dit@champion --seconds 60 --start clip.mp4 --storyboard story.yaml --out x.mp4
    """
    chosen = _seeds(seed, count, seeds)
    media.check_output(out)
    jobs = [(s, c) for c in classes or (None,) for s in chosen]
    if len(set(jobs)) < len(jobs):
        raise UserError("--seeds, --class: the same video is asked for twice")
    if grid and len(jobs) > _MOST_AT_ONCE:
        raise UserError(f"--grid: {len(jobs)} videos, but at most {_MOST_AT_ONCE} fit; lower --count")
    if frames is not None and seconds is not None:
        raise UserError("--frames and --seconds: give one of them")
    if classes and storyboard:
        raise UserError("--class and --storyboard: give one of them")
    if guidance not in (None, 1.0) and not (classes or storyboard):
        raise UserError("--guidance: leads towards a class; name one with --class")
    if start:
        media.check_there(start)
    with media.models("lower --batch or --count, or set --tile 256"):
        generator = _loaded(model, vae, precision)
        asked = {"start": start, "storyboard": storyboard, "history_noise": history_noise}
        for name, value in asked.items():
            if value and name not in generator.accepts:
                raise UserError(f"--{name.replace('_', '-')}: {model} takes none, having no memory; leave it out")
        film = _film(generator, frames, seconds, fps, start, {"guidance": guidance, "steps": steps} | asked)
        story = _storyboard(storyboard, generator.classes) if storyboard else None
        groups = [jobs[n : n + batch] for n in range(0, len(jobs), batch)]
        videos = partial(_videos, film, groups, story, tile, f"{out}.part")
        for name in _written(film, videos, groups, out, grid, len(chosen) > 1, len(classes) > 1):
            click.echo(name)
        generator.forget(f"{out}.part")


class Film(NamedTuple):
    """How each video is made: by what, with how many frames at which rate, after what, and in how many steps."""

    generator: Any
    settings: Any
    frames: int
    fps: float
    start: Any
    rounds: int


def _loaded(model: str, vae: str | None, precision: str) -> Any:
    """The generator of a registered model or model folder. Raises UserError where it generates nothing."""
    from longtake.training import registry
    from longtake.training.models import kind_of

    uri = media.known(model)
    module, facts = registry.load_with_facts(uri)
    kind = kind_of(facts)
    if kind.generator is None:
        raise UserError(
            f"{model}: is a {kind.what}, which generates no videos; name a prior, such as of `finetune_latte`"
        )
    return kind.generator(model, module, facts, media.known(vae) if vae else None, media.dtype(precision))


def _film(
    generator: Any,
    frames: int | None,
    seconds: float | None,
    fps: float | None,
    start: str | None,
    asked: Mapping[str, Any],
) -> Film:
    """What is asked for, completed by what the model was registered with."""
    known = vars(generator.settings)
    settings = replace(generator.settings, **{n: v for n, v in asked.items() if v is not None and n in known})
    rate, begun = fps or generator.fps, None
    if start:
        with _named_by(f"--start: {start}"):
            begun = generator.begin(media.frames_at(start, generator.size, generator.fps))
    if frames is None and seconds is None and begun is None:
        frames = generator.frames
    if frames is None:
        frames = generator.frames_of_seconds(seconds or generator.frames / rate, rate, begun)
    with _named_by("--frames"):
        rounds = generator.rounds(frames, settings, begun)
    return Film(generator, settings, frames, rate, begun, rounds)


def _videos(
    film: Film,
    groups: Sequence[Sequence[Job]],
    story: list[tuple[float, int]] | None,
    tile: int | None,
    folder: str,
    number: int,
    each_step: Callable[[], Any],
) -> Iterator[Any]:
    """The videos of group `number`, side by side, in chunks."""
    from longtake.training.models.generator import Request, class_id

    classes = film.generator.classes
    requests = [Request(seed, story or [(0.0, class_id(name, classes))]) for seed, name in groups[number]]
    with _named_by(""):
        yield from film.generator.videos(
            requests,
            film.frames,
            film.settings,
            fps=film.fps,
            start=film.start,
            folder=f"{folder}/{number}",
            tile=tile,
            each_step=each_step,
        )


def _written(
    film: Film,
    videos: Callable[[int, Callable[[], Any]], Iterator[Any]],
    groups: Sequence[Sequence[Job]],
    out: str,
    grid: bool,
    by_seed: bool,
    by_class: bool,
) -> list[str]:
    """The files, once all are whole."""
    import numpy as np

    from longtake.training.models.common import video

    written = []
    storage.sweep(out.rpartition("/")[0] or ".")  # of what a killed run has begun
    with media.progress("generate", film.rounds * len(groups), "step") as bar:
        if grid:
            with video.video_file(out, film.fps) as write:
                for chunks in zip(*(videos(number, bar.update) for number in range(len(groups))), strict=True):
                    write(video.grid(np.concatenate(chunks)))
            return [out]
        for number, group in enumerate(groups):
            names = [_named(out, s, c, by_seed, by_class) for s, c in group]
            with ExitStack() as files:
                writers = [files.enter_context(video.video_file(name, film.fps)) for name in names]
                for chunk in videos(number, bar.update):
                    for write, frames in zip(writers, chunk, strict=True):
                        write(frames)
            written += names
    return written


@contextmanager
def _named_by(what: str) -> Iterator[None]:
    """Errors of what was asked for, with the option that asked for it."""
    try:
        yield
    except (UserError, ValueError) as e:
        raise UserError(f"{what}: {e}" if what else str(e)) from e


def _storyboard(path: str, classes: Sequence[str]) -> list[tuple[float, int]]:
    from longtake.infra import yaml_text
    from longtake.training.models.generator import story_of

    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as e:
        raise UserError(f"--storyboard: {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--storyboard: {path}: not a text file") from e
    given = yaml_text.parse(text, f"--storyboard: {path}")
    with _named_by(f"--storyboard: {path}"):
        return story_of(given, classes)


def _seeds(first: int, count: int | None, given: str | None) -> list[int]:
    """The seeds that are asked for, in order."""
    if given is None:
        return list(range(first, first + (count or 1)))
    if count is not None:
        raise UserError("--seeds and --count: give one of them")
    seeds: list[int] = []
    for part in given.split(","):
        low, dash, high = part.strip().partition("-")
        if not low.isdecimal() or (dash and (not high.isdecimal() or int(high) < int(low))):
            raise UserError(f"--seeds: {part.strip()!r} is no seed; write numbers and ranges, such as 0,7,40-47")
        seeds += range(int(low), int(high or low) + 1)
    return seeds


def _named(out: str, seed: int, name: str | None, by_seed: bool, by_class: bool) -> str:
    """`out` with what tells one of several videos from the others in front of its suffix."""
    parts = [str(name).replace("/", "_")] * by_class + [f"seed{seed}"] * by_seed
    return "-".join([out.removesuffix(".mp4"), *parts]) + ".mp4"
