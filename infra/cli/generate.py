"""`longtake generate`: videos of a registered prior."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
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
        from longtake.training import registry

        found = registry.load_with_facts(media.known(model))
        numbers = {"dtype": media.dtype(precision), "vae": media.known(vae) if vae else None}
        asked = {"guidance": guidance, "steps": steps, "history_noise": history_noise}
        changes = {name: value for name, value in asked.items() if value is not None}
        wanted = Wanted(model, frames, seconds, fps, tile, changes, start, storyboard, out)
        maker = (_with_memory if found[1]["model"] == "memory_dit" else _with_windows)(wanted, found, numbers)
        groups = [jobs[n : n + batch] for n in range(0, len(jobs), batch)]
        for name in _written(maker, groups, out, grid, len(chosen) > 1, len(classes) > 1):
            click.echo(name)
        maker.done()


class Wanted(NamedTuple):
    """What is asked for of every video."""

    model: str
    frames: int | None
    seconds: float | None
    fps: float | None
    tile: int | None
    settings: dict[str, Any]  # what of the model's is to change
    start: str | None
    storyboard: str | None
    out: str


class Maker(NamedTuple):
    """How a model makes the videos of a group of jobs, side by side.

    `videos` takes the group's number, the group and what is called after each step, of which a group has `rounds`.
    """

    fps: float
    rounds: int
    videos: Callable[[int, Sequence[Job], Callable[[], Any]], Iterator[Any]]
    done: Callable[[], None]


def _with_windows(wanted: Wanted, found: tuple[Any, dict[str, Any]], numbers: dict[str, Any]) -> Maker:
    """Of a Latte, which goes on from the end of each window."""
    from longtake.training.models.common import sampling

    prior = sampling.prior_of(wanted.model, *found, **numbers)
    for option in ("start", "storyboard"):
        if getattr(wanted, option):
            raise UserError(
                f"--{option}: {wanted.model} is a Latte, which has no memory; name a `finetune_memory_prior` model"
            )
    if wanted.settings.get("history_noise"):
        raise UserError(f"--history-noise: {wanted.model} is a Latte, which has no memory; leave it out")
    settings, rate = replace(prior.settings, **wanted.settings), wanted.fps or prior.fps
    length = prior.frames if wanted.frames is None else wanted.frames
    if wanted.seconds is not None:
        length = sampling.frames_of_seconds(wanted.seconds, rate, prior.vae)
    with _named_by("--frames"):
        rounds = sampling.rounds(prior, length, settings)

    def videos(_: int, group: Sequence[Job], each_step: Callable[[], Any]) -> Iterator[Any]:
        seeds, ids = [s for s, _ in group], [prior.class_id(c) for _, c in group]
        return sampling.generate_videos(
            prior.latte, prior.vae, length, seeds, ids, settings, tile=wanted.tile, each_step=each_step
        )

    return Maker(rate, rounds, videos, lambda: None)


def _with_memory(wanted: Wanted, found: tuple[Any, dict[str, Any]], numbers: dict[str, Any]) -> Maker:
    """Of a model with a memory, segment by segment."""
    from longtake.training.models.memory import prior as recall
    from longtake.training.models.memory import segments

    prior = recall.prior_of(wanted.model, *found, "generation", **numbers)
    settings, rate = replace(prior.settings, **wanted.settings), wanted.fps or prior.fps
    story = _storyboard(wanted.storyboard, prior) if wanted.storyboard else None
    start = None
    if wanted.start:
        with _named_by(f"--start: {wanted.start}"):
            start = prior.start(media.frames_at(wanted.start, prior.size, prior.fps))
    goes_on = start is not None
    length = wanted.frames
    if length is None:
        length = prior.frames_of_seconds(wanted.seconds or prior.frames / rate, rate, goes_on)
    with _named_by("--frames"):
        rounds = segments.segments(prior.model, prior.steps(length, goes_on)) * settings.steps
    folder = f"{wanted.out}.part"

    def videos(number: int, group: Sequence[Job], each_step: Callable[[], Any]) -> Iterator[Any]:
        ids = [prior.class_id(c) for _, c in group]
        return recall.generate_videos(
            prior,
            length,
            [s for s, _ in group],
            [(0.0, ids)] if story is None else [(at, [c] * len(group)) for at, c in story],
            settings,
            fps=rate,
            start=start,
            folder=f"{folder}/{number}",
            tile=wanted.tile,
            each_step=each_step,
        )

    return Maker(rate, rounds, videos, lambda: segments.forget(folder))


def _written(
    maker: Maker, groups: Sequence[Sequence[Job]], out: str, grid: bool, by_seed: bool, by_class: bool
) -> list[str]:
    """The files, once all are whole."""
    import numpy as np

    from longtake.training.models.common import sampling

    made = []
    storage.sweep(out.rpartition("/")[0] or ".")  # of what a killed run has begun
    with media.progress("generate", maker.rounds * len(groups), "step") as bar:

        def videos(number: int) -> Iterator[Any]:
            with _named_by(""):
                yield from maker.videos(number, groups[number], bar.update)

        if grid:
            with sampling.video_file(out, maker.fps) as write:
                for chunks in zip(*map(videos, range(len(groups))), strict=True):
                    write(sampling.grid(np.concatenate(chunks)))
            return [out]
        for number, group in enumerate(groups):
            names = [_named(out, s, c, by_seed, by_class) for s, c in group]
            with ExitStack() as files:
                writers = [files.enter_context(sampling.video_file(name, maker.fps)) for name in names]
                for chunk in videos(number):
                    for write, frames_of_one in zip(writers, chunk, strict=True):
                        write(frames_of_one)
            made += names
    return made


@contextmanager
def _named_by(what: str) -> Iterator[None]:
    """Errors of what was asked for, with the option that asked for it."""
    try:
        yield
    except (UserError, ValueError) as e:
        raise UserError(f"{what}: {e}" if what else str(e)) from e


def _storyboard(path: str, prior: Any) -> list[tuple[float, int]]:
    from longtake.infra import yaml_text
    from longtake.training.models.memory import prior as recall

    try:
        text = Path(path).read_text("utf-8-sig")
    except OSError as e:
        raise UserError(f"--storyboard: {path}: {e.strerror}") from e
    except UnicodeDecodeError as e:
        raise UserError(f"--storyboard: {path}: not a text file") from e
    given = yaml_text.parse(text, f"--storyboard: {path}")
    with _named_by(f"--storyboard: {path}"):
        return recall.story_of(given, prior)


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
