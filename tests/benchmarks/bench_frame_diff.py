"""Lossless codecs for the frame-difference column: bytes, CPU seconds to encode, to decode, and to read a window.

    python tests/benchmarks/bench_frame_diff.py FOLDER [--short-side 64] [--clip-short-side 256] [--all]

The clips are cut from the videos of FOLDER as `shard` does; their differences are (T-1, h, w, 3) uint8. Every codec's
answer is compared with the original bit by bit. A window is 17 frames from the middle: codecs that cannot seek decode
all that lies before. `--all` adds zstd 19, which takes minutes.
"""

import argparse
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import zstandard
from av.video.reformatter import VideoReformatter

from longtake.datasets import clip as clips
from longtake.pipeline.config import ClipConfig, CutConfig, FrameDiffConfig
from longtake.pipeline.source import process

WINDOW = 17
INTRA, GOP = {"g": "1"}, {"g": "12"}
Forward = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Codec:
    name: str
    encode: Callable[[np.ndarray], bytes]
    decode: Callable[[bytes, int, int], np.ndarray]  # bytes, first frame, one past the last; 0, 0 takes all


def same(array: np.ndarray) -> np.ndarray:
    return array


def planar(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 3, 1, 2))


def interleaved(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1))


def colour_first(array: np.ndarray) -> np.ndarray:
    """Planar, red and blue less green."""
    out = planar(array)
    out[:, ::2] -= out[:, 1:2]
    return out


def colour_last(array: np.ndarray) -> np.ndarray:
    out = array.copy()
    out[:, ::2] += out[:, 1:2]
    return interleaved(out)


def less_left(array: np.ndarray) -> np.ndarray:
    """Planar, every pixel less its left neighbour."""
    return np.diff(planar(array), axis=3, prepend=np.uint8(0))


def plus_left(array: np.ndarray) -> np.ndarray:
    return interleaved(np.cumsum(array, axis=3, dtype=np.uint8))


def less_before(array: np.ndarray) -> np.ndarray:
    return np.diff(array, axis=0, prepend=np.uint8(0))


def plus_before(array: np.ndarray) -> np.ndarray:
    return np.cumsum(array, axis=0, dtype=np.uint8)


def zstd(level: int, note: str = "as is", forward: Forward = same, backward: Forward = same) -> Codec:
    def encode(array: np.ndarray) -> bytes:
        buffer = io.BytesIO()
        np.save(buffer, forward(array), allow_pickle=False)
        return zstandard.ZstdCompressor(level=level).compress(buffer.getvalue())

    def decode(data: bytes, start: int, stop: int) -> np.ndarray:
        # sums over time need what comes before
        first = 0 if backward is plus_before else start
        array = clips.unpack_array(data)[first : stop or None]
        return backward(array)[start - first :]

    return Codec(f"zstd {level}, {note}", encode, decode)


def zstd_frames(level: int, forward: Forward, backward: Forward, note: str) -> Codec:
    """Each difference compressed by itself, after a table of their sizes: a window reads nothing else."""

    def encode(array: np.ndarray) -> bytes:
        compressor = zstandard.ZstdCompressor(level=level)
        moved = forward(array)
        parts = [compressor.compress(part.tobytes()) for part in moved]
        head = np.array([*moved.shape, *(len(part) for part in parts)], "<u4").tobytes()
        return b"".join([head, *parts])

    def decode(data: bytes, start: int, stop: int) -> np.ndarray:
        count, *shape = np.frombuffer(data, "<u4", 4).tolist()
        sizes = np.frombuffer(data, "<u4", count, offset=16)
        ends = np.cumsum(sizes, dtype=np.int64) + 16 + 4 * count
        unpack = zstandard.ZstdDecompressor()
        chosen = range(start, stop or count)
        raw = [unpack.decompress(data[int(ends[n] - sizes[n]) : int(ends[n])]) for n in chosen]
        return backward(np.frombuffer(b"".join(raw), np.uint8).reshape(len(raw), *shape))

    return Codec(f"zstd {level} a frame, {note}", encode, decode)


def video(name: str, codec: str, pixels: str, container: str = "nut", **options: str) -> Codec:
    def encode(array: np.ndarray) -> bytes:
        buffer, scaler = io.BytesIO(), VideoReformatter()
        with av.open(buffer, "w", format=container) as out:
            stream: Any = out.add_stream(codec, rate=24, options=options)
            stream.height, stream.width, stream.pix_fmt = *array.shape[1:3], pixels
            stream.codec_context.thread_count = 1
            for number, picture in enumerate(array):
                frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
                if pixels != "rgb24":
                    frame = scaler.reformat(frame, format=pixels, threads=1)
                frame.pts, frame.time_base = number, Fraction(1, 24)
                out.mux(stream.encode(frame))
            out.mux(stream.encode())
        return buffer.getvalue()

    def decode(data: bytes, start: int, stop: int) -> np.ndarray:
        out, scaler = [], VideoReformatter()
        with av.open(io.BytesIO(data)) as source:
            stream = source.streams.video[0]
            stream.codec_context.thread_count = 1
            if start:
                source.seek(int(start / 24 / stream.time_base), stream=stream)
            for frame in source.decode(stream):
                number = round(frame.pts * stream.time_base * 24)
                if number >= start:
                    out.append(scaler.reformat(frame, format="rgb24", threads=1).to_ndarray())
                if number + 1 == stop:
                    break
        return np.stack(out)

    return Codec(name, encode, decode)


