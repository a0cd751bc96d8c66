"""Shared by the commands that generate videos: frames of a video file, options, error messages, progress."""

import math
import os
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import click

from longtake.datasets import storage
from longtake.datasets.errors import Failure, UserError
from longtake.training.registry.uri import in_store

_SOUND_RATE = 48_000


class Number(click.FloatRange):
    """A range of numbers without NaN and infinity, which other comparisons let through."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        number = float(super().convert(value, param, ctx))
        if not math.isfinite(number):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return number


FPS = Number(0.01, 1000)  # rates that an mp4 can have, and players read


class Size(click.ParamType):
    """A height and a width, such as 480x832."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        sides = re.fullmatch(r"([1-9]\d{0,4})x([1-9]\d{0,4})", value)
        if not sides:
            self.fail(f"{value!r} is no height and width, such as 480x832.", param, ctx)
        return int(sides[1]), int(sides[2])


SIZE = Size()

precision_option = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Precision of the models' arithmetic.",
)
tile_option = click.option(
    "--tile",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Process larger frames in overlapping tiles of this size.",
)


def frames_of(path: str, stride: int) -> tuple[Iterator[Any], float, int]:
    """(frames, frame rate, expected number of frames; 0: unknown) of a video.

    The frames are upright RGB (H, W, 3), cropped to multiples of `stride` around their middle.

    Raises:
        UserError: no video, or too small.
        Failure: while frames are read, if the video is damaged.
    """
    facts = _probe(path)
    width, height = facts.width // 2 * 2, facts.height // 2 * 2
    if min(width, height) < stride:
        raise UserError(
            f"{path}: the picture is {facts.width}x{facts.height}; the model needs at least {stride}x{stride}"
        )
    crop = width // stride * stride, height // stride * stride
    if crop != (facts.width, facts.height):
        click.echo(f"{path}: {facts.width}x{facts.height} is cropped to {crop[0]}x{crop[1]}", err=True)
    first_size = facts.width, facts.height
    timed = _rgb(path, lambda size: (width, height) if size == first_size else _covering(size, crop), crop)
    return (frame for _, frame in timed), facts.fps or 25.0, facts.frames


def rate_of(path: str) -> float:
    """Frames per second of a video. UserError for none."""
    return float(_probe(path).fps or 25.0)


def joints_of(path: str) -> list[int]:
    """The joints that are written in a film; empty where none are. UserError for wrong ones."""
    from longtake.pipeline import container
    from longtake.training.models.common.joints import joints_in

    try:
        with container.film(path) as (file, _):
            said = {name.lower(): text for name, text in file.metadata.items()}
        return joints_in(said.get("comment", ""))
    except container.Unreadable as e:
        raise UserError(f"{path}: not a video or image that can be read ({e})") from e
    except ValueError as e:
        raise UserError(f"{path}: {e}; say where its clips meet, such as --joints 16,28,...") from e


def say_rate(path: str, fps: float) -> None:
    """Say where a video is sampled at another rate."""
    if abs((rate := rate_of(path)) - fps) > 0.01:
        click.echo(f"{path}: {rate:.4g} frames a second are sampled at {fps:g}", err=True)


def frames_at(path: str, size: tuple[int, int], fps: float, silent: bool = False) -> Iterator[Any]:
    """RGB frames (H, W, 3) of a video as in a model's training clips.

    The picture is scaled to cover `size` (height, width), which is cut out of its middle; a line says so. Each tick of
    `fps` gives the frame that is on screen at that time.

    Raises:
        UserError: no video.
        Failure: while frames are read, if the video is damaged.
    """
    facts = _probe(path)
    crop = size[1], size[0]
    if (facts.width, facts.height) != crop and not silent:
        click.echo(f"{path}: {facts.width}x{facts.height} is scaled and cropped to {crop[0]}x{crop[1]}", err=True)
    return _ticks(_rgb(path, lambda size: _covering(size, crop), crop), fps)


