"""`longtake infill`: the frames between clips, and in place of those where the clips of a film meet."""

from collections.abc import Iterator, Mapping, Sequence
from itertools import chain, islice, pairwise
from typing import Any

import click

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.infra.cli import asked, media

_AT_ONCE = 64  # gaps that are in memory with the frames beside them
_DIGITS = 12  # of the number of a frame


@click.command()
@click.argument("model")
@click.argument("clips", nargs=-1, required=True)
@click.option("--frames", type=click.IntRange(min=1), metavar="N", help="Frames to make between two clips.")
@click.option(
    "--connector",
    type=click.IntRange(min=1),
    metavar="K",
    help="Make them in place of the last K frames of each clip and the first K of the next; --frames is then 2K if left out.",
)
@click.option(
    "--smooth",
    type=click.IntRange(min=1),
    metavar="K",
    help="Remake K frames on both sides of each joint of one film: those that are written in it, or --joints.",
)
@click.option(
    "--joints",
    metavar="A,B,...",
    help="Where the clips of that film meet: the numbers of their first frames, such as 16,28,41. 16,28,... goes on every"
    " 12 frames to the end. [default: as `longtake generate` has written it in the film]",
)
@click.option("--out", required=True, metavar="FILE.mp4", help="Where to write the whole film.")
@click.option("--prompt", metavar="TEXT", help="What is to be seen in between. Where the model takes one.")
@click.option("--negative", metavar="TEXT", help="What is not to be seen: guidance, above 1, leads away from it.")
@click.option(
    "--text-encoder",
    metavar="FOLDER",
    help="Where the model's text encoder is: a folder, or models:/NAME@ALIAS. [default: where it was in training]",
)
@click.option(
    "--image-encoder",
    metavar="PATH",
    help="Where the network is that sees the frames beside the gap: a folder, a file, or models:/NAME@ALIAS."
    " [default: where it was in training]",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of what is drawn.")
@click.option("--steps", type=click.IntRange(min=1), metavar="S", help="Euler steps. [default: the model's]")
@click.option(
    "--guidance", type=media.Number(min=0), metavar="G", help="Towards the prompt; 1 is none. [default: the model's]"
)
@click.option(
    "--image-guidance",
    type=media.Number(min=0),
    metavar="G",
    help="Towards the frames beside the gap; 1 is none. [default: the model's]",
)
@click.option(
    "--mixer",
    type=click.Choice(["none", "paper", "per_frame"]),
    help="What a gap begins from: noise, or noise with low frequencies of the frames beside it. [default: the model's]",
)
@click.option(
    "--noise",
    type=click.Choice(["same", "fresh"]),
    help="The noise of the high frequencies, with a mixer. [default: the model's]",
)
@click.option(
    "--cutoff",
    type=media.Number(min=0, min_open=True),
    metavar="F",
    help="The low frequencies beside the clips, with a mixer: 1 is the highest there is. [default: the model's]",
)
@click.option(
    "--fall",
    type=media.Number(min=0),
    metavar="F",
    help="By how much --cutoff falls with each latent further into the gap, with a mixer. [default: the model's]",
)
@click.option(
    "--vae", metavar="MODEL", help="Decode with this autoencoder, of the same encoder. [default: the model's]"
)
@click.option(
    "--batch", type=click.IntRange(min=1), default=1, show_default=True, help="Gaps at once: faster on a GPU."
)
@media.precision_option
def infill(
    model: str,
    clips: tuple[str, ...],
    frames: int | None,
    connector: int | None,
    smooth: int | None,
    joints: str | None,
    out: str,
    prompt: str | None,
    negative: str | None,
    text_encoder: str | None,
    image_encoder: str | None,
    seed: int,
    steps: int | None,
    guidance: float | None,
    image_guidance: float | None,
    mixer: str | None,
    noise: str | None,
    cutoff: float | None,
    fall: float | None,
    vae: str | None,
    batch: int,
    precision: str,
) -> None:
    """Join CLIPS into one film: MODEL makes the frames between them.

    MODEL is one that fills gaps, in the registry (models:/mavin@champion) or a model folder. Clips are converted to the
    frame rate and size of its training clips, and keep all of their frames; two or more are joined in order. With
    --connector the ends that meet are remade. With --smooth there is one clip, a film of any model, whose joints are
    remade; one of `longtake generate` says itself where they are. Sound is left out. Finished gaps are kept in
    FILE.mp4.part until the file is whole, so that after a stop the same command continues.

    \b
    Examples:
      export MLFLOW_TRACKING_URI=sqlite:///runs/mavin_tiny/mlflow.db
      longtake infill models:/mavin@champion a.mp4 b.mp4 --frames 12 --out joined.mp4
      longtake infill models:/mavin@champion a.mp4 b.mp4 c.mp4 --frames 8 --seed 7 --out film.mp4
      longtake infill models:/mavin@champion a.mp4 b.mp4 --connector 6 --out joined.mp4
      longtake infill models:/mavin@champion film.mp4 --smooth 4 --joints 16,28,... --out smooth.mp4
      longtake infill models:/mavin@champion film.mp4 --smooth 4 --out smooth.mp4    # made by `longtake generate`
    """
    media.check_output(out)
    _check_way(clips, frames, connector, smooth, joints)
    for path in clips:
        media.check_exists(path)
    media.check_apart(out, clips)
    written = media.joints_of(clips[0]) if smooth and not joints else []
    if smooth and not joints and not written:
        raise UserError(
            f"{clips[0]}: has no joints written in it; say where its clips meet, such as --joints 16,28,..."
        )
    with media.memory_errors("lower --batch, or set --precision bf16"):
        from longtake.training.models.common import film, video

        infiller = _load_infiller(model, vae, precision, text_encoder, image_encoder)
        numbers = {"steps": steps, "guidance": guidance, "image_guidance": image_guidance}
        mixed = {"mixer": mixer, "noise": noise, "cutoff": cutoff, "fall": fall}
        settings = asked.infill_settings_of(infiller, numbers | mixed)
        _check_texts(model, infiller, prompt, negative, guidance, settings.guidance)
        lengths = [_count(path, infiller) for path in clips]
        if smooth:
            last, speed = lengths[0] - smooth - infiller.context[0], infiller.fps / media.rate_of(clips[0])
            if joints:
                places = _joints(joints, lengths[0], last, speed)
            else:
                places = _written(clips[0], written, smooth, lengths[0], infiller.context[0], speed)
            at_rate = "" if abs(speed - 1) < 0.001 else f" at {infiller.fps:g} frames a second"
            with asked.naming(f"--joints{at_rate}"):
                holes = film.smoothing(places, smooth)
        else:
            cut = connector or 0
            _check_lengths(clips, lengths, cut, infiller)
            holes = film.connecting(lengths, cut, frames or 2 * cut)
        if (most := max(hole.frames for hole in holes)) > infiller.longest:
            click.echo(
                f"a gap of {most} frames: the longest in the model's training had {infiller.longest}; expect less of it",
                err=True,
            )
        with asked.naming(""), media.progress("infill", settings.steps * len(holes), "step") as bar:
            film.check_room(holes, sum(lengths), infiller.context[0])
            gaps = film.gaps_in(_film(clips, infiller), holes, infiller.context[1], prompt)
            kept = f"{out}.part"
            more = {"negative": negative, "batch": batch, "each_step": bar.update}
            made = _filled(infiller, gaps, max(_AT_ONCE, batch), kept, seed, settings, more)
            storage.sweep(out.rpartition("/")[0] or ".")  # removes the partial files of a killed run
            with video.video_file(out, infiller.fps) as write:
                for frame in film.filled(_film(clips, infiller), holes, made):
                    write(frame[None])
        click.echo(out)
        infiller.forget(kept)


def _check_way(
    clips: Sequence[str], frames: int | None, connector: int | None, smooth: int | None, joints: str | None
) -> None:
    """Refuse options that do not fit together: UserError."""
    if smooth:
        if len(clips) > 1:
            raise UserError(f"--smooth: takes one film, and there are {len(clips)}; join them first")
        if frames or connector:
            raise UserError("--smooth: remakes as many frames as there are; leave --frames and --connector out")
        return
    if joints:
        raise UserError(
            "--joints: are of a film whose joints are remade; say of how many frames with --smooth, such as 4"
        )
    if len(clips) < 2:
        raise UserError(f"{clips[0]}: is one clip; name two or more to join, or set --smooth for the joints of a film")
    if not frames and not connector:
        raise UserError("--frames: say how many to make between two clips, such as 12")


def _load_infiller(
    model: str, vae: str | None, precision: str, text_encoder: str | None, image_encoder: str | None
) -> Any:
    """The infiller of a registered model or model folder. Raises UserError if the model fills no gaps."""
    from longtake.training import registry
    from longtake.training.models import kind_of
    from longtake.training.models.common.pictures import with_image_encoder
    from longtake.training.models.common.prompts import with_encoder

    uri = media.check_registry(model)
    module, facts = registry.load_with_facts(uri)
    kind = kind_of(facts)
    if kind.infiller is None:
        raise UserError(f"{model}: is a {kind.what}, which fills no gaps; name a model of `finetune_mavin`")
    if text_encoder and not facts.get("text"):
        raise UserError(f"--text-encoder: {model} takes none; leave it out")
    if image_encoder and not facts.get("image"):
        raise UserError(f"--image-encoder: {model} takes none; leave it out")
    there = with_encoder(with_image_encoder(facts, image_encoder), text_encoder)
    decoder = media.check_registry(vae) if vae else None
    return kind.infiller(model, module, there, decoder, media.dtype(precision))


def _check_texts(
    model: str, infiller: Any, prompt: str | None, negative: str | None, guidance: float | None, strength: float
) -> None:
    """Refuse texts, and an option for guidance, that have no effect: UserError. Without the option, `strength` is the model's."""
    words = {"--prompt": prompt, "--negative": negative}
    for option, text in words.items():
        if text is not None and not infiller.takes_prompts:
            raise UserError(f"{option}: {model} takes none; leave it out")
    if guidance not in (None, 1) and prompt is None and negative is None:
        raise UserError("--guidance: leads towards a prompt; name one with --prompt, or leave it out")
    if negative is not None and strength <= 1:
        raise UserError(
            f"--negative: guidance leads away from it, and is {strength:g}; set --guidance above 1, such as 4"
        )
    if texts := [text for text in words.values() if text is not None]:
        infiller.check_prompts(texts)


def _count(path: str, infiller: Any) -> int:
    """The frames of a clip at the model's rate. Says what of it is converted."""
    media.say_rate(path, infiller.fps)
    return sum(1 for _ in media.frames_at(path, infiller.size, infiller.fps))


def _filled(
    infiller: Any, gaps: Iterator[Any], some: int, kept: str, seed: int, settings: Any, more: Mapping[str, Any]
) -> Iterator[Any]:
    """The frames of each gap. So many gaps at once are in memory, and are kept in a subfolder of `kept` of their own."""
    number = 0
    while group := list(islice(gaps, some)):
        yield from infiller.fill(group, seed, settings, first=number * some, folder=f"{kept}/{number}", **more)
        number += 1


def _film(clips: Sequence[str], infiller: Any) -> Iterator[Any]:
    """The frames of all clips, one after the other."""
    return chain.from_iterable(media.frames_at(path, infiller.size, infiller.fps, silent=True) for path in clips)


def _check_lengths(clips: Sequence[str], lengths: Sequence[int], cut: int, infiller: Any) -> None:
    """Refuse a clip that is too short to be seen beside its gaps: UserError."""
    least = infiller.context[0]
    for number, (path, length) in enumerate(zip(clips, lengths, strict=True)):
        remade = cut * (1 if number in (0, len(clips) - 1) else 2)
        if length - remade < least:
            of = f", of which {remade} are remade" if remade else ""
            raise UserError(
                f"{path}: has {length} frames at {infiller.fps:g} a second{of}; the model needs {least} beside a gap"
            )


def _written(path: str, joints: Sequence[int], reach: int, frames: int, least: int, speed: float) -> list[int]:
    """Those of a film's own joints that can be remade, for a film of so many frames; `speed` as in `_joints`."""
    from longtake.training.models.common import film

    places = [round(joint * speed) for joint in joints]
    if places[-1] > frames:
        raise UserError(
            f"{path}: the joints written in it go beyond its end; say where its clips meet, such as --joints 16,28,..."
        )
    kept = film.reachable(places, reach, frames, least)
    if not kept:
        raise UserError(
            f"--smooth: {path}: no joint has {reach + least} frames on both sides to itself; remake fewer frames"
        )
    if left := len(places) - len(kept):
        click.echo(
            f"{path}: {left} of {len(places)} joints are too near to an end or to the joint before, and stay as they are",
            err=True,
        )
    return kept


def _joints(text: str, frames: int, last: int, speed: float) -> list[int]:
    """The joints of an option for a film of so many frames, of which the model has `speed` for one of the film's own.

    Those that go on to the end do so up to the `last` one that can be remade.
    """
    words = [word.strip() for word in text.split(",")]
    goes_on = words[-1] == "..."
    numbers = [int(word) if word.isdecimal() and len(word) <= _DIGITS else 0 for word in words[: len(words) - goes_on]]
    if not all(numbers) or len(numbers) < 1 + goes_on:
        raise UserError(f"--joints: {text[:40]!r}: write numbers of frames, such as 16,28,41, or 16,28,...")
    for number, later in pairwise(numbers):
        if later <= number:
            raise UserError(f"--joints: joints {number}, {later}: each must be above the one before")
    found = [round(number * speed) for number in numbers]
    if found[-1] >= frames:
        raise UserError(f"--joints: {numbers[-1]} is beyond the film, which has {frames} frames for the model")
    while goes_on:
        numbers.append(2 * numbers[-1] - numbers[-2])
        joint = round(numbers[-1] * speed)
        if joint > last:
            if joint < frames:
                click.echo(f"--joints: {numbers[-1]} is too near to the film's end, and stays as it is", err=True)
            break
        found.append(joint)
    return found