def codecs(slow: bool) -> list[Codec]:
    return [
        zstd(3),
        zstd(1),
        zstd(9),
        *([zstd(19)] if slow else []),
        zstd(1, "planar", planar, interleaved),
        zstd(3, "planar", planar, interleaved),
        zstd(9, "planar", planar, interleaved),
        zstd(3, "planar, less green", colour_first, colour_last),
        zstd(1, "planar, less left", less_left, plus_left),
        zstd(3, "planar, less left", less_left, plus_left),
        zstd(3, "less frame before", less_before, plus_before),
        zstd_frames(1, same, same, "as is"),
        zstd_frames(3, planar, interleaved, "planar"),
        zstd_frames(3, colour_first, colour_last, "planar, less green"),
        video("FFV1 bgr0, nut, intra", "ffv1", "bgr0", level="3", **INTRA),
        video("FFV1 bgr0, matroska, intra", "ffv1", "bgr0", "matroska", level="3", **INTRA),
        video("FFV1 bgr0, nut, range coder, gop 12", "ffv1", "bgr0", level="3", coder="range_def", **GOP),
        *(
            video(
                f"H.264 RGB qp 0 {preset}, gop 12",
                "libx264rgb",
                "rgb24",
                "matroska",
                preset=preset,
                qp="0",
                bf="0",
                **GOP,
            )
            for preset in ("ultrafast", "veryfast", "medium")
        ),
        video("HuffYUV rgb24, nut", "huffyuv", "rgb24"),
        video("UT Video gbrp, nut", "utvideo", "gbrp", pred="median"),
    ]


def differences(videos: Iterable[Path], clip: ClipConfig, diff: FrameDiffConfig) -> list[np.ndarray]:
    found = []
    for number, path in enumerate(videos):
        with tempfile.TemporaryDirectory() as folder:
            process(str(path), f"{number:020x}", folder, CutConfig(clip=clip, frame_diff=diff))
            found += [clips.unpack_array(p.read_bytes()) for p in sorted(Path(folder).glob("*.npy.zst"))]
    return found


def clocked(work: Callable[[], Any]) -> tuple[Any, float]:
    before = time.process_time()
    return work(), time.process_time() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--short-side", type=int, default=64)
    parser.add_argument("--clip-short-side", type=int, default=256)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--json", type=Path, help="write the table there as well")
    arguments = parser.parse_args()
    paths = sorted(p for p in arguments.folder.iterdir() if p.is_file())
    clip = ClipConfig(short_side=arguments.clip_short_side)
    arrays = differences(paths, clip, FrameDiffConfig(short_side=arguments.short_side))
    raw = sum(a.size for a in arrays)
    frames = sum(len(a) for a in arrays)
    print(
        f"{len(arrays)} clips, {frames} differences, {raw / 1e6:.1f} MB raw; CPU s; window: {WINDOW} frames, ms a clip"
    )
    print(f"{'codec':38s} {'MB':>7s} {'B/value':>8s} {'to zstd-3':>9s} {'encode':>7s} {'decode':>7s} {'window':>7s}")
    table: list[dict[str, Any]] = []
    for codec in codecs(arguments.all):
        row: dict[str, Any] = {"codec": codec.name, "bytes": 0, "encode": 0.0, "decode": 0.0, "window": 0.0}
        try:
            for array in arrays:
                data, seconds = clocked(partial(codec.encode, array))
                row["bytes"] += len(data)
                row["encode"] += seconds
                back, seconds = clocked(partial(codec.decode, data, 0, 0))
                row["decode"] += seconds
                assert np.array_equal(back, array), f"{codec.name} is not lossless"
                start = max(0, (len(array) - WINDOW) // 2)
                part = (start, min(len(array), start + WINDOW))
                back, seconds = clocked(partial(codec.decode, data, *part))
                row["window"] += seconds
                assert np.array_equal(back, array[slice(*part)]), f"{codec.name} reads another window"
        except (av.error.FFmpegError, ValueError, AssertionError) as e:
            print(f"{codec.name:38s} left out: {type(e).__name__}: {e}")
            continue
        table.append(row)
        print(
            f"{codec.name:38s} {row['bytes'] / 1e6:7.2f} {row['bytes'] / raw:8.3f} {row['bytes'] / table[0]['bytes']:9.3f}"
            f" {row['encode']:7.2f} {row['decode']:7.2f} {row['window'] / len(arrays) * 1e3:7.2f}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(table, indent=1))
