"""Opening an untrusted video: what its container says, and its frames in order. Two decoders, one interface.

PyAV is the default: it gives the codec's own planes, so that scaling and colour conversion happen once. decord is
the second opinion for what PyAV's demuxer refuses; it gives RGB.
"""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from longtake.pipeline import tone

_MAX_DAMAGED_PACKETS = 1000
_NO_VIDEO = "no video stream"


class Unreadable(ValueError):
    """The file is not a video that can be decoded; the message says why in one line."""


@dataclass(frozen=True)
class Probe:
    """What the container says. Sizes are as shown: after rotation and sample aspect ratio."""

    codec: str
    width: int
    height: int
    fps: float
    frames: int  # 0 where it says nothing
    seconds: float  # 0.0 where it says nothing
    coded_pixels: int


@dataclass(frozen=True)
class Frame:
    """A decoded frame: its number in the source, seconds since the first one, and the picture."""

    number: int
    seconds: float
    image: Any  # av.VideoFrame
    rotation: int  # degrees clockwise that would show it upright: 0, 90, 180, 270


def probe(path: str) -> Probe:
    """Read the container's header and the first frame. Raises Unreadable."""
    with _opened(path) as (container, stream):
        with contextlib.suppress(StopIteration):
            first = next(_decoded(container, stream))
            width, height = shown_size(first.width, first.height, stream.sample_aspect_ratio, _rotation(first))
            seconds = float(stream.duration * stream.time_base) if stream.duration else (container.duration or 0) / 1e6
            return Probe(
                codec=stream.codec_context.name,
                width=width,
                height=height,
                fps=float(stream.average_rate or stream.guessed_rate or 0),
                frames=stream.frames or 0,
                seconds=max(0.0, seconds),
                coded_pixels=first.width * first.height,
            )
        raise Unreadable("no decodable frame")


def frames(path: str, decoder: str = "pyav") -> Iterator[Frame]:
    """All frames in order, with times that never go back. Damaged packets are passed over. Raises Unreadable."""
    yield from {"pyav": _pyav_frames, "decord": _decord_frames}[decoder](path)


def shown_size(width: int, height: int, sample_aspect: Fraction | None, rotation: int) -> tuple[int, int]:
    """(width, height) after stretching to square pixels and turning upright."""
    if sample_aspect and sample_aspect > 0:
        width = round(width * sample_aspect)
    return (height, width) if rotation in (90, 270) else (width, height)


def _pyav_frames(path: str) -> Iterator[Frame]:
    with _opened(path) as (container, stream):
        step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        start, last = math.nan, -step
        for number, image in enumerate(_progressive(_decoded(container, stream))):
            time = image.time
            if time is None or not math.isfinite(time):
                seconds = last + step
            else:
                start = time if math.isnan(start) else start
                seconds = time - start
            if seconds <= last:
                seconds = last + step * 1e-3
            last = seconds
            yield Frame(number, seconds, image, _rotation(image))


def _decord_frames(path: str) -> Iterator[Frame]:
    import decord

    try:
        reader = decord.VideoReader(path, num_threads=1)
        for number in range(len(reader)):
            # decord turns frames upright by itself
            image = av.VideoFrame.from_ndarray(reader[number].asnumpy(), format="rgb24")
            yield Frame(
                number, float(reader.get_frame_timestamp(number)[0] - reader.get_frame_timestamp(0)[0]), image, 0
            )
    except (decord.DECORDError, IndexError) as e:
        raise Unreadable(str(e).strip().splitlines()[-1]) from e


@contextlib.contextmanager
def _opened(path: str) -> Iterator[tuple[Any, Any]]:
    try:
        container = av.open(path, metadata_errors="ignore")
    except (av.error.FFmpegError, ValueError) as e:
        raise Unreadable(getattr(e, "strerror", None) or str(e)) from e
    with container:
        if not container.streams.video:
            raise Unreadable(_NO_VIDEO)
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        yield container, stream


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    damaged = 0
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError:
            # the demuxer cannot go on after an error of its own: flush what the decoder still holds
            with contextlib.suppress(av.error.FFmpegError):
                yield from stream.codec_context.decode(None)
            return
        try:
            yield from packet.decode()
        except (av.error.FFmpegError, MemoryError):
            damaged += 1
            if damaged > _MAX_DAMAGED_PACKETS:
                return