def _covering(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """The smallest even (width, height) with the aspect ratio of `size` that covers `crop`."""
    scale = max(target / side for target, side in zip(crop, size, strict=True))
    width, height = (max(target, round(side * scale / 2) * 2) for target, side in zip(crop, size, strict=True))
    return width, height


def _ticks(timed: Iterable[tuple[float, Any]], fps: float) -> Iterator[Any]:
    """The frames of (seconds, frame) on screen at 0, 1/fps, 2/fps, ...; a frame may come up to half a tick early."""
    tick, current, start, duration = 0, None, 0.0, 1 / fps
    for seconds, frame in timed:
        if current is not None:
            duration = seconds - start
            while tick / fps < seconds - min(duration, 1 / fps) / 2:
                yield current
                tick += 1
        current, start = frame, seconds
    while current is not None and tick / fps < start + (duration - min(duration, 1 / fps) / 2):
        yield current
        tick += 1


def check_exists(path: str) -> None:
    """Raise UserError if there is no such file."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video file")


def sound_of(path: str, seconds: float) -> tuple[Any, int]:
    """The sound of a file's first `seconds`, or of as many as it has: samples (2, n) float32, and how many are in a second.

    Raises:
        UserError: no such file, none with sound, or none there.
    """
    import av
    import numpy as np

    from longtake.pipeline import container, soundtrack

    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        heard = soundtrack.beginning(path, _SOUND_RATE, 2, seconds)
    except soundtrack.Unheard as e:
        raise UserError(f"{path}: {e.detail}") from e
    except (container.Unreadable, av.error.FFmpegError, ArithmeticError, OSError, ValueError) as e:
        raise UserError(f"{path}: not a file whose sound can be read ({getattr(e, 'strerror', None) or e})") from e
    if (lasts := len(heard) / _SOUND_RATE) < seconds - 0.05:
        click.echo(f"{path}: the sound ends after {lasts:.1f} s; what follows has none", err=True)
    return heard.T.astype(np.float32) / (1 << 15), _SOUND_RATE


def _probe(path: str) -> Any:
    from longtake.pipeline import container, decode

    try:
        return decode.probe(path)
    except container.Unreadable as e:
        raise UserError(f"{path}: not a video or image that can be read ({e})") from e


def _rgb(
    path: str, scaled: Callable[[tuple[int, int]], tuple[int, int]], crop: tuple[int, int]
) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) of all frames, each scaled by its own size, which may change; sizes are (width, height)."""
    import av
    from av.video.reformatter import VideoReformatter

    from longtake.pipeline import container, decode

    scaler: Any = VideoReformatter()
    colours: Any = VideoReformatter()
    try:
        for frame in decode.frames(path):
            planes = decode.to_planes(frame, scaled(frame.size), crop, scaler)
            image = av.VideoFrame.from_ndarray(planes, format="yuv420p")
            yield frame.seconds, colours.reformat(image, format="rgb24", src_colorspace="ITU601").to_ndarray()
    except container.Unreadable as e:
        raise Failure(f"{path}: {e}") from e


def check_output(out: str) -> None:
    """Raise UserError if the file's name does not end in .mp4, or if it cannot be written where it is local."""
    if PurePosixPath(out).suffix != ".mp4":
        raise UserError(
            f"--out: {out}: videos are written as mp4; name it such as {PurePosixPath(out).stem or 'x'}.mp4"
        )
    if not storage.is_local(out):
        return
    target = Path(storage.filesystem(out)[1])
    folder = next(folder for folder in target.parents if os.path.lexists(folder))
    probe = folder / storage.temporary_name(target.name)
    try:
        if target.is_dir():
            raise UserError(f"--out: {out}: is a folder; name a file in it")
        probe.touch()
        probe.unlink()
    except OSError as e:
        raise UserError(f"--out: {out}: cannot be written in {folder} ({e.strerror}); choose another name") from e


def check_apart(out: str, sources: Iterable[str]) -> None:
    """Raise UserError if a file that is written is one of those that are read: it would be lost."""
    if not storage.is_local(out):
        return
    target = Path(storage.filesystem(out)[1])
    for path in map(Path, sources):
        if target.exists() and path.exists() and target.samefile(path):
            raise UserError(f"--out: {out}: would replace {path}, which is read; name another file")


def check_registry(uri: str) -> str:
    """The URI of a model, unchanged. Raises UserError if it needs a registry and MLFLOW_TRACKING_URI is not set."""
    if in_store(uri) and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            f"{uri}: MLFLOW_TRACKING_URI is not set; set it to the registry, such as sqlite:///runs/quickstart/mlflow.db"
        )
    return uri


def dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@contextmanager
def memory_errors(remedy: str) -> Iterator[None]:
    """Turn errors of a GPU's memory into a Failure with a remedy."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as e:
        raise Failure(f"the GPU's memory is too small for this; {remedy}") from e


@contextmanager
def progress(title: str, total: int | None, unit: str) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(desc=title, total=total, unit=unit, mininterval=0.2 if sys.stderr.isatty() else 15.0) as bar:
        yield bar
