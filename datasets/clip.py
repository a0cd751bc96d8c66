"""Decoding, scaling and cropping a clip. One decoder for the pipeline and the loader, so that both see the same pixels."""

import io
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

from longtake.datasets import media
from longtake.datasets.errors import Failure

Bytes = bytes | memoryview
Size = tuple[int, int]  # (height, width)
_NPY = re.compile(
    rb"\x93NUMPY\x01\x00..\{'descr': '([<>|=]?\w+)', 'fortran_order': (False|True), 'shape': \(([\d, ]*)\), \} *\n",
    re.DOTALL,
)
_AAC_RATE, _AAC_BITRATE = 48_000, 192_000


def decode(mp4: Bytes, frames: Sequence[int] | None = None, size: Size | None = None, name: str = "clip") -> np.ndarray:
    """Decode chosen frames of a clip, or all of them, with one thread.

    PyAV rather than decord, which failed on clips 48 pixels wide and took more CPU at every size that was measured.

    Args:
        mp4: the bytes of a `KEY.mp4` member; its frame n is shown at n / fps.
        frames: ascending frame numbers; decoding starts at the keyframe before the first one. None takes all.
        size: (height, width) to scale to; None keeps the clip's own.
        name: the clip's name in error messages.

    Returns:
        (T, H, W, 3) uint8 RGB.

    Raises:
        Failure: the clip is not decodable, or has no such frame.
    """
    return np.stack(list(decoded(mp4, frames, size, name)))


def decoded(
    mp4: Bytes, frames: Sequence[int] | None = None, size: Size | None = None, name: str = "clip"
) -> Iterator[np.ndarray]:
    """The frames of `decode`, (H, W, 3) uint8, one at a time."""
    for frame in _frames(mp4, frames, size, name):
        yield frame.to_ndarray()


def _frames(mp4: Bytes, frames: Sequence[int] | None, size: Size | None, name: str) -> Iterator[Any]:
    """The frames of `decode` as av.VideoFrame in rgb24."""
    import av

    count = 0
    height, width = size or (None, None)
    try:
        # one for all frames: each frame's own would set up its tables again
        scaler = av.video.reformatter.VideoReformatter()
        with media.opened(mp4) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            duration = 1 / (stream.average_rate * stream.time_base)  # of a frame, in ticks
            if frames and frames[0] > 0:
                container.seek(int(frames[0] * duration), stream=stream)
            # integers: fractions would cost as much as scaling a small frame
            ticks, parts = duration.numerator, duration.denominator
            for frame in container.decode(stream):
                if frames is not None and (2 * frame.pts * parts + ticks) // (2 * ticks) != frames[count]:
                    continue
                yield scaler.reformat(frame, width, height, "rgb24", threads=1)
                count += 1
                if frames is not None and count == len(frames):
                    return
    except (av.error.FFmpegError, ArithmeticError, AttributeError, IndexError, TypeError, ValueError) as e:
        raise Failure(f"{name}: cannot decode ({e}); run `longtake dataset verify`") from e
    if frames:
        raise Failure(f"{name}: frame {frames[count]} is missing; run `longtake dataset verify`")
    if not count:
        raise Failure(f"{name}: has no frame; run `longtake dataset verify`")


def fitted(
    mp4: Bytes, clip_size: Size, frames: Sequence[int], size: Size, name: str, place: float = 0.5
) -> Iterator[np.ndarray]:
    """Chosen frames of a clip of `clip_size`, scaled to cover `size` and cropped (see `crop`), a frame (H, W, 3) at a time."""
    scaled = covering_size(clip_size, size)
    for frame in decoded(mp4, frames, None if scaled == clip_size else scaled, name):
        yield crop(frame[None], size, place)[0]


def fill(video: np.ndarray, mp4: Bytes, clip_size: Size, frames: Sequence[int], name: str, place: float = 0.5) -> None:
    """Fill `video` (3, T, H, W) with the frames of `fitted`, one copy each."""
    (height, width), size = covering_size(clip_size, video.shape[2:]), video.shape[2:]
    scaled = None if (height, width) == clip_size else (height, width)
    part = crop_of((height, width), size, place)
    for n, frame in enumerate(_frames(mp4, frames, scaled, name)):
        plane = frame.planes[0]
        pixels: np.ndarray = np.ndarray((height, width, 3), np.uint8, plane, strides=(plane.line_size, 3, 1))
        video[:, n] = pixels[part].transpose(2, 0, 1)


