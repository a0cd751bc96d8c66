"""Read Ogg files with one stream of Opus or FLAC, as the pipeline writes them, from any sample on.

FFmpeg's demuxer takes longer to open such a file, and to find a place in it, than its decoders take for a second of sound.
"""

import struct
import threading
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

_HEADER = struct.Struct("<5xBq12xB")  # of a page that begins with "OggS": flags, granule, number of segments
_CONTINUED = 1
_PREROLL = 3840  # samples of Opus, which decode to what they are after as many before them: 80 ms (RFC 7845)
_LONGEST = 5760  # samples of a packet of Opus
_VARIABLE = 128  # lengths of its frames
_MUSIC = 128  # the least first byte of packets that are not coded as speech
_last = threading.local()


class Page(NamedTuple):
    """A page: the sample at which its last packet ends, -1 if none does; whether it begins inside of a packet; its segments."""

    granule: int
    continued: bool
    sizes: bytes
    body: int  # offset


def decoded(data: bytes | memoryview, begin: int, end: int) -> list[tuple[int, list[np.ndarray]]]:
    """Decode what has the samples from `begin` to `end`: the number of each part's first one, and a float32 array a channel.

    Raises:
        av.error.FFmpegError, IndexError, ValueError: it is damaged.
    """
    import av

    pages = list(_pages(data))
    headers = [page for page in pages if not page.granule]
    name, setup, skip = _stream(next(_packets(data, headers), b""))
    decoder = _decoder(name, setup)
    total = pages[-1].granule  # the last packet may have more than belongs to the sound
    wanted = begin + skip - (_PREROLL if name == "opus" else 0)
    first, position = _start(pages, len(headers), wanted)
    packets = _packets(data, pages[first:])
    if name == "opus":
        position, packets = _between(packets, position, wanted, end + skip)
    parts = []
    for packet in packets:
        if position >= end + skip:
            break
        for frame in decoder.decode(av.Packet(packet)):
            parts.append((position - skip, [values[: max(0, total - position)] for values in _channels(frame)]))
            position += frame.samples
    return parts


def _decoder(name: str, setup: bytes) -> Any:
    """A decoder in its first state. A thread keeps the one that it had last: another costs as much as 0.1 s of sound."""
    import av

    if getattr(_last, "of", None) == (name, setup):
        _last.decoder.flush_buffers()
    else:
        _last.decoder = av.CodecContext.create(name, "r")
        _last.decoder.extradata, _last.decoder.thread_count = setup, 1
        _last.of = name, setup
    return _last.decoder


def _pages(data: bytes | memoryview) -> Iterator[Page]:
    offset = 0
    while offset < len(data):
        if bytes(data[offset : offset + 4]) != b"OggS" or offset + _HEADER.size > len(data):
            raise ValueError(f"no page at byte {offset}")
        flags, granule, segments = _HEADER.unpack_from(data, offset)
        start = offset + _HEADER.size
        body = start + segments
        sizes = bytes(data[start:body])
        yield Page(granule, bool(flags & _CONTINUED), sizes, body)
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


def _stream(head: bytes) -> tuple[str, bytes, int]:
    """From the first packet: the decoder and its setup, and the samples to skip at the beginning."""
    if head.startswith(b"OpusHead"):
        # the decoder would skip these wherever it begins
        return "opus", head[:10] + b"\0\0" + head[12:], int.from_bytes(head[10:12], "little")
    if head[1:5] == b"FLAC":
        return "flac", head[17:51], 0
    raise ValueError("neither Opus nor FLAC")


def _between(packets: Iterable[bytes], position: int, begin: int, end: int) -> tuple[int, Iterator[bytes]]:
    """Of packets of Opus from `position` on those with samples from `begin` to `end`, joined, and where these begin."""
    chosen, start = [], position
    for packet in packets:
        if position >= end:
            break
        position += _samples(packet)
        if position > begin:
            chosen.append(packet)
        else:
            start = position
    return start, _joined(chosen)


def _samples(packet: bytes) -> int:
    """Samples of a packet of Opus, from its first bytes (RFC 6716, section 3.1)."""
    kind, code = packet[0] >> 3, packet[0] & 3
    if kind < 12:
        samples = (480, 960, 1920, 2880)[kind & 3]
    else:
        samples = 480 << (kind & 1) if kind < 16 else 120 << (kind & 3)
    return samples * (packet[1] & 63 if code == 3 else 1 + (code > 0))


def _joined(packets: Iterable[bytes]) -> Iterator[bytes]:
    """The same frames of Opus in packets of up to 120 ms, which the decoder takes faster (RFC 6716, section 3.2.5)."""
    for kind, group in groupby(packets, key=lambda packet: packet[0]):
        alike = list(group)
        if kind & 3 or kind < _MUSIC:  # several frames each; speech
            yield from alike
            continue
        most = _LONGEST // _samples(alike[0])
        for n in range(0, len(alike), most):
            frames = [packet[1:] for packet in alike[n : n + most]]
            lengths = b"".join(_length(len(frame)) for frame in frames[:-1])
            yield bytes([kind | 3, _VARIABLE | len(frames)]) + lengths + b"".join(frames)


def _length(size: int) -> bytes:
    return bytes([size]) if size < 252 else bytes([252 + (size & 3), (size - 252) >> 2])


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


def _channels(frame: Any) -> list[np.ndarray]:
    """The samples of each channel of a decoded frame: floats as they are, whole numbers of 16 bits over 2^15."""
    if frame.format.name == "fltp":
        return [np.frombuffer(plane, np.float32, frame.samples) for plane in frame.planes]
    values = frame.to_ndarray()
    values = values if frame.format.is_planar else values.reshape(frame.samples, -1).T
    return list(values / np.float32(1 << 15))
