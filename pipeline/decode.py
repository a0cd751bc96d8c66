"""Decode an untrusted video: the facts of its container, and its frames in order. Two decoders, one interface.

PyAV is the default: it gives the codec's planes, so that scaling and colour conversion happen once. decord is the second
opinion (see second_opinion.py).
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import chain, pairwise
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter

from longtake.pipeline import hdr as tone
from longtake.pipeline.container import Unreadable, film, seconds_of, unread
from longtake.pipeline.orientation import Orientation, orientation_of, shown_size, upright
from longtake.pipeline.second_opinion import decord_frames

_MAX_DAMAGED_PACKETS = 1000  # in a row
_READ_AS = {
    3: 2,
    10: 9,
}  # colour matrices of ITU-T H.273 that swscale refuses: reserved, BT.2020 with constant luminance
_TARGET = {
    "dst_colorspace": Colorspace.ITU601,
    "dst_color_range": ColorRange.MPEG,
    "interpolation": Interpolation.BICUBIC,
    "threads": 1,
}
_BACK_SECONDS = 0.25  # times that go back by less are out of order, as for B-frames in AVI; by more, a new clock begins


@dataclass(frozen=True)
class Probe:
    """What the container says; 0 where it says nothing. Sizes are as shown: after orientation and sample aspect ratio."""

    codec: str
    width: int
    height: int
    fps: float
    frames: int
    seconds: float  # of the stream, else of the file
    stream_seconds: float
    coded_pixels: int


@dataclass(frozen=True)
class Frame:
    """A decoded frame: its number in the source, seconds since the first one, and the picture."""

    number: int
    seconds: float  # never goes back, even if the clock does
    duration: float  # seconds by the container, 0.0 where it says nothing
    image: Any  # av.VideoFrame
    orientation: Orientation
    aspect: Fraction | None  # of a sample
    starts: bool  # it does not continue the frame before: the clock went back, or damaged frames were between

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as shown."""
        return shown_size(self.image.width, self.image.height, self.aspect, self.orientation)

    @property
    def shape(self) -> tuple[Any, ...]:
        """What has to be equal for frames to go through one filter."""
        return self.image.width, self.image.height, self.image.format.name, self.orientation, self.aspect


@dataclass
class Tally:
    """Counts of what decoding met."""

    packets: int = 0  # with a frame to show
    refused: int = 0  # packets that the decoder refused
    damaged: int = 0  # frames left out: flagged by the decoder, or predicted from flagged ones
    turns_back: int = 0  # how often the clock went back
    ended: str = ""  # why decoding ended too early
    # a pair for each clock: seconds since the first frame at which it begins, and its time at second 0
    clocks: list[tuple[float, float]] = field(default_factory=list)


def probe(path: str) -> Probe:
    """Read the container's header and the first frame. Raises Unreadable."""
    with film(path) as (container, stream):
        first = next((image for image in _decoded(container, stream, Tally()) if image is not None), None)
        if first is None:
            raise Unreadable("no decodable frame")
        width, height = shown_size(first.width, first.height, stream.sample_aspect_ratio, orientation_of(first))
        stream_seconds = seconds_of(stream)
        return Probe(
            codec=stream.codec_context.name,
            width=width,
            height=height,
            fps=float(stream.average_rate or stream.guessed_rate or 0),
            frames=stream.frames or 0,
            seconds=stream_seconds or max(0.0, (container.duration or 0) / 1e6),
            stream_seconds=stream_seconds,
            coded_pixels=first.width * first.height,
        )


def frames(path: str, decoder: str = "pyav", tally: Tally | None = None) -> Iterator[Frame]:
    """All intact frames in order, with times that never go back; `tally` counts what is left out. Raises Unreadable."""
    yield from {"pyav": _pyav_frames, "decord": _decord_frames}[decoder](path, tally or Tally())


def _pyav_frames(path: str, tally: Tally) -> Iterator[Frame]:
    with film(path) as (container, stream):
        interval = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        intact = _intact(_decoded(container, stream, tally), stream, tally)
        timed = ((frame, _time(frame.image)) for frame in _deinterlaced(intact))
        for frame, seconds, back in monotonic(timed, interval, tally):
            image = frame.image
            # integers: a product of fractions would cost more than the frame's other bookkeeping
            base = image.time_base if image.duration else None
            duration = image.duration * base.numerator / base.denominator if base else 0.0
            starts = frame.starts or back
            yield Frame(frame.number, seconds, duration, image, frame.orientation, frame.aspect, starts)
        tally.ended = tally.ended or unread(path, container)