def frame_difference(video: np.ndarray, factor: int) -> np.ndarray:
    """|x_t - x_{t-1}| of a decoded clip, after averaging boxes of `factor` x `factor` pixels.

    Args:
        video: (T, H, W, 3) uint8; H and W are divisible by `factor`.

    Returns:
        (T-1, H/factor, W/factor, 3) uint8; entry i is the change into frame i + 1.
    """
    t, h, w, c = video.shape
    if factor > 1:
        wide = np.uint16 if factor <= 16 else np.uint32
        small = np.empty((t, h // factor, w // factor, c), np.uint8)
        # one frame stays in the CPU's cache and one channel vectorizes: two to six times faster than all at once
        for frame, out in zip(video, small, strict=True):
            rows = frame.reshape(h // factor, factor, w, c).sum(1, dtype=wide)
            for n in range(c):
                sums = rows[:, ::factor, n] + factor * factor // 2
                for x in range(1, factor):
                    sums += rows[:, x::factor, n]
                out[..., n] = sums // (factor * factor)
        video = small
    later, earlier = video[1:], video[:-1]
    return np.maximum(later, earlier) - np.minimum(later, earlier)


def pack_array(array: np.ndarray) -> bytes:
    """The bytes of a `.npy.zst` member.

    No other lossless codec that was measured (see bench_frame_diff) is both smaller and as fast to read. Level 1 takes
    0.4 % more bytes than 3 and a third less time to write.
    """
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return zstandard.ZstdCompressor(level=1).compress(buffer.getvalue())


def unpack_array(data: Bytes, name: str = "array", max_bytes: int = 1 << 32) -> np.ndarray:
    """Read a `.npy.zst` member. Raises Failure where it is damaged or has more than `max_bytes` decompressed."""
    try:
        # decompress() trusts the size in the header and ignores its own bound where there is one
        if zstandard.frame_content_size(data) > max_bytes:
            raise ValueError(f"would unfold beyond {max_bytes} bytes")
        raw = zstandard.ZstdDecompressor().decompress(data, max_output_size=max_bytes)
        return _array(raw)
    except (zstandard.ZstdError, ValueError, TypeError, MemoryError) as e:
        raise Failure(f"{name}: damaged ({e}); delete the column's index and run its stage again") from e


def _array(raw: bytes) -> np.ndarray:
    """The array in a .npy as `pack_array` writes it. Raises ValueError, TypeError.

    Not by np.load, which parses headers by `ast`: in some releases of Python 3.11 threads that do so together fail at random.
    """
    header = _NPY.match(raw)
    if header is None:
        raise ValueError("no header of an array")
    shape = [int(side) for side in header[3].split(b",") if side.strip()]
    flat = np.frombuffer(raw, np.dtype(header[1].decode()), offset=header.end())
    return flat.reshape(shape, order="F" if header[2] == b"True" else "C").copy()


def crop(video: np.ndarray, size: Size, place: float = 0.5) -> np.ndarray:
    """The part of (T, H, W, 3) with the aspect ratio of `size`; `place` 0 is the left or top, 1 the right or bottom."""
    return video[:, *crop_of(video.shape[1:3], size, place)]


def crop_of(whole: tuple[int, ...], size: tuple[int, ...], place: float = 0.5) -> tuple[slice, slice]:
    """The rows and columns of a frame of `whole` (height, width) that `crop` takes."""
    h, w = whole
    target_h, target_w = min(h, w * size[0] // size[1]), min(w, h * size[1] // size[0])
    top, left = round((h - target_h) * place), round((w - target_w) * place)
    return slice(top, top + target_h), slice(left, left + target_w)


def covering_size(clip: Size, size: tuple[int, ...]) -> Size:
    """The smallest (height, width) with the clip's aspect ratio that covers `size`."""
    scale = max(size[0] / clip[0], size[1] / clip[1])
    return max(size[0], round(clip[0] * scale)), max(size[1], round(clip[1] * scale))


def write(path: Path, video: np.ndarray, fps: int, crf: int = 16) -> None:
    """Write (T, H, W, 3) uint8 RGB, H and W even, as an H.264 file that browsers play."""
    import av

    with av.open(str(path), "w", container_options={"fflags": "+bitexact", "movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=fps, options={"crf": str(crf), "mbtree": "0"})
        stream.height, stream.width, stream.pix_fmt = video.shape[1], video.shape[2], "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in video:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        container.mux(stream.encode())


def write_with_sound(path: Path, mp4: Bytes, samples: np.ndarray, rate: int) -> None:
    """Write a clip's mp4 with sound that begins with its first frame, for any player: AAC, beside the packets as they are.

    A comment of the mp4 is kept.

    Args:
        samples: (channels, n) float32 in [-1, 1], one channel or two.

    Raises:
        Failure: the mp4 cannot be read.
    """
    import av

    # what the encoder puts before the first sample is left out by the edit list, which counts in ticks of the movie
    options = {"fflags": "+bitexact", "movflags": "+faststart", "movie_timescale": str(_AAC_RATE)}
    try:
        with media.opened(mp4) as source, av.open(str(path), "w", format="mp4", container_options=options) as target:
            target.metadata.update({name: text for name, text in source.metadata.items() if name == "comment"})
            video = target.add_stream_from_template(source.streams.video[0])
            sound = target.add_stream("aac", rate=_AAC_RATE)
            sound.codec_context.layout = layout = "mono" if len(samples) == 1 else "stereo"
            sound.codec_context.bit_rate, sound.codec_context.thread_count = _AAC_BITRATE, 1
            for packet in source.demux(source.streams.video[0]):
                if packet.size:
                    packet.stream = video
                    target.mux(packet)
            frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples), format="fltp", layout=layout)
            frame.sample_rate, frame.pts, frame.time_base = rate, 0, Fraction(1, rate)
            target.mux(sound.encode(frame))
            target.mux(sound.encode(None))
    except (av.error.FFmpegError, IndexError, ValueError) as e:
        raise Failure(f"{path.name}: cannot add sound to the clip ({e}); run `longtake dataset verify`") from e
