"""One shard of clips to one shard of tokens, beside it: decode windows, encode each by itself, commit. Plain functions.

Clips are decoded together, a window of each at a time and every frame once: memory does not grow with their length, and
the bytes do not depend on who else is at work.
"""

import io
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from longtake.datasets import clip as clip_file
from longtake.datasets import index, schema, storage
from longtake.datasets.errors import Failure
from longtake.datasets.loader import to_model
from longtake.datasets.tokens import dtype_of
from longtake.pipeline import column as columns
from longtake.pipeline.latents import prefetched
from longtake.pipeline.windows import Coding, Row, Settings

Report = Callable[[int, str], None]


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
    tar = storage.join(dataset, split, f"{name}.tar")
    counts = {row["key"]: settings.windows(row) for row in rows}
    tokens: dict[str, list[np.ndarray]] = {key: [] for key in counts}
    clips = 0
    for keys, windows in encoded(model, coding, tar, rows, settings):
        for key, window in zip(keys, windows, strict=True):
            tokens[key].append(window)
        clips += sum(len(tokens[key]) == counts[key] for key in keys)
        report(clips, f"{keys[0]}, window {len(tokens[keys[0]])} of {counts[keys[0]]}")
    report(clips, "its commit")
    size = _commit(dataset, base, column, {key: np.stack(windows) for key, windows in tokens.items()}, coding, settings)
    total = sum(counts.values())
    return {"clips": clips, "windows": total, "frames": total * settings.frames, "bytes": size}


def encoded(
    model: nn.Module, coding: Coding, tar: str, rows: Sequence[Row], settings: Settings
) -> Iterator[tuple[list[str], np.ndarray]]:
    """The tokens (B, t, h, w) of windows of clips, and the clips' keys; the next windows are decoded meanwhile.

    The windows of a clip come in their order.

    Args:
        tar: URL of the base shard, whose index has the rows.

    Raises:
        Failure: a clip is not readable, or windows do not fit into the GPU's memory.
    """
    device = next(model.parameters()).device
    with (
        ThreadPoolExecutor(settings.threads) as pool,
        closing(prefetched(_batches(tar, rows, settings, pool))) as batches,
        torch.inference_mode(),
    ):
        for keys, videos in batches:
            try:
                video = to_model(torch.from_numpy(videos).to(device).permute(0, 4, 1, 2, 3))
                ids = model.tokens(video).cpu().numpy()  # type: ignore[operator]
            except torch.OutOfMemoryError as e:
                where = f"{tar}: {len(keys)} windows of clips from {keys[0]} on"
                raise Failure(f"{where} do not fit into the GPU's memory; lower `run.batch`") from e
            assert ids.shape[1:] == coding.shape and 0 <= ids.min() <= ids.max() < coding.codes
            yield keys, ids.astype(dtype_of(coding.codes))


def _batches(
    tar: str, rows: Sequence[Row], settings: Settings, pool: ThreadPoolExecutor
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Keys of clips, and a window (B, T, H, W, 3) uint8 of each."""
    # clips with as many windows are read together, so that batches are full
    by_count = sorted(rows, key=settings.windows)
    for first in range(0, len(by_count), settings.batch):
        group = by_count[first : first + settings.batch]
        readers = [clip_windows(tar, row, settings) for row in group]
        for number in range(settings.windows(group[-1])):
            open_ = [n for n, row in enumerate(group) if settings.windows(row) > number]
            videos = pool.map(next, [readers[n] for n in open_])
            yield [group[n]["key"] for n in open_], np.stack(list(videos))


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
    dtype = dtype_of(coding.codes)
    none = np.empty((0, coding.shape[0], 0, 0), dtype)
    members = ((key, {"npy": _npy(tokens.get(key, none))}) for key in base.table["key"].to_pylist())

    def row_of(row: Row) -> dict[str, Any]:
        windows, steps, height, width = (own := tokens.get(row["key"], none)).shape
        sums = np.array([zlib.crc32(window.tobytes()) for window in own], "<u4")
        return (
            {"frames": settings.frames, "stride": settings.stride, "hop": settings.hop, "dtype": dtype.name}
            | {"windows": windows, "steps": steps, "height": height, "width": width}
            | {"window_crc32": sums.tobytes()}
        )

    counts = sum(
        (np.bincount(own.reshape(-1), minlength=coding.codes) for own in tokens.values()),
        np.zeros(coding.codes, np.int64),
    )
    return columns.commit(dataset, base, column, members, row_of, schema.TOKEN_INDEX, {"counts": counts.tolist()})


def _npy(tokens: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array(buffer, tokens, version=(1, 0))
    return buffer.getvalue()
