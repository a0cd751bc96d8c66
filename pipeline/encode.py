"""Encode H.264 clips: the same bytes for the same frames, and groups of pictures that are short enough to seek in."""

import io
from fractions import Fraction

import av
import numpy as np


def encode(clip: list[np.ndarray], fps: Fraction, crf: int, preset: str, gop: int) -> bytes:
    """An MP4 of T frames of planes (see decode.to_planes).

    One encoder thread and no tags of version or date: the same frames give the same bytes on the same libx264.
    """
    height, width = clip[0].shape[0] * 2 // 3, clip[0].shape[1]
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4", container_options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        stream.codec_context.gop_size = gop
        # SMPTE 170M, limited range: what to_planes gives
        stream.codec_context.color_primaries = stream.codec_context.color_trc = stream.codec_context.colorspace = 6
        stream.codec_context.color_range = 1
        # macroblock-tree rate control reads uninitialized memory (with SIMD, at small sizes): other bytes each time
        stream.options = {"crf": str(crf), "preset": preset, "flags": "+bitexact", "sc_threshold": "0", "mbtree": "0"}
        for number, planes in enumerate(clip):
            frame = av.VideoFrame.from_numpy_buffer(planes, format="yuv420p")
            frame.pts, frame.time_base = number, 1 / fps
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return buffer.getvalue()
