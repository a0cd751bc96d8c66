"""What the commands that make videos of models share: frames of a video file, options, errors in words, progress."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import Any

import click

from longtake.datasets.errors import Failure, UserError
from longtake.training.registry.uri import in_store

precision_option = click.option(
    "--precision",
    type=click.Choice(["fp32", "bf16"]),
    default="fp32",
    show_default=True,
    help="Of the models' arithmetic.",
)
tile_option = click.option(
    "--tile",
    type=click.IntRange(min=1),
    metavar="PIXELS",
    help="Work on larger frames in overlapping tiles of this side.",
)


def frames_of(path: str, stride: int) -> tuple[Iterator[Any], float, int]:
    """Upright RGB frames (H, W, 3) of a video, cropped to multiples of `stride` around their middle, frames a second,
    and how many there should be (0: unknown).

    Raises:
        UserError: no video, or too small.
        Failure: while frames are read, where it is damaged.
    """
    known = _probed(path)
    width, height = known.width // 2 * 2, known.height // 2 * 2
    if min(width, height) < stride:
        raise UserError(
            f"{path}: the picture is {known.width}x{known.height}; the model needs at least {stride}x{stride}"
        )
    crop = width // stride * stride, height // stride * stride
    if crop != (known.width, known.height):
        click.echo(f"{path}: {known.width}x{known.height} is cropped to {crop[0]}x{crop[1]}", err=True)
    own = known.width, known.height
    frames = _rgb(path, lambda size: (width, height) if size == own else _covering(size, crop), crop)
    made = (frame for _, frame in frames)
    return made, known.fps or 25.0, known.frames


def frames_at(path: str, size: tuple[int, int], fps: float) -> Iterator[Any]:
    """RGB frames (H, W, 3) of a video as a model has learned to see them: `size` (height, width) is cut out of the
    middle after scaling to cover it, and at each tick of `fps` the frame is taken that is on screen then.

    Raises:
        UserError: no video.
        Failure: while frames are read, where it is damaged.
    """
    _probed(path)
    crop = size[1], size[0]
    return _ticks(_rgb(path, lambda own: _covering(own, crop), crop), fps)


def _covering(size: tuple[int, int], crop: tuple[int, int]) -> tuple[int, int]:
    """The smallest even (width, height) of the shape of `size` that covers `crop`."""
    scale = max(wanted / own for wanted, own in zip(crop, size, strict=True))
    width, height = (max(wanted, round(own * scale / 2) * 2) for wanted, own in zip(crop, size, strict=True))
    return width, height


def _ticks(timed: Iterable[tuple[float, Any]], fps: float) -> Iterator[Any]:
    """Of (seconds, frame) those on screen at 0, 1/fps, 2/fps, ...; a frame may come up to half a tick early."""
    tick, shown, before, duration = 0, None, 0.0, 1 / fps
    for seconds, frame in timed:
        if shown is not None:
            duration = seconds - before
            while tick / fps < seconds - min(duration, 1 / fps) / 2:
                yield shown
                tick += 1
        shown, before = frame, seconds
    while shown is not None and tick / fps < before + (duration - min(duration, 1 / fps) / 2):
        yield shown
        tick += 1


def check_there(path: str) -> None:
    """Raises UserError where no file is."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such video file")


def _probed(path: str) -> Any:
    from longtake.pipeline import container, decode

    try:
        return decode.probe(path)
    except container.Unreadable as e:
        raise UserError(f"{path}: not a video or image that can be read ({e})") from e


def _rgb(
    path: str, scaled: Callable[[tuple[int, int]], tuple[int, int]], crop: tuple[int, int]
) -> Iterator[tuple[float, Any]]:
    """(seconds, frame) of all frames, each scaled by its own shape, which may change; sizes are (width, height)."""
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
    """Raises UserError where the name is not that of an mp4."""
    if PurePosixPath(out).suffix != ".mp4":
        raise UserError(
            f"--out: {out}: videos are written as mp4; name it such as {PurePosixPath(out).stem or 'x'}.mp4"
        )


def known(uri: str) -> str:
    """The URI of a model, as it is. Raises UserError where it needs a registry and none is named."""
    if in_store(uri) and not os.environ.get("MLFLOW_TRACKING_URI"):
        raise UserError(
            f"{uri}: MLFLOW_TRACKING_URI is not set; set it to the registry, such as sqlite:///runs/quickstart/mlflow.db"
        )
    return uri


def dtype(precision: str) -> Any:
    import torch

    return {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


@contextmanager
def models(remedy: str) -> Iterator[None]:
    """Put errors of memory into words that help."""
    import torch

    try:
        yield
    except torch.OutOfMemoryError as e:
        raise Failure(f"the GPU's memory is too small for this; {remedy}") from e


@contextmanager
def progress(what: str, total: int | None, unit: str) -> Iterator[Any]:
    from tqdm import tqdm

    with tqdm(desc=what, total=total, unit=unit, mininterval=0.2 if sys.stderr.isatty() else 15.0) as bar:
        yield bar
