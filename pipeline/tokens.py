"""One shard of clips to one shard of tokens, beside it: decode windows, encode each by itself, commit. Plain functions.

What is encoded is their video, or their sound (see `sound_windows`).

Clips are decoded together, a window of each at a time and every frame once: memory does not grow with their length, and
the bytes do not depend on who else is at work.
"""

import io
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from functools import partial
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from isal import isal_zlib
from torch import nn

from longtake.datasets import clip as clip_file
from longtake.datasets import index, schema, storage
from longtake.datasets.errors import Failure
from longtake.datasets.loader import to_model
from longtake.datasets.tokens import NO_SOUND
from longtake.pipeline import column as columns
from longtake.pipeline.latents import prefetched
from longtake.pipeline.sound_windows import samples_of, sound_of, sound_windows
from longtake.pipeline.windows import Coding, Row, Settings

Report = Callable[[int, str], None]


class Reading(NamedTuple):
    """What a model sees of clips.

    windows   the windows of a clip by its row, an array each
    tokens    those of a batch of windows, `(B, t, h, w)`
    alike     clips share a batch where this is equal
    silent    keys of clips that have nothing to encode, whose tokens are all `NO_SOUND`
    """

    windows: Callable[[Row], Iterator[np.ndarray]]
    tokens: Callable[[np.ndarray], torch.Tensor]
    alike: Callable[[Row], int] = lambda row: 0
    silent: frozenset[str] = frozenset()


def make_tokens(
    model: nn.Module,
    coding: Coding,
    settings: Settings,
    dataset: str,
    split: str,
    name: str,
    column: str,
    keep: np.ndarray,
    report: Report = lambda clips, position: None,
) -> dict[str, int]:
    """Encode the windows of the clips of one base shard and commit them as a column's shard.

    Args:
        model: on its device, in evaluation mode.
        keep: (N,) bool, which of the shard's clips are encoded; the others get no tokens.
        report: called with the number of clips that are encoded and the window that is at work.

    Returns:
        Counts: `clips` and `windows` that are encoded, `frames` in these, `bytes`.

    Raises:
        Failure: a clip is not readable, or the base shard is another than before.
    """
    base = index.read_shard(dataset, split, name)
    columns.check_keep(dataset, base, keep)
    rows = [row for row in base.table.filter(pa.array(keep)).to_pylist() if settings.windows(row)]
    if coding.of == "audio":
        reading = sound_reading(model, dataset, base, settings)
    else:
        reading = video_reading(model, storage.join(dataset, split, f"{name}.tar"), settings)
    counts = {row["key"]: settings.windows(row) for row in rows}
    nothing = np.full(coding.shape, NO_SOUND, coding.dtype) if reading.silent else np.empty(0)
    tokens = {key: [nothing] * count if key in reading.silent else [] for key, count in counts.items()}
    clips = len(reading.silent & counts.keys())
    seen = [row for row in rows if row["key"] not in reading.silent]
    for keys, windows in encoded(coding, reading, seen, settings):
        for key, window in zip(keys, windows, strict=True):
            tokens[key].append(window)
        clips += sum(len(tokens[key]) == counts[key] for key in keys)
        report(clips, f"{keys[0]}, window {len(tokens[keys[0]])} of {counts[keys[0]]}")
    report(clips, "its commit")
    size = _commit(dataset, base, column, {key: np.stack(windows) for key, windows in tokens.items()}, coding, settings)
    total = sum(counts.values())
    return {"clips": clips, "windows": total, "frames": total * settings.frames, "bytes": size}


