"""Which windows of clips become tokens: where they begin, and what a model makes of each. Those of sound are those of the video."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from longtake.datasets.errors import UserError
from longtake.datasets.tokens import PREFIX, Of, dtype_of

_FACTS = ("codes", "temporal_stride", "spatial_stride")

Row = Mapping[str, Any]  # a clip in the index of its shard


@dataclass(frozen=True)
class Settings:
    """How a column is encoded. `batch` and `threads` say how the work is done, and change values by roundings only."""

    frames: int  # in a window
    stride: int  # take every `stride`-th frame of the clip
    hop: int  # frames of the clip from a window's first to the next one's
    size: tuple[int, int]  # height, width
    batch: int  # windows
    threads: int = 1  # that decode

    def values(self) -> dict[str, Any]:
        """The settings that decide a column's values."""
        return {name: value for name, value in asdict(self).items() if name not in ("batch", "threads")}

    @property
    def span(self) -> int:
        """Frames of the clip from a window's first to its last."""
        return (self.frames - 1) * self.stride + 1

    def windows(self, row: Row) -> int:
        """The number of a clip's windows; 0 of one that is too short, or smaller than `size`."""
        if row["height"] < self.size[0] or row["width"] < self.size[1] or row["frame_count"] < self.span:
            return 0
        return 1 + (int(row["frame_count"]) - self.span) // self.hop


@dataclass(frozen=True)
class Coding:
    """What a model makes of a window, or of its sound: ids below `codes`, of this shape (t, h, w)."""

    codes: int
    shape: tuple[int, int, int]
    of: Of = "video"

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of the ids in the column."""
        return dtype_of(self.codes, self.of)


def coding_of(model: Any, uri: str, settings: Settings) -> Coding:
    """What a model makes of a window. Raises UserError where it makes no tokens, or windows are not of whole tokens."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "tokens") or any(not hasattr(config, name) for name in _FACTS):
        raise UserError(
            f"encoder: {uri}: is a {type(model).__name__}, which makes no tokens; name a `pretrain_vqgan` model"
        )
    factor, stride = config.temporal_stride, config.spatial_stride
    if settings.frames % factor:
        near = max(1, settings.frames // factor) * factor
        raise UserError(f"frames: {settings.frames} is not a multiple of {factor}, as the encoder needs; {near} is")
    if heard := getattr(config, "spectrogram", None):
        shape = settings.frames // factor, heard.rows // stride, heard.columns // stride
        return Coding(config.codes, shape, "audio")
    if any(side % stride for side in settings.size):
        asked, near = ("x".join(map(str, size)) for size in (settings.size, _whole(settings.size, stride)))
        raise UserError(f"size: {asked} is not in multiples of {stride}, as the encoder needs; {near} is")
    height, width = settings.size
    return Coding(config.codes, (settings.frames // factor, height // stride, width // stride))


def _whole(size: tuple[int, int], stride: int) -> tuple[int, ...]:
    return tuple(max(1, side // stride) * stride for side in size)


def column_name(model: str, settings: Settings, view: str) -> str:
    """`tokens-DIGEST`, by the digests of the model and of the view ("" without one), and the settings' values."""
    text = json.dumps([model, settings.values(), view], sort_keys=True)
    return f"{PREFIX}{hashlib.sha256(text.encode()).hexdigest()[:16]}"
