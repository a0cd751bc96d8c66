"""Decode the sound of an untrusted file as samples on the clock of its pictures.

It takes a pass of its own over the local file, after that over the pictures, and ends behind the last clip. The times of
decoded frames say where sound belongs: they begin where edit lists say so, after the priming of encoders. Sound that goes on
without a gap is resampled as one, and its samples are counted; where its times leave the count, it begins anew.
"""

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import av
import numpy as np

from longtake.datasets import media
from longtake.pipeline.container import film
from longtake.pipeline.decode import Tally
from longtake.pipeline.decode import frames as pictures

Clock = tuple[float, float]  # see decode.Tally.clocks
Piece = tuple[int, np.ndarray]  # the number of its first sample since the first picture, and (n, channels) int16

# times are rounded to milliseconds in many containers; no packet that may be missing is as short
_JITTER_SECONDS = 0.01
_BACK_SECONDS = 0.25  # as for pictures: times that go back by more are of a new clock
_MAX_RATE, _MAX_CHANNELS = 768_000, 64
_MAX_DAMAGED_PACKETS = 1000  # in a row
_PACKETS_A_SECOND, _SPARE_SECONDS = 2000, 60
_SECONDARY = ("comment", "descriptions", "hearing_impaired", "visual_impaired", "clean_effects", "non_diegetic")


