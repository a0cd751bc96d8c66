"""Clips and stills, straight from the tars: ranges of bytes, and a small store of pictures."""

import io
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from threading import BoundedSemaphore, Lock
from typing import Any

from longtake.datasets import clip, storage
from longtake.datasets.errors import Failure

LEAST_WIDTH, MOST_WIDTH = 64, 640  # pixels of a still

_PIECE = 1 << 20  # bytes read at once
_STILLS_BYTES = 64 << 20  # of all stills in memory
_MOST_CLIP = 256 << 20  # bytes of a clip that is decoded
_DECODERS = 2  # at once
_RANGE = re.compile(r"bytes=(\d{0,18})-(\d{0,18})")
_TYPES = {b"\xff\xd8": "image/jpeg", b"\x89PNG": "image/png", b"RIFF": "image/webp"}  # by their first bytes; else mp4
_QUALITY = 80


def span(header: str | None, size: int) -> tuple[int, int] | None:
    """The first byte and the end of what a Range header asks for of `size` bytes; None: all.

    A header with several ranges, or of another unit, asks for all, as RFC 9110 allows.

    Raises:
        ValueError: no byte of it is there.
    """
    match = _RANGE.fullmatch(header.strip()) if header else None
    if match is None or not (match[1] or match[2]):
        return None
    if not match[1]:
        first, end = max(0, size - int(match[2])), size
    else:
        first, end = int(match[1]), min(size, int(match[2]) + 1 if match[2] else size)
        if match[2] and int(match[2]) < first:
            return None
    if first >= end:
        raise ValueError(header)
    return first, end


def pieces(dataset: str, split: str, place: Mapping[str, Any], first: int, end: int) -> Iterator[bytes]:
    """The bytes of a clip from `first` to `end`. Raises Failure: the tar is missing, or shorter than its index says."""
    while first < end:
        data = _read(dataset, split, place, first, min(_PIECE, end - first))
        yield data
        first += len(data)


def kind_of(start: bytes) -> str:
    """The media type of a clip by its first bytes."""
    return next((kind for mark, kind in _TYPES.items() if start.startswith(mark)), "video/mp4")


def _read(dataset: str, split: str, place: Mapping[str, Any], first: int, size: int) -> bytes:
    url = storage.join(dataset, split, f"{place['shard']}.tar")
    try:
        data = storage.read_range(url, place["mp4_offset"] + first, size)
    except (FileNotFoundError, ValueError) as e:
        raise Failure(f"{url}: is missing; run `longtake dataset verify`") from e
    except OSError as e:
        raise Failure(f"{url}: cannot be read ({e.strerror or e}); run `longtake dataset verify`") from e
    if len(data) != size:
        raise Failure(f"{url}: {place['key']} is damaged; run `longtake dataset verify`")
    return data


class Stills:
    """Pictures of clips' middle frames, the last ones kept."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._bytes = 0
        self._lock = Lock()
        self._decoders = BoundedSemaphore(_DECODERS)

    def of(self, dataset: str, split: str, place: Mapping[str, Any], frame_count: int, width: int) -> bytes:
        """A JPEG, `width` pixels wide but no wider than the clip. Raises Failure: the clip is not readable."""
        # few sizes, so that a page that is dragged wider does not decode all again
        width = min(max(LEAST_WIDTH, -(-width // 64) * 64), MOST_WIDTH)
        with self._lock:
            if (still := self._kept.get((place["key"], width))) is not None:
                self._kept.move_to_end((place["key"], width))
                return still
        with self._decoders:
            still = _still(dataset, split, place, frame_count, width)
        with self._lock:
            if (place["key"], width) not in self._kept:
                self._kept[place["key"], width] = still
                self._bytes += len(still)
            while self._bytes > _STILLS_BYTES:
                self._bytes -= len(self._kept.popitem(last=False)[1])
        return still


def _still(dataset: str, split: str, place: Mapping[str, Any], frame_count: int, width: int) -> bytes:
    from PIL import Image

    if place["mp4_size"] > _MOST_CLIP:
        raise Failure(f"{place['key']}: has {place['mp4_size']} bytes, too many for a still")
    data = _read(dataset, split, place, 0, place["mp4_size"])
    if kind_of(data) == "video/mp4":
        picture = Image.fromarray(clip.decode(data, [frame_count // 2], name=place["key"])[0])
    else:
        try:
            picture = Image.open(io.BytesIO(data), formats=("JPEG", "PNG", "WEBP"))
            picture.draft("RGB", (width, width))
            picture = picture.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as e:
            raise Failure(f"{place['key']}: cannot decode ({e}); run `longtake dataset verify`") from e
    if picture.width > width:
        picture = picture.resize((width, max(1, round(picture.height * width / picture.width))))
    sink = io.BytesIO()
    picture.save(sink, "JPEG", quality=_QUALITY)
    return sink.getvalue()
