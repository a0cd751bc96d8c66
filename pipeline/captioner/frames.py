"""What a captioner sees of a clip: frames spread evenly over it, at most `side` pixels long."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from longtake.datasets import clip


def spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` frames, each in the middle of as long a part of the clip."""
    parts = min(count, most)
    return [int((n + 0.5) * count / parts) for n in range(parts)]


def seen(mp4: bytes, row: Mapping[str, Any], most: int, side: int, name: str) -> list[np.ndarray]:
    """The frames (H, W, 3) uint8 that are shown of a clip. Raises Failure where it cannot be decoded."""
    height, width = row["height"], row["width"]
    scale = min(1.0, side / max(height, width))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    return list(clip.decoded(mp4, spread(row["frame_count"], most), None if scale == 1.0 else size, name))


def jpeg_url(frame: np.ndarray) -> str:
    """A frame as a `data:` URL."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(frame).save(buffer, "JPEG", quality=90)
    return data_url("image/jpeg", buffer.getvalue())


def data_url(kind: str, data: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"
