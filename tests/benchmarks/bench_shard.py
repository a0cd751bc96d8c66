"""CPU seconds of sharding against one-thread ffmpeg decoding, scaling and encoding the same files, in one run.

    python tests/benchmarks/bench_shard.py FOLDER

Both scale to a short side of 128 and encode H.264 (veryfast, crf 23, a keyframe every 12 frames). Ours also cuts,
scores, and writes frame differences; ffmpeg keeps every frame, ours those of `--fps`.
"""

import argparse
import resource
import subprocess
import tempfile
from pathlib import Path

from longtake.pipeline.geometry import ClipConfig, FrameDiffConfig, LimitsConfig
from longtake.pipeline.isolate import Worker


def children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def ours(videos: list[Path], fps: float) -> float:
    config = ClipConfig(short_side=128, fps=fps, crf=23)
    plain = {"clip": config, "limits": LimitsConfig(), "diff": FrameDiffConfig()}
    before = children()
    worker = Worker()
    for n, video in enumerate(videos):
        with tempfile.TemporaryDirectory() as folder:
            job = {"path": str(video), "source": f"{n:020x}", "folder": folder, "decoder": "pyav", "extra": {}}
            worker.run(job | {k: v.model_dump(mode="json") for k, v in plain.items()}, 600, 6 << 30)
    worker.close()
    return children() - before


def ffmpeg(videos: list[Path]) -> float:
    before = children()
    scale = "scale='if(gt(iw,ih),-2,128)':'if(gt(iw,ih),128,-2)'"
    encode = ["-an", "-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "12", "-pix_fmt", "yuv420p"]
    for video in videos:
        with tempfile.TemporaryDirectory() as folder:
            command = [
                "ffmpeg",
                "-v",
                "error",
                "-threads",
                "1",
                "-i",
                str(video),
                "-vf",
                scale,
                *encode,
                "-threads",
                "1",
                f"{folder}/x.mp4",
            ]
            subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return children() - before


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fps", type=float, default=24)
    arguments = parser.parse_args()
    found = sorted(p for p in arguments.folder.iterdir() if p.is_file())
    one, other = ours(found, arguments.fps), ffmpeg(found)
    print(f"{len(found)} files: longtake {one:.1f} CPU s, ffmpeg {other:.1f} CPU s, ratio {one / other:.2f}")
