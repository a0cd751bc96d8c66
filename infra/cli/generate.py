"""Commands that make videos of registered models: generate, reconstruct."""

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import click

from longtake.datasets.errors import Failure, UserError

_MOST_AT_ONCE = 64  # videos in a grid, which are all decoded side by side
_precision = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the models' arithmetic.",
)
_tile = click.option(
    "--tile",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Work on larger frames in overlapping tiles of this side.",
)


@click.command()
@click.argument("model")
@click.option(
    "--frames",
    type=int,
    metavar="N",
    help="Of each video, 1 + 4n; longer than the model's window is fine. [default: its window]",
)
@click.option("--class", "classes", multiple=True, metavar="C", help="Class by name or number. Repeat it for several.")
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
@_tile
@_precision
def generate(
    model: str,
    frames: int | None,
    classes: tuple[str, ...],
    seed: int,
    count: int | None,
    seeds: str | None,
    out: str,
    grid: bool,
    guidance: float | None,
    steps: int | None,
    fps: float | None,
    vae: str | None,
    batch: int,
    tile: int | None,
    precision: str,
) -> None:
    """Generate videos by MODEL, a prior of the registry (models:/latte@champion) or a model folder.

    The same model, seed and options give the same file. The registry is the one that MLFLOW_TRACKING_URI names.

    \b
    Examples:
      export MLFLOW_TRACKING_URI=sqlite:///runs/quickstart/mlflow.db
      longtake generate models:/latte@champion --out x.mp4
      longtake generate models:/latte@champion --frames 97 --seed 7 --out long.mp4
      longtake generate models:/latte@champion --class dog --guidance 4 --count 9 --grid --out dogs.mp4
    """
    chosen = _seeds(seed, count, seeds)
    _output(out)
    jobs = [(s, c) for c in classes or (None,) for s in chosen]
    if len(set(jobs)) < len(jobs):
        raise UserError("--seeds, --class: the same video is asked for twice")
    if grid and len(jobs) > _MOST_AT_ONCE:
        raise UserError(f"--grid: {len(jobs)} videos, but at most {_MOST_AT_ONCE} fit; lower --count")
    with _models():
        from longtake.training import sampling

        prior = sampling.load_prior(_known(model), _known(vae) if vae else None, _dtype(precision))
        given = {"guidance": guidance, "steps": steps}
        settings = sampling.Settings(**vars(prior.settings) | {k: v for k, v in given.items() if v is not None})
        if guidance not in (None, 1.0) and not classes:
            raise UserError("--guidance: leads towards a class; name one with --class")
        ids = {c: prior.class_id(c) for c in {c for _, c in jobs}}
        length = frames if frames is not None else prior.frames
        try:
            each = sampling.rounds(prior, length, settings)
        except ValueError as e:
            raise UserError(f"--frames: {e}") from e
        groups = [jobs[n : n + batch] for n in range(0, len(jobs), batch)]
        with _progress("generate", each * len(groups), "step") as bar:

            def videos(group: Sequence[tuple[int, str | None]]) -> Iterator[Any]:
                numbers, asked = [s for s, _ in group], [ids[c] for _, c in group]
                try:
                    yield from sampling.generate_videos(
                        prior.latte, prior.vae, length, numbers, asked, settings, tile=tile, each_step=bar.update
                    )
                except ValueError as e:
                    raise UserError(f"{model}: {e}") from e

            made = []
            rate = fps or prior.fps
            if grid:
                import numpy as np

                with sampling.video_file(out, rate) as write:
                    for chunks in zip(*map(videos, groups), strict=True):
                        write(sampling.grid(np.concatenate(chunks)))
                made.append(out)
            else:
                for group in groups:
                    names = [_named(out, s, c, len(chosen) > 1, len(classes) > 1) for s, c in group]
                    with ExitStack() as files:
                        writers = [files.enter_context(sampling.video_file(name, rate)) for name in names]
                        for chunk in videos(group):
                            for write, frames_of_one in zip(writers, chunk, strict=True):
                                write(frames_of_one)
                    made += names
    for name in made:
        click.echo(name)