class Unheard(Exception):
    """Why nothing of a source's sound can be kept: a key of audio.REASONS, and a line for people."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason, self.detail = reason, detail


@dataclass
class Heard:
    """What decoding the sound met."""

    packets: int = 0
    refused: int = 0  # packets that the decoder refused
    seconds: float = 0.0
    ended: str = ""  # why decoding ended too early


def clocks_of(path: str, decoder: str = "pyav") -> list[Clock]:
    """The clocks of a source's pictures, as cutting it finds them. Raises Unreadable.

    All pictures are decoded only where some packet's clock goes back.
    """
    tally, whole = Tally(), _goes_back(path)
    for _ in pictures(path, decoder, tally):
        if not whole:
            break
    return tally.clocks


def _goes_back(path: str) -> bool:
    last = None
    with film(path) as (container, stream), contextlib.suppress(av.error.FFmpegError):
        for packet in container.demux(stream):
            if packet.size:
                if packet.dts is None or (last is not None and packet.dts < last):
                    return True
                last = packet.dts
    return False


def soundtrack(
    path: str,
    rate: int,
    channels: int,
    clocks: Sequence[Clock],
    seconds: float,
    heard: Heard,
    formats: Sequence[str] = media.FORMATS,
) -> Iterator[Piece]:
    """The sound in pieces that follow each other, with gaps where there is none.

    Args:
        seconds: the end of the last clip; a source whose sound is much longer than that is not decoded to its end.
        heard: counts what is left out.
        formats: that are opened.

    Raises:
        Unheard: there is no sound, or it exceeds a limit.
        av.error.FFmpegError, ValueError: it cannot be opened, or converted.
    """
    with media.opened(path, formats) as container:
        stream = _chosen(container)
        stream.codec_context.thread_count = 1
        decoded = _bounded(_decoded(container, stream, heard, seconds), heard, seconds)
        filled, starts = 0, [round(start * rate) for start, _ in clocks]
        for number, first, samples in _placed(decoded, clocks, rate, channels, heard):
            # of what overlaps the earlier sound stays, and no clock gives sound to the pictures of the next
            low = max(filled, starts[number] if number else 0)
            high = starts[number + 1] if number + 1 < len(starts) else first + len(samples)
            part = samples[max(0, low - first) : max(0, high - first)]
            if len(part):
                filled = max(low, first) + len(part)
                yield filled - len(part), part


def beginning(path: str, rate: int, channels: int, seconds: float) -> np.ndarray:
    """The sound of a file's first `seconds` or, where it ends before, less: (n, channels) int16.

    They begin with the first picture, in a file without pictures with the sound.

    Raises:
        Unheard: there is no sound, or it exceeds a limit.
        Unreadable, av.error.FFmpegError, ValueError: it cannot be opened, or converted.
    """
    formats = (*media.FORMATS, *media.SOUNDS)
    with media.opened(path, formats) as container:
        # the picture of a cover is shown all the time
        films = [s for s in container.streams.video if not s.disposition & s.disposition.attached_pic]
        start = (container.start_time or 0) / av.time_base
    clocks = clocks_of(path) if films else [(0.0, start)]
    out: list[np.ndarray] = []
    end, most = 0, round(seconds * rate)
    for first, samples in soundtrack(path, rate, channels, clocks, seconds, Heard(), formats):
        if first >= most:
            break
        low, high = max(0, first), min(most, first + len(samples))
        if low < high:
            # as long as the sound, not as the video, which may be without end
            out += [np.zeros((low - end, channels), np.int16), samples[low - first : high - first]]
            end = high
    if not end:
        raise Unheard("outside", f"no sound in its first {seconds:g} s")
    return np.concatenate(out)


def in_spans(pieces: Iterable[Piece], spans: Iterable[tuple[int, int]]) -> Iterator[np.ndarray | None]:
    """The sound of each span, (end - begin, channels) int16, zero where there is none; None where there is none at all.

    Args:
        pieces: rising, without overlap; no more are taken than the spans need.
        spans: first sample and the one after the last, rising, without overlap.
    """
    rest = iter(pieces)
    piece = next(rest, None)
    for begin, end in spans:
        room = None
        while piece is not None and piece[0] < end:
            start, samples = piece
            first, last = max(begin, start), min(end, start + len(samples))
            if first < last:
                room = np.zeros((end - begin, samples.shape[1]), np.int16) if room is None else room
                room[first - begin : last - begin] = samples[first - start : last - start]
            if start + len(samples) > end:
                break  # it goes on in the next span
            piece = next(rest, None)
        yield room


def _chosen(container: Any) -> Any:
    """The stream to hear: no commentary, the default one, the first. Raises Unheard."""
    if not container.streams.audio:
        raise Unheard("no_audio", "no audio stream")
    decodable = [s for s in container.streams.audio if s.codec_context is not None]
    if not decodable:
        raise Unheard("unreadable", "no decoder for its sound")
    secondary = [getattr(decodable[0].disposition, name) for name in _SECONDARY]

    def rank(stream: Any) -> tuple[bool, bool]:
        flags = stream.disposition
        return not any(flags & flag for flag in secondary), bool(flags & flags.default)

    return max(decodable, key=rank)


def _decoded(container: Any, stream: Any, heard: Heard, seconds: float) -> Iterator[Any]:
    """The frames, without those of packets that the decoder refuses."""
    damaged, packets = 0, container.demux(stream)
    while heard.packets < _PACKETS_A_SECOND * (seconds + _SPARE_SECONDS):
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.error.FFmpegError as e:
            # a demuxer cannot continue after its own error: flush what is still in the decoder
            heard.ended = e.strerror or str(e)
            with contextlib.suppress(av.error.FFmpegError):
                yield from stream.codec_context.decode(None)
            return
        heard.packets += 1
        try:
            frames = packet.decode()
        except (av.error.FFmpegError, MemoryError):
            heard.refused += 1
            damaged += 1
            if damaged > _MAX_DAMAGED_PACKETS:
                heard.ended = f"{damaged} damaged packets, one after the other"
                return
            continue
        damaged = 0 if packet.size else damaged
        yield from frames
    heard.ended = "more packets than its pictures have time for"


def _bounded(frames: Iterator[Any], heard: Heard, seconds: float) -> Iterator[Any]:
    """The frames that have samples, until they last much longer than the pictures. Raises Unheard."""
    for frame in frames:
        channels = frame.layout.nb_channels
        if not 0 < frame.sample_rate <= _MAX_RATE or not 0 < channels <= _MAX_CHANNELS:
            raise Unheard("too_large", f"{channels} channels with {frame.sample_rate} samples a second")
        heard.seconds += frame.samples / frame.sample_rate
        if heard.seconds > 2 * seconds + _SPARE_SECONDS:
            heard.ended = "it lasts longer than its pictures"
            return
        if frame.samples:
            yield frame


def _placed(
    frames: Iterator[Any], clocks: Sequence[Clock], rate: int, channels: int, heard: Heard
) -> Iterator[tuple[int, int, np.ndarray]]:
    """Sound at its place: the number of its clock, that of its first sample since the first picture, (n, channels) int16."""
    run: _Run | None = None
    number = 0
    for frame in frames:
        time = frame.time
        if time is None:
            time = run.end if run else clocks[0][1]
        back = run is not None and time < run.end - _BACK_SECONDS
        if run and (back or run.kind != _kind(frame) or abs(time - run.end) > _JITTER_SECONDS):
            yield from ((number, *piece) for piece in run.resampled(None))
            run, number = None, number + back
        if number == len(clocks):
            heard.ended = "its clock goes back where that of the pictures does not"
            return
        run = run or _Run(frame, time, round((time - clocks[number][1]) * rate), rate, channels)
        yield from ((number, *piece) for piece in run.resampled(frame))
    if run:
        yield from ((number, *piece) for piece in run.resampled(None))


def _kind(frame: Any) -> tuple[Any, ...]:
    """What has to be equal for frames to go through one resampler."""
    return frame.format.name, frame.layout.name, frame.sample_rate


class _Run:
    """Sound without a gap, resampled as one.

    Args:
        frame: the first one, at `time` by the container's clock.
        place: the number of its first sample at the new rate.
    """

    def __init__(self, frame: Any, time: float, place: int, rate: int, channels: int) -> None:
        self.kind = _kind(frame)
        self._begin, self._taken, self._rate = time, 0, frame.sample_rate
        self._place, self._channels = place, channels
        self._resampler = av.AudioResampler("s16", "mono" if channels == 1 else "stereo", rate)

    @property
    def end(self) -> float:
        """The time at which the next frame is due."""
        return self._begin + self._taken / self._rate

    def resampled(self, frame: Any) -> Iterator[Piece]:
        """What a frame gives; None: what is left."""
        if frame is not None:
            self._taken += frame.samples
            frame.pts = None  # places are counted
        for part in self._resampler.resample(frame):
            if part is not None:  # where nothing is to be converted nothing is left
                samples = part.to_ndarray().reshape(-1, self._channels)
                yield self._place, samples
                self._place += len(samples)
