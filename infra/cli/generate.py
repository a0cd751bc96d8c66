"""`longtake generate`: videos of a registered prior."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import click

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.infra.cli import asked, media
from longtake.infra.cli.jobs import Job, file_names, prompts_in, seeds_of

_MOST_AT_ONCE = 64  # videos in a grid, which are all decoded side by side


@click.command()
@click.argument("model")
@click.option(
    "--frames",
    type=int,
    metavar="N",
    help="Length of each video, longer than a window too: any for models of pixels or that join clips; 4n for those of tokens,"
    " and for models of latents after --start; else 1 + 4n (LTX: 8n, 1 + 8n). [default: a window]",
)
@click.option(
    "--seconds",
    type=media.Number(min=0, max=1_000_000, min_open=True),
    metavar="S",
    help="Length in seconds, in place of --frames.",
)
@click.option("--class", "classes", multiple=True, metavar="C", help="Class by name or number. Repeat it for several.")
@click.option(
    "--prompt",
    "prompts",
    multiple=True,
    metavar="TEXT",
    help="What is to be seen, in words. Repeat it for several. Where the model takes one.",
)
@click.option("--prompts", "prompts_file", metavar="FILE.txt", help="More prompts, one a line; empty lines are none.")
@click.option(
    "--negative",
    metavar="TEXT",
    help="What is not to be seen: guidance, which must be above 1, leads away from it. With HunyuanVideo --negative-guidance"
    " does.",
)
@click.option(
    "--text-encoder",
    metavar="FOLDER",
    help="Where the model's text encoder is: a folder, or models:/NAME@ALIAS. [default: where it was in training]",
)
@click.option(
    "--start",
    metavar="FILE",
    help="Continue this video, or this image; it is no part of the result. Where the model takes one.",
)
@click.option(
    "--movement",
    multiple=True,
    metavar="FILE",
    help="Move as this video does; given twice, at first as the one and in the end as the other. Where the model takes one.",
)
@click.option(
    "--content",
    type=click.Choice(["encode", "keep"]),
    help="What each further clip shows: what the frame shows that it begins from, or what the first clip does. Where the"
    " model goes on from single frames. [default: the model's]",
)
@click.option(
    "--backward",
    is_flag=True,
    help="Make what came before: the video ends where --start begins. Where the model has learned it.",
)
@click.option(
    "--storyboard",
    metavar="FILE.yaml",
    help="Classes and prompts over time: a list of {at: 3.5s, class: C, prompt: TEXT}. Where the model takes one.",
)
@click.option(
    "--audio",
    metavar="FILE",
    help="What the video is to fit: the sound of a file, from its beginning on, which is written with it. Where the model"
    " takes one.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the first video.")
@click.option(
    "--count",
    type=click.IntRange(min=1),
    metavar="K",
    help="Number of videos, with the seeds from --seed on. [default: 1]",
)
@click.option("--seeds", metavar="A,B,...", help="Seeds, such as 0,7,40-47, in place of --seed and --count.")
@click.option(
    "--out",
    required=True,
    metavar="FILE.mp4",
    help="Where to write. Several videos get their seed (prompt, class) in the name.",
)
@click.option("--grid", is_flag=True, help="All videos side by side in one file.")
@click.option(
    "--guidance",
    metavar="G",
    help="Guidance towards class, prompt and sound: 4, or classes=2,text=6,audio=2 for each its own; 1 is none."
    " [default: the model's]",
)
@click.option(
    "--history-noise",
    type=media.Number(min=0, max=1, max_open=True),
    metavar="L",
    help="Noise level of the past for a model with a memory, from the levels in its training. [default: the model's]",
)
@click.option(
    "--guidance-2",
    type=media.Number(min=0, max=1000),
    metavar="G",
    help="Guidance at low noise, for a model of two experts. [default: as --guidance]",
)
@click.option(
    "--negative-guidance",
    type=media.Number(min=1, max=1000),
    metavar="G",
    help="Guidance away from --negative, for a model that has --guidance as an input, such as HunyuanVideo; 1 is none."
    " [default: 1]",
)
@click.option(
    "--solver",
    type=click.Choice(["euler", "unipc"]),
    help="How the flow is followed: by Euler steps, or by UniPC's, of which fewer do. Where the model is a transformer of"
    " another library. [default: as its pipeline]",
)
@click.option(
    "--size",
    type=media.SIZE,
    metavar="HxW",
    help="Height and width of the frames. Where the model makes any. [default: the model's]",
)
@click.option("--steps", type=click.IntRange(min=1), metavar="S", help="Steps of a window. [default: the model's]")
@click.option(
    "--temperature",
    type=float,
    metavar="T",
    help="Of a model of tokens: below 1 likely ones are drawn more often. [default: the model's]",
)
@click.option(
    "--top-k", type=int, metavar="K", help="Draw among the K likeliest tokens; 0 is all. [default: the model's]"
)
@click.option(
    "--top-p",
    type=float,
    metavar="P",
    help="Draw among the likeliest tokens that reach this probability together; 1 is all. [default: the model's]",
)
@click.option(
    "--keep",
    type=click.IntRange(min=0),
    metavar="N",
    help="Latent frames of the past that each further window of tokens has; 0 is all that fit. [default: the model's]",
)
@click.option(
    "--fps",
    type=media.FPS,
    metavar="F",
    help="Frame rate of the file. [default: of the training clips]",
)
@click.option(
    "--vae", metavar="MODEL", help="Decode with this autoencoder, of the same encoder. [default: the model's]"
)
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
    prompts: tuple[str, ...],
    prompts_file: str | None,
    negative: str | None,
    text_encoder: str | None,
    start: str | None,
    movement: tuple[str, ...],
    content: str | None,
    backward: bool,
    storyboard: str | None,
    audio: str | None,
    seed: int,
    count: int | None,
    seeds: str | None,
    out: str,
    grid: bool,
    guidance: str | None,
    history_noise: float | None,
    guidance_2: float | None,
    negative_guidance: float | None,
    solver: str | None,
    size: tuple[int, int] | None,
    steps: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    keep: int | None,
    fps: float | None,
    vae: str | None,
    batch: int,
    tile: int | None,
    precision: str,
) -> None:
    """Generate videos with MODEL, a prior.

    MODEL is in the registry (models:/latte@champion), a model folder, or the folder of a pipeline of diffusers. The same
    model, seed and options give the same file. MLFLOW_TRACKING_URI names the registry. A model that goes on from what it
    has made keeps finished parts in FILE.mp4.part until the file is whole, so that after a stop the same command continues.
    A file that is no grid says where it went on, so that `longtake infill --smooth` can remake its joints.

    \b
    Examples:
      export MLFLOW_TRACKING_URI=sqlite:///runs/quickstart/mlflow.db
      longtake generate models:/latte@champion --out x.mp4
      longtake generate models:/latte@champion --frames 97 --seed 7 --out long.mp4
      longtake generate models:/latte@champion --class dog --guidance 4 --count 9 --grid --out dogs.mp4
      longtake generate models:/latte@champion --prompt "a dog runs left" --negative "a cat" --guidance 4 --out dog.mp4
      longtake generate models:/tats@champion --frames 256 --audio drums.wav --out drums.mp4
      longtake generate models:/memory-dit@champion --seconds 60 --start clip.mp4 --storyboard story.yaml --out x.mp4
      longtake generate models:/wan-1.3b@champion --prompt "a dog runs" --solver unipc --size 480x832 --out dog.mp4
      longtake generate models:/rencgan3@champion --seconds 60 --start clip.mp4 --movement other.mp4 --out x.mp4
    """
    all_seeds = seeds_of(seed, count, seeds)
    media.check_output(out)
    words = [*prompts, *(prompts_in(prompts_file) if prompts_file else [])]
    numbers: list[int | None] = [*range(len(words))] or [None]
    jobs = [Job(s, c, number) for number in numbers for c in classes or (None,) for s in all_seeds]
    if len(set(words)) < len(words) or len(set(jobs)) < len(jobs):
        raise UserError("--seeds, --class, --prompt: the same video is asked for twice")
    if grid and len(jobs) > _MOST_AT_ONCE:
        raise UserError(f"--grid: {len(jobs)} videos, but at most {_MOST_AT_ONCE} fit; lower --count")
    if frames is not None and seconds is not None:
        raise UserError("--frames and --seconds: give one of them")
    for option, given in (("--class", classes), ("--prompt", words)):
        if given and storyboard:
            raise UserError(f"{option} and --storyboard: give one of them")
    wanted = {"classes": bool(classes or storyboard), "text": bool(words or storyboard or negative is not None)}
    wanted |= {"audio": audio is not None}
    strength = None if guidance is None else asked.guidance_of(guidance, wanted)
    if len(movement) > 2:
        raise UserError(f"--movement: {len(movement)} videos; give one, or two to go from the one to the other")
    shown = [*([start] if start else []), *movement]
    for path in shown:
        media.check_exists(path)
    names = [out] if grid else file_names(out, jobs, words)
    for name in names:
        media.check_apart(name, [*shown, *([audio] if audio else [])])
    with media.memory_errors("lower --batch or --count, or set --tile 256"):
        generator = _load_generator(model, vae, precision, text_encoder)
        settings = {"guidance": strength, "steps": steps, "history_noise": history_noise}
        settings |= {"temperature": temperature, "top_k": top_k, "top_p": top_p, "keep": keep}
        settings |= {"content": content, "backward": backward or None, "solver": solver, "guidance_2": guidance_2}
        settings |= {"negative_guidance": negative_guidance}
        texts = {"prompt": words or None, "negative": negative}
        files = {"start": start, "movement": movement or None, "storyboard": storyboard, "audio": audio}
        for name, value in (files | settings | texts | {"size": size}).items():
            if value is not None and ("prompt" if name in texts else name) not in generator.accepts:
                raise UserError(f"--{name.replace('_', '-')}: {model} takes none; leave it out")
        if size:
            with asked.naming("--size"):
                generator = generator.sized(*size)
        plan = _plan(generator, frames, seconds, fps, start, settings)
        story = asked.storyboard_of(storyboard, generator, plan.frames, plan.fps) if storyboard else None
        sound = asked.sound_of(audio, plan.frames / plan.fps) if audio else None
        moves = [asked.movement_of(path, generator) for path in movement]
        requests = asked.requests_of(generator, plan.settings, jobs, words, story, negative, sound, moves)
        groups = [requests[n : n + batch] for n in range(0, len(jobs), batch)]
        height, width = generator.size
        what = f"{plan.frames} frames of {width}x{height} at {plan.fps:g} a second, by {plan.rounds} steps"
        click.echo(f"{model}: {what}", err=True)
        videos = partial(_videos, plan, groups, tile, f"{out}.part")
        _write(plan, videos, groups, names, grid, sound)
        for name in names:
            click.echo(name)
        generator.forget(f"{out}.part")


class Plan(NamedTuple):
    """The facts that all videos share."""

    generator: Any
    settings: Any
    frames: int
    fps: float
    start: Any  # the latents that all continue, or None
    rounds: int  # steps of a group of videos


def _load_generator(model: str, vae: str | None, precision: str, text_encoder: str | None) -> Any:
    """The generator of a registered model or model folder. Raises UserError if the model generates nothing."""
    from longtake.training import registry
    from longtake.training.models import kind_of
    from longtake.training.models.common.prompts import with_encoder

    uri = media.check_registry(model)
    module, facts = registry.load_with_facts(uri, "transformer", "first")
    kind = kind_of(facts)
    if kind.generator is None:
        raise UserError(
            f"{model}: is a {kind.what}, which generates no videos; name a prior, such as of `finetune_latte` or `pretrain_tats`"
        )
    if kind.complete:
        facts = dict(kind.complete(uri, facts))
    decoder = media.check_registry(vae) if vae else None
    if text_encoder and not facts.get("text"):
        raise UserError(f"--text-encoder: {model} takes none; leave it out")
    return kind.generator(model, module, with_encoder(facts, text_encoder), decoder, media.dtype(precision))


def _plan(
    generator: Any,
    frames: int | None,
    seconds: float | None,
    fps: float | None,
    start: str | None,
    options: Mapping[str, Any],
) -> Plan:
    """The plan of the options, those of sampling over the model's own settings."""
    settings = replace(generator.settings, **{name: value for name, value in options.items() if value is not None})
    rate, beginning = fps or generator.fps, asked.start_of(start, generator) if start else None
    if frames is None and seconds is None and beginning is None:
        frames = generator.frames
    if frames is None:
        frames = generator.frames_of_seconds(seconds or generator.frames / rate, rate, beginning)
    with asked.naming("--frames"):
        rounds = generator.rounds(frames, settings, beginning)
    return Plan(generator, settings, frames, rate, beginning, rounds)