@click.command()
@click.argument("model")
@click.argument("video")
@click.option("--out", required=True, metavar="FILE.mp4", help="Where to write.")
@click.option(
    "--visible", type=int, metavar="N", help="The encoder sees the first N frames, 1 + 4n; the others are predicted."
)
@click.option("--side-by-side", is_flag=True, help="The source on the left, what the model makes of it on the right.")
@click.option(
    "--fps", type=click.FloatRange(min=0, min_open=True), metavar="F", help="Of the file. [default: the video's]"
)
@_tile
@_precision
def reconstruct(
    model: str,
    video: str,
    out: str,
    visible: int | None,
    side_by_side: bool,
    fps: float | None,
    tile: int | None,
    precision: str,
) -> None:
    """Reconstruct VIDEO, a file of any length, by MODEL: an autoencoder of the registry or a model folder.

    Frames are cropped to multiples of 16 pixels around their middle; sound is left out. An image is a video of one frame.

    \b
    Examples:
      longtake reconstruct models:/pv-vae@champion in.mp4 --out out.mp4 --side-by-side
      longtake reconstruct models:/pv-vae@champion in.mp4 --visible 9 --out predicted.mp4
    """
    _output(out)
    if not Path(video).is_file():
        raise UserError(f"{video}: no such video file")
    with _models():
        import numpy as np
        import torch

        from longtake.training import sampling

        vae = sampling.load_vae(_known(model))
        vae = vae.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"), _dtype(precision))
        source, rate, count = _frames(video, vae.config.spatial_stride)
        with _progress("reconstruct", count or None, "frame") as bar:
            try:
                with sampling.video_file(out, fps or rate) as write:
                    for shown, made in sampling.reconstruct_video(vae, source, visible, tile):
                        write(np.concatenate([shown, made], axis=2) if side_by_side else made)
                        bar.update(len(made))
            except UserError:
                raise
            except ValueError as e:
                raise UserError(f"{video}: {e}") from e
    click.echo(out)


def _frames(path: str, stride: int) -> tuple[Iterator[Any], float, int]:
    """Upright RGB frames (H, W, 3) of a video, frames a second, and how many there should be (0: unknown)."""
    import av
    from av.video.reformatter import VideoReformatter

    from longtake.pipeline import decode

    try:
        known = decode.probe(path)
    except decode.Unreadable as e:
        raise UserError(f"{path}: not a video or image that can be read ({e})") from e
    width, height = known.width // 2 * 2, known.height // 2 * 2
    if min(width, height) < stride:
        raise UserError(
            f"{path}: the picture is {known.width}x{known.height}; the model needs at least {stride}x{stride}"
        )
    crop = width // stride * stride, height // stride * stride
    if crop != (known.width, known.height):
        click.echo(f"{path}: {known.width}x{known.height} is cropped to {crop[0]}x{crop[1]}", err=True)

    def made() -> Iterator[Any]:
        scaler: Any = VideoReformatter()
        colours: Any = VideoReformatter()
        try:
            for frame in decode.frames(path):
                planes = decode.to_planes(frame, (width, height), crop, scaler)
                image = av.VideoFrame.from_ndarray(planes, format="yuv420p")
                yield colours.reformat(image, format="rgb24", src_colorspace="ITU601").to_ndarray()
        except decode.Unreadable as e:
            raise Failure(f"{path}: {e}") from e

    return made(), known.fps or 25.0, known.frames


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


def _output(out: str) -> None:
    if PurePosixPath(out).suffix != ".mp4":
        raise UserError(
            f"--out: {out}: videos are written as mp4; name it such as {PurePosixPath(out).stem or 'x'}.mp4"
        )


def _known(uri: str) -> str:
    if uri.startswith(("models:/", "runs:/")) and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            f"{uri}: MLFLOW_TRACKING_URI is not set; set it to the registry, such as sqlite:///runs/quickstart/mlflow.db"
        )
    return uri


def _dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@contextmanager
def _models() -> Iterator[None]:
    """Put errors of memory into words that help."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as e:
        raise Failure("the GPU's memory is too small for this; lower --batch or --count, or set --tile 256") from e


@contextmanager
def _progress(what: str, total: int | None, unit: str) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(desc=what, total=total, unit=unit, mininterval=0.2 if sys.stderr.isatty() else 15.0) as bar:
        yield bar