def _time(image: Any) -> float | None:
    return None if image.time is None or not math.isfinite(image.time) else float(image.time)


def monotonic(
    timed: Iterable[tuple[Any, float | None]], interval: float, tally: Tally
) -> Iterator[tuple[Any, float, bool]]:
    """Each picture with its seconds since the first one, which only grow, and whether the clock went back before it.

    Where the clock goes back, as between recordings that were joined, time continues. A time that is missing, or alone out
    of line, is one interval after the time before.

    Args:
        timed: pictures with their times by the container's clock.
        interval: seconds from one picture to the next by the frame rate.
    """
    origin, last, shown = math.nan, -interval, interval
    tolerance = max(_BACK_SECONDS, 2 * interval)
    for (picture, time), (_, later) in pairwise(chain(timed, [(None, None)])):
        back = False
        seconds = last + interval
        if time is not None:
            if math.isnan(origin):
                origin = time
                tally.clocks.append((0.0, origin))
            seconds = time - origin
            if seconds < last - tolerance:
                back = later is None or not 0 < later - origin - last < 2 * tolerance
                seconds = last + max(interval, shown) if back else last
                if back:
                    origin = time - seconds
                    tally.clocks.append((seconds, origin))
        if seconds <= last:
            seconds = last + interval * 1e-3
        tally.turns_back += back
        shown = interval if seconds - last > 2 * tolerance else seconds - last
        last = seconds
        yield picture, seconds, back


def _decord_frames(path: str, tally: Tally) -> Iterator[Frame]:
    with film(path) as (_, stream):
        interval, aspect = 1 / float(stream.average_rate or stream.guessed_rate or 25), stream.sample_aspect_ratio
    timed = (((image, orientation), time) for image, time, orientation in decord_frames(path))
    for number, ((image, orientation), seconds, back) in enumerate(monotonic(timed, interval, tally)):
        tally.packets += 1
        yield Frame(number, seconds, 0.0, image, orientation, aspect, back)


def _decoded(container: Any, stream: Any, tally: Tally) -> Iterator[Any]:
    """The frames; None where the decoder refused a packet that later frames may need."""
    damaged, missing = 0, False
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError as e:
            # a demuxer cannot continue after its own error: flush the frames that are still in the decoder
            tally.ended = e.strerror or str(e)
            with contextlib.suppress(av.error.FFmpegError):
                yield from stream.codec_context.decode(None)
            return
        tally.packets += _is_shown(packet, stream)
        try:
            images = packet.decode()
        except (av.error.FFmpegError, MemoryError):
            tally.refused += 1
            damaged += 1
            missing |= not packet.is_disposable
            if damaged > _MAX_DAMAGED_PACKETS:
                tally.ended = f"{damaged} damaged packets, one after the other"
                return
            continue
        # the empty packet at the end only flushes frames that were decoded before
        if missing and packet.size:
            yield None
            missing = False
        damaged = 0 if packet.size else damaged
        yield from images


def _is_shown(packet: Any, stream: Any) -> bool:
    """Whether a packet has a frame to show: VP8 has hidden ones, from which others are predicted."""
    if not packet.size or packet.is_discard:
        return False
    return stream.codec_context.name != "vp8" or bool(bytes(memoryview(packet)[:1])[0] & 0x10)


def _intact(images: Iterator[Any], stream: Any, tally: Tally) -> Iterator[Frame]:
    """Frames, without times yet, that are neither damaged nor predicted from damaged ones: after a damaged frame, none
    until the next intact key frame.

    Before the first key frame the decoder's flags decide: it knows when a stream that refreshes bit by bit is complete.
    """
    # a shape that the codec changes comes with a key frame; a shape that the container gives holds for all frames
    of_codec = stream.sample_aspect_ratio == stream.codec_context.sample_aspect_ratio
    aspect = stream.sample_aspect_ratio
    number, keyed, broken, starts = 0, False, False, False
    for image in images:
        if image is None:
            broken, starts = keyed, True
            continue
        number += 1
        keyed |= image.key_frame
        broken = keyed if image.is_corrupt else broken and not image.key_frame
        if image.is_corrupt or broken:
            tally.damaged, starts = tally.damaged + 1, True
            continue
        if of_codec and image.key_frame:
            aspect = stream.codec_context.sample_aspect_ratio
        yield Frame(number - 1, math.nan, 0.0, image, orientation_of(image), aspect, starts)
        starts = False


