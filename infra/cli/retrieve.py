"""`longtake retrieve`: what a memory has kept of a video, beside the video itself."""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import click

from longtake.datasets import storage
from longtake.datasets.errors import UserError
from longtake.infra.cli import media


@click.command()
@click.argument("model")
@click.argument("video")
@click.option("--at", required=True, metavar="T,T,...", help="Which frames, by their times, such as 3.2s,11s.")
@click.option(
    "--out", required=True, metavar="DIR", help="Where to write a picture for each: true left, retrieved right."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of the noise to begin with.")
@click.option("--steps", type=click.IntRange(min=1), metavar="S", help="Euler steps. [default: the model's]")
@click.option("--vae", metavar="MODEL", help="Decode by this autoencoder, of the same encoder. [default: the model's]")
@media.precision_option
def retrieve(
    model: str, video: str, at: str, out: str, seed: int, steps: int | None, vae: str | None, precision: str
) -> None:
    """Retrieve frames of VIDEO from the memory of MODEL: a `pretrain_memory` model of the registry or a model folder.

    The video is brought to the rate and size that the model has learned. A memory reaches back so many seconds: a longer
    video is taken in stretches of that length, and a frame is retrieved from the memory of its own.

    \b
    Example:
      longtake retrieve models:/memory-dit@champion in.mp4 --at 3.2s,11s --out retrieved
    """
    media.check_there(video)
    with media.models("set --precision bf16"):
        from dataclasses import replace

        from longtake.training.models.memory.prior import load_prior
        from longtake.training.models.memory.recall import recall

        times = _times(at)
        prior = load_prior(media.known(model), "retrieval", media.known(vae) if vae else None, media.dtype(precision))
        settings = replace(prior.settings, steps=steps or prior.settings.steps)
        asked: dict[int, list[str]] = {}
        for name, seconds in times.items():
            asked.setdefault(int(seconds * prior.fps + 1e-6), []).append(name)
        frames = media.frames_at(video, prior.size, prior.fps)
        with media.progress("retrieve", len(asked), "frame") as bar:
            try:
                for begin, stretch, wanted in _stretches(frames, sorted(asked), prior):
                    made, bound = recall(prior, stretch, wanted[-1] - begin, seed, settings)
                    for n in wanted:
                        for name in asked[n]:
                            _show(out, name, *(each[n - begin] for each in (stretch, made, bound)))
                        bar.update()
            except UserError as e:
                raise UserError(f"{video}: {e}") from e


def _times(given: str) -> dict[str, float]:
    """Seconds by how they are written in names of files."""
    from longtake.training.models.generator import seconds_of

    try:
        seconds = [seconds_of(part) for part in given.split(",")]
    except ValueError as e:
        raise UserError(f"--at: {e}") from e
    return {f"{s:g}s": s for s in seconds}


def _stretches(frames: Iterable[Any], asked: Sequence[int], prior: Any) -> Iterator[tuple[int, Any, list[int]]]:
    """The parts of a video that a memory is made of, where frames are asked for: number of the first, all, those asked.

    One follows the other; the last ends with the video. Raises UserError where the video is too short.
    """
    import numpy as np

    longest = prior.holds(1 << 62)
    held: deque[Any] = deque(maxlen=longest)
    left, seen = list(asked), 0

    def taken(begin: int, end: int) -> Iterator[tuple[int, Any, list[int]]]:
        nonlocal left
        if inside := [n for n in left if begin <= n < end]:
            left = [n for n in left if n not in inside]
            first = begin - (seen - len(held))
            yield begin, np.stack(list(held)[first : first + end - begin]), inside

    for frame in frames:
        held.append(frame)
        seen += 1
        if seen % longest == 0:
            yield from taken(seen - longest, seen)
        if not left:
            return
    if left[-1] >= seen:
        raise UserError(f"lasts {seen / prior.fps:.4g} s; --at {left[-1] / prior.fps:.4g}s is beyond")
    whole = prior.holds(len(held))
    if not whole:
        least = next(n for n in range(1, longest + 1) if prior.holds(n))
        raise UserError(f"has {seen} frames at {prior.fps:g} a second; a memory takes {least} or more")
    if seen < longest:
        yield from taken(0, whole)
    yield from taken(seen - whole, seen)


def _show(folder: str, name: str, true: Any, made: Any, bound: Any) -> None:
    """Write a picture and say how close it is."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from longtake.datasets.loader import to_model
    from longtake.training.metrics.reconstruction import psnr

    source, ours, alone = (
        to_model(torch.from_numpy(f.copy()).permute(2, 0, 1)[None, :, None]) for f in (true, made, bound)
    )
    sink = io.BytesIO()
    Image.fromarray(np.concatenate([true, made], axis=1)).save(sink, "PNG")
    url = storage.join(folder, f"{name}.png")
    storage.write(url, sink.getvalue())
    click.echo(
        f"{url}: PSNR {psnr(ours, source).item():.2f} dB; of the autoencoder alone {psnr(alone, source).item():.2f} dB"
    )
