"""Read Ogg files with one stream of Opus or FLAC, as the pipeline writes them, from any sample on.

FFmpeg's demuxer takes longer to open such a file, and to find a place in it, than its decoders take for a second of sound.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

_HEADER = 27  # bytes of a page before the table of its segments
_CONTINUED = 1


class Page(NamedTuple):
    """A page: the sample at which its last packet ends, -1 if none does; whether it begins inside of a packet; its segments."""

    granule: int
    continued: bool
    sizes: bytes
    body: int  # offset


def decoded(data: bytes | memoryview, begin: int, preroll: float) -> Iterator[tuple[int, np.ndarray]]:
    """Decode from `begin` or earlier on; yields the number of the first sample and (channels, samples) float32, again and again.

    Args:
        preroll: seconds before `begin` from which decoding starts, for a codec that predicts from what came before.

    Raises:
        av.error.FFmpegError, IndexError, ValueError: it is damaged.
    """
    import av

    pages = list(_pages(data))
    headers = [page for page in pages if not page.granule]
    name, setup, skip, rate = _stream(next(_packets(data, headers), b""))
    context: Any = av.CodecContext.create(name, "r")
    context.extradata, context.thread_count = setup, 1
    wanted = begin + skip - (round(preroll * rate) if name == "opus" else 0)
    first, position = _start(pages, len(headers), wanted)
    position, total = (
        position - skip,
        pages[-1].granule - skip,
    )  # the last packet may have more than belongs to the sound
    for packet in _packets(data, pages[first:]):
        for frame in context.decode(av.Packet(packet)):
            yield position, _values(frame)[:, : max(0, total - position)]
            position += frame.samples


def _pages(data: bytes | memoryview) -> Iterator[Page]:
    offset = 0
    while offset < len(data):
        if bytes(data[offset : offset + 4]) != b"OggS":
            raise ValueError(f"no page at byte {offset}")
        granule = int.from_bytes(data[offset + 6 : offset + 14], "little", signed=True)
        body = offset + _HEADER + data[offset + 26]
        sizes = bytes(data[offset + _HEADER : body])
        yield Page(granule, bool(data[offset + 5] & _CONTINUED), sizes, body)
        offset = body + sum(sizes)


def _packets(data: bytes | memoryview, pages: list[Page]) -> Iterator[bytes]:
    """The packets that begin in these pages; a segment of less than 255 bytes is the last of its packet."""
    part = b""
    for page in pages:
        start = end = page.body
        for size in page.sizes:
            end += size
            if size < 255:
                yield part + bytes(data[start:end])
                start, part = end, b""
        part += bytes(data[start:end])


def _stream(head: bytes) -> tuple[str, bytes, int, int]:
    """From the first packet: the decoder and its setup, the samples to skip at the beginning, and the rate."""
    if head.startswith(b"OpusHead"):
        # the decoder would skip these wherever it begins
        return "opus", head[:10] + b"\0\0" + head[12:], int.from_bytes(head[10:12], "little"), 48_000
    if head[1:5] == b"FLAC":
        return "flac", head[17:51], 0, 0
    raise ValueError("neither Opus nor FLAC")


def _start(pages: list[Page], headers: int, wanted: int) -> tuple[int, int]:
    """The last page that begins with a packet and not behind a sample, and the sample at which it begins."""
    found, position = (headers, 0), 0
    for number in range(headers, len(pages)):
        if position > max(0, wanted):
            break
        if not pages[number].continued:
            found = number, position
        position = max(position, pages[number].granule)
    return found


def _values(frame: Any) -> np.ndarray:
    """(channels, samples) of a decoded frame: floats as they are, whole numbers of 16 bits over 2^15."""
    values = frame.to_ndarray()
    if not frame.format.is_planar:
        values = values.reshape(frame.samples, -1).T
    return values / np.float32(1 << 15) if values.dtype == np.int16 else values
