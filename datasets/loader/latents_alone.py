"""Batches of windows of latents alone, the most common ones, with few calls a window: they are quicker read than a clip's
row is looked up. Windows, checks and errors are those of `window.load`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from longtake.datasets.loader import codes
from longtake.datasets.loader.order import sample_rng
from longtake.datasets.loader.room import Empty
from longtake.datasets.loader.split import Split
from longtake.datasets.loader.window import Sample, Window, draw_start


def is_alone(split: Split) -> bool:
    """Whether the samples of a split are latents of one column, which are cached, and labels."""
    return len(split.latents) == 1 and not split.live and set(split.names) <= {*split.latents, "label"}


def batch(split: Split, window: Window, samples: Sequence[Sample], empty: Empty) -> dict[str, Any] | None:
    """The batch of these samples; None where it is no plain one: windows with a history, clips of several shapes.

    Raises:
        Failure: latents are missing or damaged.
    """
    if window.lengths or window.history_seconds:
        return None
    (column,) = split.latents
    rows, kind, out = split.columns[column], None, None
    keys, starts, labels = list[str](), list[int](), list[int]()
    for place, (shard, number, chance, _) in enumerate(samples):
        items, base = split.codes(column, shard, number), split.base.lists(shard)
        shape, dtype, unit = items.shapes[number], items.dtypes[number], items.units[number]
        if out is None:
            kind, count = (shape, dtype, unit), 1 + (window.frames - 1) // unit
            out = empty((len(samples), count, *shape), dtype)
            data, size = out.data.cast("B"), out.nbytes // len(samples)
        elif kind != (shape, dtype, unit):
            return None

        key = base["key"][number]
        rng = sample_rng(*chance[:2], key, chance[2]) if chance else None
        start = draw_start(window, rng, base["frame_count"][number], unit)
        part = data[place * size : (place + 1) * size]
        codes.read(split.reader, rows, shard, items, number, start // unit, count, part, "step")
        keys.append(key)
        starts.append(start)
        if "label" in split.names:
            labels.append(split.labels.get(base["label"][number], -1))

    assert out is not None
    latents = torch.from_numpy(out)
    latents = latents.view(torch.bfloat16) if out.dtype == np.uint16 else latents
    made = {"key": keys, "start": torch.tensor(starts), column: latents.permute(0, 2, 3, 1, 4, 5)}
    return made | ({"label": torch.tensor(labels)} if labels else {})
