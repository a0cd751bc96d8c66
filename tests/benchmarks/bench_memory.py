"""Memory of one task over a long source: the peak, and whether it stays flat from its first third to its last.

    python tests/benchmarks/bench_memory.py [--minutes 30] [--height 1080] [--short-side 256]

The source is made first: some seconds of a moving test picture with noise, repeated without encoding again, with
rising times. Then one decoder process (`isolate.Worker`) cuts it while its resident memory is read every second.
The target is a peak of at most 600 MB (10^6 bytes).
"""

import argparse
import resource
import tempfile
import threading
import time
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import psutil

from longtake.pipeline.config import ClipConfig, CutConfig, LimitsConfig
from longtake.pipeline.isolate import Worker

RATE, SEGMENT_SECONDS, TARGET_MB = 24, 20, 600


def make(path: Path, minutes: float, height: int) -> None:
    width = height * 16 // 9 // 2 * 2
    short = path.with_name("segment.mp4")
    picture = (
        f"testsrc2=size={width}x{height}:rate={RATE}:duration={SEGMENT_SECONDS},noise=alls=4:allf=t,format=yuv420p"
    )
    with av.open(picture, format="lavfi") as source, av.open(str(short), "w") as target:
        options = {"preset": "superfast", "crf": "28", "bf": "0", "g": str(2 * RATE)}
        stream: Any = target.add_stream("libx264", rate=RATE, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for number, frame in enumerate(source.decode(video=0)):
            frame.pts, frame.time_base = number, Fraction(1, RATE)
            target.mux(stream.encode(frame))
        target.mux(stream.encode())
    with av.open(str(path), "w") as target:
        out: Any = None
        for turn in range(max(1, round(minutes * 60 / SEGMENT_SECONDS))):
            with av.open(str(short)) as source:
                first = source.streams.video[0]
                out = out or target.add_stream_from_template(first)
                for packet in source.demux(first):
                    if packet.dts is None or packet.pts is None:
                        continue
                    shift = round(turn * SEGMENT_SECONDS / packet.time_base)
                    packet.pts, packet.dts, packet.stream = packet.pts + shift, packet.dts + shift, out
                    target.mux(packet)


def watch(samples: list[tuple[int, int]], done: threading.Event) -> None:
    """(resident, unshared) bytes of this process's children, every second."""
    while not done.wait(1):
        try:
            infos = [child.memory_full_info() for child in psutil.Process().children(recursive=True)]
        except psutil.Error:
            continue
        if infos:
            samples.append((sum(i.rss for i in infos), sum(i.uss for i in infos)))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--height", type=int, default=1080)
    parser.add_argument("--short-side", type=int, default=256)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "source.mp4")
        make(path, arguments.minutes, arguments.height)
        size = path.stat().st_size
        limits = LimitsConfig(timeout_seconds=6 * 3600)
        cut = CutConfig(clip=ClipConfig(short_side=arguments.short_side), limits=limits)
        samples: list[tuple[int, int]] = []
        done = threading.Event()
        thread = threading.Thread(target=watch, args=(samples, done))
        worker = Worker()
        begun = time.perf_counter()
        thread.start()
        result = worker.run(str(path), f"{0:020x}", folder, cut, {})
        done.set()
        thread.join()
        worker.close()
    seconds = time.perf_counter() - begun
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    peak = usage.ru_maxrss * 1024 / 1e6
    account = result["account"]
    print(
        f"source: {arguments.minutes:g} min, {arguments.height} rows, {size / 1e6:.0f} MB, {account['frames_decoded']} frames"
    )
    print(
        f"{account['status']}: {len(result['clips'])} clips in {seconds:.0f} s, {usage.ru_utime + usage.ru_stime:.0f} CPU s"
    )
    print(f"peak RSS {peak:.0f} MB (target {TARGET_MB}): {'held' if peak <= TARGET_MB else 'EXCEEDED'}")
    for name, column in zip(("RSS", "unshared"), np.array(samples).T / 1e6, strict=True):
        thirds = ", ".join(f"{part.mean():.0f} (most {part.max():.0f})" for part in np.array_split(column, 3))
        print(f"{name}, MB, mean (most) of the first, middle and last third of {len(column)} samples: {thirds}")