def _deinterlaced(frames: Iterator[Frame]) -> Iterator[Frame]:
    """Progressive frames (yadif, one frame from two fields), from the first interlaced frame on; earlier ones unchanged."""
    graph, following, interlaced = None, None, False  # following: the frame that the filter gives next

    def filtered(image: Any) -> Iterator[Frame]:
        nonlocal following
        assert following is not None
        for progressive in _filtered(graph, image):
            yield replace(following, image=progressive)
            following = replace(following, number=following.number + 1, starts=False)

    for frame in frames:
        if following is not None and (frame.starts or frame.shape != following.shape):
            yield from filtered(None)
            graph = following = None
        interlaced |= frame.image.interlaced_frame
        if not interlaced:
            yield frame
            continue
        if following is None:
            graph, following = _deinterlacer(frame.image), frame
        yield from filtered(frame.image)
    if following is not None:
        yield from filtered(None)


def _deinterlacer(image: Any) -> Any:
    graph = av.filter.Graph()
    buffer = graph.add_buffer(width=image.width, height=image.height, format=image.format, time_base=image.time_base)
    yadif = graph.add("yadif", "mode=send_frame:deint=interlaced")
    graph.link_nodes(buffer, yadif, graph.add("buffersink")).configure()
    return graph


def _filtered(graph: Any, image: Any) -> Iterator[Any]:
    graph.push(image)
    # an empty or a finished filter raises one of these
    with contextlib.suppress(BlockingIOError, av.error.EOFError):
        while True:
            yield graph.pull()


def to_planes(frame: Frame, scaled: tuple[int, int], crop: tuple[int, int], scaler: Any) -> np.ndarray:
    """Scale, convert and turn a frame in one pass, then crop its centre.

    Args:
        scaled: (width, height) upright, both even.
        crop: (width, height) upright, both even, no larger.
        scaler: a VideoReformatter, which keeps its tables: use one for all frames of a source.

    Returns:
        (3/2 * height, width) uint8, planar YUV 4:2:0, BT.601, limited range.

    Raises:
        Unreadable: its colours cannot be converted, as with YCgCo.
    """
    width, height = scaled[::-1] if frame.orientation[0] else scaled
    image = frame.image
    image.colorspace = _READ_AS.get(image.colorspace, image.colorspace)
    try:
        if tone.is_hdr(image):
            # at the small size, where it costs little; the reformat below only converts, with its own tables
            image, scaler = tone.sdr_image(image, width, height, scaler), VideoReformatter()
        small = scaler.reformat(image, width, height, "yuv420p", **_TARGET)
    except av.error.OSError as e:
        raise Unreadable(
            f"its colours cannot be converted: matrix {frame.image.colorspace} of H.273 ({e.strerror})"
        ) from e
    planes = np.empty((crop[1] * 3 // 2, crop[0]), np.uint8)
    # the luma offset is even, so that chroma stays aligned
    left, top = ((side - inner) // 4 * 2 for side, inner in zip(scaled, crop, strict=True))
    for plane, target, subsampling in zip(small.planes, (luma(planes), *chroma(planes)), (1, 2, 2), strict=True):
        h, w = target.shape
        x, y = left // subsampling, top // subsampling
        # the only copy: rows of a decoder's planes are longer than the picture
        rows = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)[
            : height // subsampling, : width // subsampling
        ]
        target[:] = upright(rows, frame.orientation)[y : y + h, x : x + w]
    return planes


def luma(planes: np.ndarray) -> np.ndarray:
    """The Y plane, (height, width) uint8, 16 (black) to 235 (white)."""
    return planes[: planes.shape[0] * 2 // 3]


def chroma(planes: np.ndarray) -> np.ndarray:
    """The U and V planes, (2, height/2, width/2) uint8, 128 is grey."""
    height, width = planes.shape[0] * 2 // 3, planes.shape[1]
    return planes[height:].reshape(2, height // 2, width // 2)
