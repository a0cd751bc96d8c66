"""Opening an untrusted video: what its container says, and its frames in order. Two decoders, one interface.

PyAV is the default: it gives the codec's own planes, so that scaling and colour conversion happen once. decord is
the second opinion (see second_opinion.py).
"""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import VideoReformatter

from longtake.pipeline import hdr as tone
from longtake.pipeline.container import Unreadable, film, seconds_of, unread
from longtake.pipeline.orientation import Orientation, orientation_of, shown_size, upright
from longtake.pipeline.second_opinion import decord_frames

_MAX_DAMAGED_PACKETS = 1000  # one after the other
_BACK_SECONDS = 0.25  # times that go back by less are in disorder, as of B-frames in AVI; by more, the clock is another


@dataclass(frozen=True)
class Probe:
    """What the container says. Sizes are as shown: after orientation and sample aspect ratio."""

    codec: str
    width: int
    height: int
    fps: float
    frames: int  # 0 where it says nothing
    seconds: float  # 0.0 where it says nothing; where it says nothing of the stream, those of the whole
    stream_seconds: float  # 0.0 where it says nothing
    coded_pixels: int


@dataclass(frozen=True)
class Frame:
    """A decoded frame: its number in the source, seconds since the first one, and the picture."""

    number: int
    seconds: float  # as shown: where the clock goes back, it goes on from there
    duration: float  # seconds that the container says it is shown, 0.0 where it says nothing
    image: Any  # av.VideoFrame
    orientation: Orientation
    aspect: Fraction | None  # of a sample
    starts: bool  # nothing joins it to the frame before: the clock went back, or damaged frames lay between

    @property
    def size(self) -> tuple[int, int]:
        """(width, height) as shown."""
        return shown_size(self.image.width, self.image.height, self.aspect, self.orientation)


@dataclass
class Tally:
    """What decoding has met with."""

    packets: int = 0  # that hold a frame to show
    refused: int = 0  # of them, by the decoder
    damaged: int = 0  # frames left out: flagged by the decoder, or predicted from such
    turns_back: int = 0  # of the clock
    ended: str = ""  # why it came to an end too early


@dataclass(frozen=True)
class _Picture:
    number: int
    image: Any
    orientation: Orientation
    aspect: Fraction | None
    starts: bool

    @property
    def shape(self) -> tuple[Any, ...]:
        return self.image.width, self.image.height, self.image.format.name, self.orientation, self.aspect


def probe(path: str) -> Probe:
    """Read the container's header and the first frame. Raises Unreadable."""
    with film(path) as (container, stream):
        with contextlib.suppress(StopIteration):
            first = next(image for image in _decoded(container, stream, Tally()) if image is not None)
            width, height = shown_size(first.width, first.height, stream.sample_aspect_ratio, orientation_of(first))
            own = seconds_of(stream)
            return Probe(
                codec=stream.codec_context.name,
                width=width,
                height=height,
                fps=float(stream.average_rate or stream.guessed_rate or 0),
                frames=stream.frames or 0,
                seconds=own or max(0.0, (container.duration or 0) / 1e6),
                stream_seconds=own,
                coded_pixels=first.width * first.height,
            )
        raise Unreadable("no decodable frame")


def frames(path: str, decoder: str = "pyav", tally: Tally | None = None) -> Iterator[Frame]:
    """All whole frames in order, with times that never go back; `tally` counts what is left out. Raises Unreadable."""
    yield from {"pyav": _pyav_frames, "decord": _decord_frames}[decoder](path, tally or Tally())


def _pyav_frames(path: str, tally: Tally) -> Iterator[Frame]:
    with film(path) as (container, stream):
        step = 1 / float(stream.average_rate or stream.guessed_rate or 25)
        whole = _whole(_decoded(container, stream, tally), stream, tally)
        timed = ((picture, _time(picture.image)) for picture in _progressive(whole))
        for shown, seconds, back in _clocked(timed, step, tally):
            image = shown.image
            duration = float(image.duration * image.time_base) if image.duration and image.time_base else 0.0
            starts = shown.starts or back
            yield Frame(shown.number, seconds, duration, image, shown.orientation, shown.aspect, starts)
        tally.ended = tally.ended or unread(path, container)


def _time(image: Any) -> float | None:
    return None if image.time is None or not math.isfinite(image.time) else float(image.time)


