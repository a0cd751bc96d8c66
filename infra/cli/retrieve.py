"""`longtake retrieve`: frames of a video as a memory keeps them, beside the true frames."""

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
@click.option("--at", required=True, metavar="T,T,...", help="Times of the frames, such as 3.2s,11s.")
@click.option(
    "--out", required=True, metavar="DIR", help="Where to write a picture a frame: true left, retrieved right."
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Seed of the initial noise.")
@click.option("--steps", type=click.IntRange(min=1), metavar="S", help="Euler steps. [default: the model's]")
@click.option(
    "--vae", metavar="MODEL", help="Decode with this autoencoder, of the same encoder. [default: the model's]"
)
@media.precision_option
def retrieve(
    model: str, video: str, at: str, out: str, seed: int, steps: int | None, vae: str | None, precision: str
) -> None:
    """Retrieve frames of VIDEO from the memory of MODEL.

    MODEL is from `pretrain_memory`, in the registry (models:/memory-retrieval@champion) or a model folder. The video is
    converted to the frame rate and size of the model's training clips. A memory holds a limited number of seconds: a
    longer video is divided into stretches of that length, each with a memory of its own.

    \b
    Example:
      longtake retrieve models:/memory-retrieval@champion in.mp4 --at 3.2s,11s --out retrieved
    """
    media.check_exists(video)
    with media.memory_errors("set --precision bf16"):
        from dataclasses import replace

        times = _times(at)
        decoder = media.check_registry(vae) if vae else None
        retriever = _retriever(media.check_registry(model), decoder, media.dtype(precision))
        settings = replace(retriever.settings, steps=steps or retriever.settings.steps)
        names: dict[int, list[str]] = {}  # of pictures, by the number of the frame
        for name, seconds in times.items():
            names.setdefault(int(seconds * retriever.fps + 1e-6), []).append(name)
        frames = media.frames_at(video, retriever.size, retriever.fps)
        with media.progress("retrieve", len(names), "frame") as bar:
            try:
                for first, stretch, numbers in _stretches(frames, sorted(names), retriever):
                    retrieved, bound = retriever.recall(stretch, numbers[-1] - first, seed, settings)
                    for n in numbers:
                        for name in names[n]:
                            _write_picture(out, name, stretch[n - first], retrieved[n - first], bound[n - first])
                        bar.update()
            except UserError as e:
                raise UserError(f"{video}: {e}") from e


def _retriever(uri: str, vae: str | None, dtype: Any) -> Any:
    """The `Retriever` of a registered model. Raises UserError for one that retrieves nothing."""
    from longtake.training import registry
    from longtake.training.models import kind_of

    model, facts = registry.load_with_facts(uri)
    kind = kind_of(facts)
    if kind.retriever is None:
        raise UserError(f"{uri}: is a {kind.what}, which retrieves nothing; name a model that was trained to")
    return kind.retriever(uri, model, facts, vae, dtype)


def _times(option: str) -> dict[str, float]:
    """Seconds by their text in file names."""
    from longtake.training.models.generator import seconds_of

    try:
        seconds = [seconds_of(part) for part in option.split(",")]
    except ValueError as e:
        raise UserError(f"--at: {e}") from e
    return {f"{s:g}s": s for s in seconds}


def _stretches(frames: Iterable[Any], numbers: Sequence[int], retriever: Any) -> Iterator[tuple[int, Any, list[int]]]:
    """The stretches of a video, one memory each, that have frames of `numbers`.

    Stretches follow each other; the last one ends with the video. Raises UserError if the video is too short.

    Yields:
        Number of the first frame, all frames (T, H, W, 3), and those of `numbers` among them.
    """
    import numpy as np

    longest = retriever.holds(1 << 62)
    recent: deque[Any] = deque(maxlen=longest)
    remaining, count = list(numbers), 0

    def stretch(start: int, end: int) -> Iterator[tuple[int, Any, list[int]]]:
        nonlocal remaining
        if inside := [n for n in remaining if start <= n < end]:
            remaining = [n for n in remaining if n not in inside]
            first = start - (count - len(recent))
            yield start, np.stack(list(recent)[first : first + end - start]), inside

    for frame in frames:
        recent.append(frame)
        count += 1
        if count % longest == 0:
            yield from stretch(count - longest, count)
        if not remaining:
            return

    if remaining[-1] >= count:
        raise UserError(f"lasts {count / retriever.fps:.4g} s; --at {remaining[-1] / retriever.fps:.4g}s is beyond")
    length = retriever.holds(len(recent))
    if not length:
        least = next(n for n in range(1, longest + 1) if retriever.holds(n))
        raise UserError(f"has {count} frames at {retriever.fps:g} a second; a memory takes {least} or more")
    if count < longest:
        yield from stretch(0, length)
    yield from stretch(count - length, count)


def _write_picture(folder: str, name: str, true: Any, retrieved: Any, bound: Any) -> None:
    """Write the true and the retrieved frame (H, W, 3) side by side, and print their PSNR."""
    import io

    import numpy as np
    import torch
    from PIL import Image

    from longtake.datasets.loader import to_model
    from longtake.training.metrics.reconstruction import psnr

    source, ours, alone = (
        to_model(torch.from_numpy(frame.copy()).permute(2, 0, 1)[None, :, None]) for frame in (true, retrieved, bound)
    )
    sink = io.BytesIO()
    Image.fromarray(np.concatenate([true, retrieved], axis=1)).save(sink, "PNG")
    url = storage.join(folder, f"{name}.png")
    storage.write(url, sink.getvalue())
    click.echo(
        f"{url}: PSNR {psnr(ours, source).item():.2f} dB; of the autoencoder alone {psnr(alone, source).item():.2f} dB"
    )