def _videos(
    plan: Plan,
    groups: Sequence[Sequence[Any]],
    tile: int | None,
    folder: str,
    number: int,
    each_step: Callable[[], Any],
) -> Iterator[Any]:
    """The videos of group `number`, in chunks of all of them, (videos, frames, H, W, 3)."""
    with asked.naming(""):
        yield from plan.generator.videos(
            groups[number],
            plan.frames,
            plan.settings,
            fps=plan.fps,
            start=plan.start,
            folder=f"{folder}/{number}",
            tile=tile,
            each_step=each_step,
        )


def _write(
    plan: Plan,
    videos: Callable[[int, Callable[[], Any]], Iterator[Any]],
    groups: Sequence[Sequence[Any]],
    names: Sequence[str],
    grid: bool,
    sound: Any,
) -> None:
    """Write the videos of all groups, with the sound, to the files of these names, or as a grid to the only one."""
    import numpy as np

    from longtake.training.models.common import video

    storage.sweep(names[0].rpartition("/")[0] or ".")  # removes the partial files of a killed run
    joints = plan.generator.joints(plan.frames, plan.settings, plan.start)
    with media.progress("generate", plan.rounds * len(groups), "step") as bar:
        if grid:
            with video.video_file(names[0], plan.fps, sound=sound) as write:
                for chunks in zip(*(videos(number, bar.update) for number in range(len(groups))), strict=True):
                    write(video.grid(np.concatenate(chunks)))
            return
        left = iter(names)
        for number, group in enumerate(groups):
            with ExitStack() as files:
                writers = [
                    files.enter_context(video.video_file(next(left), plan.fps, sound=sound, joints=joints))
                    for _ in group
                ]
                for chunk in videos(number, bar.update):
                    for write, frames in zip(writers, chunk, strict=True):
                        write(frames)