def _progressive(images: Iterator[Any]) -> Iterator[Any]:
    """Interlaced frames woven into whole ones (yadif, one frame from two fields); others pass as they are."""
    graph, shape = None, None
    for image in images:
        if graph is None and not image.interlaced_frame:
            yield image
            continue
        current = (image.width, image.height, image.format.name)
        if shape != current:
            if graph is not None:
                yield from _pulled(graph, None)
            graph, shape = _weaver(image), current
        yield from _pulled(graph, image)
    if graph is not None:
        yield from _pulled(graph, None)


def _weaver(image: Any) -> Any:
    graph = av.filter.Graph()
    first = graph.add_buffer(width=image.width, height=image.height, format=image.format, time_base=image.time_base)
    graph.link_nodes(first, graph.add("yadif", "mode=send_frame:deint=interlaced"), graph.add("buffersink")).configure()
    return graph


def _pulled(graph: Any, image: Any) -> Iterator[Any]:
    graph.push(image)
    # an empty or a finished filter says so by an error
    with contextlib.suppress(BlockingIOError, av.error.EOFError):
        while True:
            yield graph.pull()


def _rotation(image: Any) -> int:
    # PyAV counts counter-clockwise
    return round(-getattr(image, "rotation", 0) / 90) % 4 * 90


def is_no_video(error: Unreadable) -> bool:
    return str(error) == _NO_VIDEO


def to_planes(frame: Frame, scaled: tuple[int, int], crop: tuple[int, int], scaler: Any) -> np.ndarray:
    """Scale, convert and turn a frame in one pass, then cut the centre.

    Args:
        scaled: (width, height) upright, both even.
        crop: (width, height) upright, both even, no larger.
        scaler: a VideoReformatter, the same one for all frames of a source: it keeps its tables.

    Returns:
        (3/2 * height, width) uint8, planar YUV 4:2:0, BT.601, limited range.
    """
    turned = frame.rotation in (90, 270)
    width, height = scaled[::-1] if turned else scaled
    image = frame.image
    if tone.is_hdr(image):
        # at the small size, where it costs little; what follows only converts, with tables of its own
        image, scaler = tone.sdr_image(image, width, height, scaler), VideoReformatter()
    image = scaler.reformat(
        image,
        width,
        height,
        "yuv420p",
        dst_colorspace="ITU601",
        dst_color_range="MPEG",
        interpolation="BICUBIC",
        threads=1,
    )
    planes = [_plane(p) for p in image.planes]
    if frame.rotation:
        planes = [np.rot90(p, -frame.rotation // 90) for p in planes]
    cut = []
    for plane, part in zip(planes, (1, 2, 2), strict=True):
        w, h = crop[0] // part, crop[1] // part
        # the luma offset stays even so that chroma lies where it belongs
        left, top = ((scaled[0] - crop[0]) // 4 * 2) // part, ((scaled[1] - crop[1]) // 4 * 2) // part
        cut.append(plane[top : top + h, left : left + w].reshape(-1))
    return np.concatenate(cut).reshape(crop[1] * 3 // 2, crop[0])


def _plane(plane: Any) -> np.ndarray:
    return np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width]


def luma(planes: np.ndarray) -> np.ndarray:
    """The Y plane, (height, width) uint8, 16 (black) to 235 (white)."""
    return planes[: planes.shape[0] * 2 // 3]


def chroma(planes: np.ndarray) -> np.ndarray:
    """The U and V planes, (2, height/2, width/2) uint8, 128 is grey."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    return planes[height:].reshape(2, height // 2, width // 2)
