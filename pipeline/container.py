"""Choose the stream of an untrusted file that is the film, and read what its container says about it."""

import contextlib
import mmap
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import av

from longtake.datasets import media

_COVER_CODECS = ("bmp", "gif", "jpegxl", "mjpeg", "png", "tiff", "webp")
_FLV = re.compile(rb"FLV\x01[\0-\x05]\0{3}\x09\0{4}")  # a header, and the size of no tag before it
_COUNTED_PACKETS = 64  # of the other streams; a cover has no second packet before them


class Unreadable(ValueError):
    """The file is not a video that can be decoded; the message says why in one line."""


class NoVideo(Unreadable):
    """The file has no video stream."""


@contextlib.contextmanager
def film(path: str) -> Iterator[tuple[Any, Any]]:
    """Open a file; gives its container and the stream to show, which is decoded by one thread. Raises Unreadable."""
    with contextlib.ExitStack() as stack:
        try:
            container = stack.enter_context(media.opened(path))
            stream = _chosen(path, container)
        except Unreadable:
            raise
        except (av.error.FFmpegError, ValueError, OSError) as e:
            raise Unreadable(getattr(e, "strerror", None) or str(e)) from e
        stream.codec_context.thread_count = 1
        yield container, stream


def _chosen(path: str, container: Any) -> Any:
    """The stream to show: no cover, if there is another; the default one; the largest; the first."""
    videos = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
    if not videos:
        raise NoVideo("no video stream")
    decodable = [s for s in videos if s.codec_context is not None]
    if not decodable:
        raise Unreadable("no decoder for its video stream")
    covers = _covers(path, decodable) if len(decodable) > 1 else set()

    def rank(stream: Any) -> tuple[bool, bool, bool, int]:
        flags, context = stream.disposition, stream.codec_context
        secondary = bool(flags & (flags.still_image | flags.timed_thumbnails | flags.dependent))
        return stream.index not in covers, not secondary, bool(flags & flags.default), context.width * context.height

    return max(decodable, key=rank)


def unread(path: str, container: Any) -> str:
    """A note where FFmpeg silently ignores the end of a file: FLV that follows other FLV with its own header. Else empty."""
    if container.format.name == "flv":
        with Path(path).open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if header := _FLV.search(data, 1):
                return f"another recording begins at byte {header.start()}, which FFmpeg does not read"
    return ""


def _covers(path: str, videos: list[Any]) -> set[int]:
    """The indices of those of several streams that are a single picture."""
    suspects = {s.index for s in videos if s.codec_context.name in _COVER_CODECS}
    if not suspects or len(suspects) == len(videos):
        return set()
    packets: Counter[int] = Counter()  # by stream
    with media.opened(path) as container, contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux([container.streams[s.index] for s in videos]):
            packets[packet.stream_index] += packet.size > 0
            if sum(n for index, n in packets.items() if index not in suspects) >= _COUNTED_PACKETS:
                break
    return {index for index in suspects if packets[index] <= 1}


def seconds_of(stream: Any) -> float:
    """The length of a stream by its container, 0.0 where it says nothing."""
    if stream.duration:
        return max(0.0, float(stream.duration * stream.time_base))
    # Matroska: 00:00:05.000000000
    with contextlib.suppress(ValueError):
        hours, minutes, seconds = stream.metadata.get("DURATION", "").split(":")
        return int(hours) * 3600 + int(minutes) * 60 + float(seconds)
    return 0.0