def _clocked(timed: Iterable[tuple[Any, float | None]], step: float, tally: Tally) -> Iterator[tuple[Any, float, bool]]:
    """Each picture with its seconds since the first one, which only grow, and whether the clock went back before it.

    Where it does, as between recordings that were joined, time goes on from there. A time that is missing, or alone
    out of line, is a step after the one before.
    """
    origin, last, shown = math.nan, -step, step
    for (picture, time), (_, later) in _pairs(timed):
        back = False
        seconds = last + step
        if time is not None:
            origin = time if math.isnan(origin) else origin
            seconds = time - origin
            if seconds < last - max(_BACK_SECONDS, 2 * step):
                back = later is None or not 0 < later - origin - last < 2 * max(_BACK_SECONDS, 2 * step)
                seconds = last + max(step, shown) if back else last
                origin = time - seconds if back else origin
        if seconds <= last:
            seconds = last + step * 1e-3
        tally.turns_back += back
        shown = step if seconds - last > 2 * max(_BACK_SECONDS, 2 * step) else seconds - last
        last = seconds
        yield picture, seconds, back


def _pairs(
    timed: Iterable[tuple[Any, float | None]],
) -> Iterator[tuple[tuple[Any, float | None], tuple[Any, float | None]]]:
    """Each item with the next one; the last with (None, None)."""
    before = None
    for item in timed:
        if before is not None:
            yield before, item
        before = item
    if before is not None:
        yield before, (None, None)


def _decord_frames(path: str, tally: Tally) -> Iterator[Frame]:
    with film(path) as (_, stream):
        step, aspect = 1 / float(stream.average_rate or stream.guessed_rate or 25), stream.sample_aspect_ratio
    timed = (((image, orientation), time) for image, time, orientation in decord_frames(path))
    for number, ((image, orientation), seconds, back) in enumerate(_clocked(timed, step, tally)):
        tally.packets += 1
        yield Frame(number, seconds, 0.0, image, orientation, aspect, back)


def _decoded(container: Any, stream: Any, tally: Tally) -> Iterator[Any]:
    """The frames; None where the decoder has refused a packet that others may need."""
    damaged, missing = 0, False
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError as e:
            # the demuxer cannot go on after an error of its own: flush what the decoder still holds
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
        # what comes out at the end was decoded before
        if missing and packet.size:
            yield None
            missing = False
        damaged = 0 if packet.size else damaged
        yield from images


def _is_shown(packet: Any, stream: Any) -> bool:
    """Whether it holds a frame to show: VP8 has some that others are predicted from and no one sees."""
    if not packet.size or packet.is_discard:
        return False
    return stream.codec_context.name != "vp8" or bool(bytes(memoryview(packet)[:1])[0] & 0x10)


def _whole(images: Iterator[Any], stream: Any, tally: Tally) -> Iterator[_Picture]:
    """Frames that are neither damaged nor predicted from damaged ones: after one, none until the next whole key frame.

    Before the first key frame the decoder itself knows when a stream that refreshes bit by bit is whole.
    """
    # a shape that the codec changes comes with a key frame; one that the container gives stands for all
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
        yield _Picture(number - 1, image, orientation_of(image), aspect, starts)
        starts = False


def _progressive(pictures: Iterator[_Picture]) -> Iterator[_Picture]:
    """Interlaced frames woven into whole ones (yadif, one frame from two fields); those before the first pass as they are."""
    graph, first, woven = None, None, False

    def pulled(image: Any) -> Iterator[_Picture]:
        nonlocal first
        assert first is not None
        for whole in _pulled(graph, image):
            yield replace(first, image=whole)
            first = replace(first, number=first.number + 1, starts=False)

    for picture in pictures:
        if first is not None and (picture.starts or picture.shape != first.shape):
            yield from pulled(None)
            graph = first = None
        woven |= picture.image.interlaced_frame
        if not woven:
            yield picture
            continue
        if first is None:
            graph, first = _weaver(picture.image), picture
        yield from pulled(picture.image)
    if first is not None:
        yield from pulled(None)


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


def to_planes(frame: Frame, scaled: tuple[int, int], crop: tuple[int, int], scaler: Any) -> np.ndarray:
    """Scale, convert and turn a frame in one pass, then cut the centre.

    Args:
        scaled: (width, height) upright, both even.
        crop: (width, height) upright, both even, no larger.
        scaler: a VideoReformatter, the same one for all frames of a source: it keeps its tables.

    Returns:
        (3/2 * height, width) uint8, planar YUV 4:2:0, BT.601, limited range.
    """
    width, height = scaled[::-1] if frame.orientation[0] else scaled
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
    planes = [upright(_plane(p), frame.orientation) for p in image.planes]
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
