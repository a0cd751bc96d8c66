"""The pixels that the latents of a live column are made of."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from longtake.datasets import clip
from longtake.datasets.encoding import target_size
from longtake.datasets.loader.live import LiveRows
from longtake.datasets.loader.split import Split
from longtake.datasets.loader.streams import clips_of
from longtake.datasets.loader.window import Sample, Window


def pixels(split: Split, sample: Sample, window: Window, loaded: Mapping[str, Any]) -> torch.Tensor:
    """(T, H, W, 3) uint8: the frames of a sample's stream from its beginning up to the end of the window.

    Args:
        loaded: the sample, which says where its window begins.
    """
    rows = split.columns[split.live[0]]
    assert isinstance(rows, LiveRows)
    live, factor = rows.live, rows.live.strides.factor
    begin = loaded["stream_step"] if window.lengths else loaded["start"] // factor
    remaining = 1 + (begin + (window.frames - 1) // factor) * factor
    own = split.base.row(sample.shard, sample.row)
    size = target_size((own["height"], own["width"]), live.settings, live.strides.stride)
    assert size
    video = np.empty((remaining, *size, 3), np.uint8)
    at = 0
    for number in clips_of(split.codes(split.live[0], sample.shard, sample.row).before, sample.row):
        row = split.base.row(sample.shard, number)
        count = min(remaining - at, row["frame_count"])
        if not count:
            break
        mp4 = split.reader.member(split.base, sample.shard, row["mp4_offset"], row["mp4_size"], row["mp4_crc32"])
        name = f"{split.base.tar(sample.shard)[0]}: {row['key']}.mp4"
        for frame in clip.fitted(mp4, (row["height"], row["width"]), range(count), size, name):
            video[at] = frame
            at += 1
    return torch.from_numpy(video)