def video_reading(model: Any, tar: str, settings: Settings) -> Reading:
    """The windows of videos of a base shard."""

    def tokens(videos: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(videos).to(next(model.parameters()).device)
        made: torch.Tensor = model.tokens(to_model(pixels.permute(0, 4, 1, 2, 3)))
        return made

    return Reading(partial(clip_windows, tar, settings=settings), tokens)


def sound_reading(model: Any, dataset: str, base: index.Shard, settings: Settings) -> Reading:
    """The windows of the sound of a base shard's clips."""
    sound = sound_of(dataset, base)

    def tokens(samples: np.ndarray) -> torch.Tensor:
        heard = torch.from_numpy(samples).to(next(model.parameters()).device)
        made: torch.Tensor = model.sound_tokens(heard, settings.frames)
        return made

    return Reading(
        partial(sound_windows, sound, settings=settings), tokens, partial(samples_of, sound, settings), sound.silent
    )


def encoded(
    coding: Coding, reading: Reading, rows: Sequence[Row], settings: Settings
) -> Iterator[tuple[list[str], np.ndarray]]:
    """The tokens (B, t, h, w) of windows of clips, and the clips' keys; the next windows are decoded meanwhile.

    The windows of a clip come in their order.

    Raises:
        Failure: a clip is not readable, or windows do not fit into the GPU's memory.
    """
    with (
        ThreadPoolExecutor(settings.threads) as pool,
        closing(prefetched(_batches(reading, rows, settings, pool))) as batches,
        torch.inference_mode(),
    ):
        for keys, windows in batches:
            try:
                ids = reading.tokens(windows).cpu().numpy()
            except torch.OutOfMemoryError as e:
                where = f"{len(keys)} windows of clips from {keys[0]} on"
                raise Failure(f"{where} do not fit into the GPU's memory; lower `run.batch`") from e
            assert ids.shape[1:] == coding.shape and 0 <= ids.min() <= ids.max() < coding.codes
            yield keys, ids.astype(coding.dtype)


def _batches(
    reading: Reading, rows: Sequence[Row], settings: Settings, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Keys of clips, and a window of each, (B, ...)."""
    for _, alike in groupby(sorted(rows, key=reading.alike), key=reading.alike):
        # clips with as many windows are read together, so that batches are full
        by_count = sorted(alike, key=settings.windows)
        for first in range(0, len(by_count), settings.batch):
            group = by_count[first : first + settings.batch]
            readers = [reading.windows(row) for row in group]
            for number in range(settings.windows(group[-1])):
                open_ = [n for n, row in enumerate(group) if settings.windows(row) > number]
                windows = pool.map(next, [readers[n] for n in open_])
                yield [group[n]["key"] for n in open_], np.stack(list(windows))


def clip_windows(tar: str, row: Row, settings: Settings) -> Iterator[np.ndarray]:
    """The windows of a clip (T, H, W, 3), scaled and cropped as the loader does; each frame is decoded once."""
    windows = [
        range(start, start + settings.span, settings.stride)
        for start in range(0, settings.windows(row) * settings.hop, settings.hop)
    ]
    numbers = sorted({number for window in windows for number in window})
    name, size = f"{tar}: {row['key']}.mp4", (row["height"], row["width"])
    ahead = clip_file.fitted(columns.clip_bytes(tar, row), size, numbers, settings.size, name)
    pairs = zip(numbers, ahead, strict=True)
    frames: dict[int, np.ndarray] = {}
    for window in windows:
        frames = {number: frame for number, frame in frames.items() if number >= window[0]}
        while window[-1] not in frames:
            number, frame = next(pairs)
            frames[number] = frame
        yield np.stack([frames[number] for number in window])


def _commit(
    dataset: str,
    base: index.Shard,
    column: str,
    tokens: Mapping[str, np.ndarray],
    coding: Coding,
    settings: Settings,
) -> int:
    """Commit the shard of a column; returns the bytes of its tar."""
    none = np.empty((0, coding.shape[0], 0, 0), coding.dtype)
    members = ((key, {"npy": _npy(tokens.get(key, none))}) for key in base.table["key"].to_pylist())

    def row_of(row: Row) -> dict[str, Any]:
        windows, steps, height, width = (own := tokens.get(row["key"], none)).shape
        sums = np.array([isal_zlib.crc32(window.tobytes()) for window in own], "<u4")
        return (
            {"frames": settings.frames, "stride": settings.stride, "hop": settings.hop, "dtype": coding.dtype.name}
            | {"windows": windows, "steps": steps, "height": height, "width": width}
            | {"window_crc32": sums.tobytes()}
        )

    counts, nothing = np.zeros(coding.codes, np.int64), 0
    for own in tokens.values():
        known = own[own >= 0]
        counts += np.bincount(known, minlength=coding.codes)
        nothing += own.size - known.size
    notes = {"counts": counts.tolist()} | ({"silent": nothing} if coding.of == "audio" else {})
    return columns.commit(dataset, base, column, members, row_of, schema.TOKEN_INDEX, notes)


def _npy(tokens: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, tokens, version=(1, 0))
    return buffer.getvalue()
