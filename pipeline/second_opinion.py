"""The second opinion: decord, with its own FFmpeg. Files that it would silently decode wrongly are refused.

It gives RGB, knows no mirrors, and shows all frames in the shape of the first. Where a clock goes back it leaves out one
part and repeats the end of the other. It does not report damage.
"""

import math
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import av

from longtake.pipeline.container import Unreadable, film
from longtake.pipeline.orientation import Orientation, between, orientation_of, turned

# beginnings that its demuxers, which have no whitelist, cannot mistake: MP4, Matroska, AVI, FLV, ASF, Ogg, TS, PS, GIF
_FIRST_BYTES = re.compile(
    rb"(?s)....(ftyp|moov|mdat|wide|free|skip)|\x1aE\xdf\xa3|RIFF....AVI |FLV\x01|0&\xb2u\x8ef\xcf\x11|OggS|GIF8"
    rb"|G.{187}G.{187}G|\0\0\x01\xba"
)
# parts of its errors that are no use to people: places in its source and in memory
_PLACES = re.compile(r"\[[\d:]+\] \S+:\d+: |Check failed: .*?\([^()]*\) |\[/dev/fd/\d+\] |Stack trace.*", re.S)
_BACK_SECONDS = 0.25


def decord_frames(path: str) -> Iterator[tuple[av.VideoFrame, float | None, Orientation]]:
    """Each frame, its time by the container's clock or None, and its orientation. Raises Unreadable."""
    import decord

    times, first = _scan(path)
    orientation = between(turned(first.rotation), orientation_of(first))
    shape = (first.width, first.height)
    with Path(path).open("rb", buffering=0) as file:
        if not _FIRST_BYTES.match(file.read(1 << 10)):
            raise Unreadable("it begins as no format that decord may open; use decoder: pyav")
        try:
            # by its descriptor, since a name might be read as a pattern of names
            reader = decord.VideoReader(f"/dev/fd/{file.fileno()}", num_threads=1)
            if len(times) != len(reader):
                times = [float(reader.get_frame_timestamp(n)[0]) for n in range(len(reader))]
            # in AVI some are NaN: then the frame rate gives the times
            usable = all(a < b for a, b in pairwise(times)) and all(map(math.isfinite, times))
            for number in range(len(reader)):
                picture = reader[number].asnumpy()
                if picture.shape[1::-1] not in (shape, shape[::-1]):
                    raise Unreadable("decord takes another one of its video streams; use decoder: pyav")
                image = av.VideoFrame.from_ndarray(picture, format="rgb24")
                yield image, times[number] if usable else None, orientation
        except (decord.DECORDError, IndexError) as e:
            message = " ".join(_PLACES.sub("", str(e)).split()).removeprefix("ERROR ")
            raise Unreadable(f"decord cannot read it: {message}") from e


def _scan(path: str) -> tuple[list[float], Any]:
    """The times of all packets in the order of display, and the first key frame.

    Raises:
        Unreadable: the clock goes back or the shape changes, or no key frame can be decoded.
    """
    times: list[float] = []
    before, first = -math.inf, None
    with film(path) as (container, stream):
        stream.codec_context.skip_frame = "NONKEY"
        try:
            for packet in container.demux(stream):
                if packet.size and packet.dts is not None:
                    if packet.dts * packet.time_base < before - _BACK_SECONDS:
                        raise Unreadable("its clock goes back, where decord loses frames; use decoder: pyav")
                    before = float(packet.dts * packet.time_base)
                if packet.size and packet.pts is not None:
                    times.append(float(packet.pts * packet.time_base))
                for image in packet.decode():
                    first = first or image
                    if (image.width, image.height) != (first.width, first.height):
                        raise Unreadable("its shape changes, which decord does not show; use decoder: pyav")
        except av.error.FFmpegError as e:
            raise Unreadable(f"it is damaged, which decord does not tell; use decoder: pyav ({e.strerror})") from e
    if first is None:
        raise Unreadable("no decodable frame")
    return sorted(times), first
