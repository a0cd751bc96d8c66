"""CPU seconds of sharding against one-thread ffmpeg decoding, scaling and encoding the same files, in one run.

    python tests/benchmarks/bench_shard.py FOLDER [--ffmpeg PATH] [--turns 3] [--figures FILE]

Both scale to a short side of 128 and encode H.264 (veryfast, crf 23, a keyframe every 12 frames), and the sound as Opus
(96 kbit/s, stereo). Ours also cuts, scores, hashes and writes frame differences; ffmpeg keeps every frame, ours those of
`--fps`. Three measurements, in turns:

cutting: one decoder process (`isolate.Worker`) over all files, by getrusage.
stage: `shard.run` with Ray in a process of its own. Ray reaps its workers without counting them, so every process that
    inherits a mark in its environment is looked at ten times a second, and the last figure of each that ended is kept
    (each may lose a tenth of a second). What does not depend on the videos (starting Ray, its workers and the
    decoders, planning, one task a group) is measured by the same job over as many files of a few bytes, all rejected.
busy: the share of all cores that the stage used from the first decoder's start to the last decoder's last work. On a
    machine that does other work as well, compare it with the share that everything together used.

Where cores share their parts, work on all of them costs more CPU seconds than on one: ffmpeg is measured both ways.

There are at most `--groups-per-core` groups a core (and one more for the other split), of equally many sources.
Figures of each turn: `cpu` (the stage less its fixed part, against ffmpeg), `cutting` (one decoder, against ffmpeg),
`busy`, `fixed_wall` and `fixed_cpu` in seconds.
"""

import argparse
import math
import os
import resource
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import figures
import imageio_ffmpeg
import psutil

from longtake.datasets import index
from longtake.datasets.shard import sha256_of
from longtake.pipeline.config import AudioConfig, ClipConfig, CutConfig, LimitsConfig
from longtake.pipeline.isolate import Worker
from longtake.pipeline.stages import shard

MARK = "LONGTAKE_BENCH_MARK"
RUN = """
import sys
from longtake.pipeline.stages import shard
if __name__ == "__main__":
    shard.run(shard.Config.model_validate_json(sys.argv[1]), {}, sys.argv[2])
"""


@dataclass(frozen=True)
class Stage:
    cpu: float
    by_role: dict[str, float]
    wall: float
    busy: float
    machine_busy: float
    busy_wall: float


def children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def cutting(videos: list[Path], clip: ClipConfig) -> tuple[float, int, int]:
    """CPU seconds, source frames, clips."""
    cut = CutConfig(clip=clip, audio=AudioConfig(), limits=LimitsConfig(timeout_seconds=600))
    before, frames, clips = children(), 0, 0
    worker = Worker()
    for n, video in enumerate(videos):
        with tempfile.TemporaryDirectory() as folder:
            result = worker.run(str(video), f"{n:020x}", folder, cut, {})
            frames += result["account"].get("frames_decoded", 0)
            clips += len(result["clips"])
            if result["clips"]:
                worker.keep_sound(str(video), result["clips"], folder, cut, clocks=result["clocks"])
    worker.close()
    return children() - before, frames, clips


def ffmpeg(binary: str, videos: list[Path], at_once: int = 1) -> float:
    before = children()
    one = ["-threads", "1"]
    scale = ["-filter_threads", "1", "-vf", "scale='if(gt(iw,ih),-2,128)':'if(gt(iw,ih),128,-2)'"]
    sound = ["-c:a", "libopus", "-b:a", "96k", "-ar", "48000", "-ac", "2"]
    encode = [*sound, "-c:v", "libx264", "-preset", "veryfast", "-crf", "23", "-g", "12", "-pix_fmt", "yuv420p"]

    def convert(video: Path) -> None:
        with tempfile.TemporaryDirectory() as folder:
            command = [binary, "-v", "error", *one, "-i", str(video), *scale, *encode, *one, f"{folder}/x.mkv"]
            done = subprocess.run(command, stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            if done.returncode:
                print(f"ffmpeg failed on {video.name}: {done.stderr.strip()[-200:]}")

    with ThreadPoolExecutor(at_once) as pool:
        list(pool.map(convert, videos))
    return children() - before


def stage(sources: Iterable[str], clip: ClipConfig, group_sources: int, output: str) -> Stage:
    config = shard.Config(kind="shard", sources=tuple(sources), clip=clip, group_sources=group_sources)
    mark = secrets.token_hex(16)
    command = [sys.executable, "-P", "-c", RUN, config.model_dump_json(), output]
    begun = time.perf_counter()
    # a pipe that nobody reads meanwhile would fill up, and the stage wait for ever
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, env=os.environ | {MARK: mark}, stderr=said)
        ours, cpu, trace = _watched(process, mark)
        wall = time.perf_counter() - begun
        said.seek(0)
        if process.returncode and "none of" not in (error := said.read()):
            raise SystemExit(f"the stage failed:\n{error[-2000:]}")
    by_role = {
        role: sum(s for one, s in cpu.items() if ours[one] == role) for role in sorted(filter(None, set(ours.values())))
    }
    working = [now for before, now in pairwise(trace) if now[2] > before[2]]
    first, last = working[0], working[-1]
    span = (last[0] - first[0]) * len(os.sched_getaffinity(0)) or math.inf
    machine = (last[3] - first[3]) / ((last[0] - first[0]) * (os.cpu_count() or 1) or math.inf)
    return Stage(sum(cpu.values()), by_role, wall, (last[1] - first[1]) / span, machine, last[0] - first[0])


def _watched(
    process: subprocess.Popen[bytes], mark: str
) -> tuple[dict[psutil.Process, str | None], dict[psutil.Process, float], list[tuple[float, float, float, float]]]:
    """The roles and CPU seconds of all processes with the mark until this one ends, and what was used by when."""
    ours: dict[psutil.Process, str | None] = {}  # process to role; None is not ours
    cpu: dict[psutil.Process, float] = {}
    trace: list[tuple[float, float, float, float]] = []  # seconds; CPU seconds of ours, of the decoders, of everything
    while process.poll() is None:
        for one in psutil.process_iter():
            if one not in ours:
                ours[one] = _role(one, mark, process.pid)
            if ours[one]:
                try:
                    times = one.cpu_times()
                except psutil.Error:
                    continue
                cpu[one] = max(cpu.get(one, 0.0), times.user + times.system)
        used = psutil.cpu_times()
        everything = sum(used[:3]) + sum(used[5:8])  # not idle, not waiting
        decoders = sum(seconds for one, seconds in cpu.items() if ours[one] == "decoders")
        trace.append((time.perf_counter(), sum(cpu.values()), decoders, everything))
        time.sleep(0.1)
    return ours, cpu, trace


def _role(one: psutil.Process, mark: str, driver: int) -> str | None:
    try:
        if one.environ().get(MARK) != mark:
            return None
        command = " ".join(one.cmdline()[:4])
    except psutil.Error:
        return None
    if "longtake.pipeline.isolate" in command:
        return "decoders"
    if one.pid == driver:
        return "driver"
    return "Ray workers" if "default_worker.py" in command.partition("--")[0] else "Ray itself"


def turn(found: list[Path], clip: ClipConfig, group_sources: int, binary: str) -> dict[str, float]:
    """Measure all once, print it, and give the figures."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        junk = Path(folder, "junk")
        junk.mkdir()
        for n in range(len(found)):
            (junk / f"{n}.mp4").write_text(f"no video {n}")
        whole = stage(map(str, found), clip, group_sources, f"{folder}/whole")
        totals = index.summary(f"{folder}/whole")
        fixed = stage([f"{junk}/*"], clip, group_sources, f"{folder}/fixed")
    reference = ffmpeg(binary, found)
    crowded = ffmpeg(binary, found, cores)
    cut, frames, clips = cutting(found, clip)
    assert clips == totals["clips"], "the stage and the worker cut alike"
    print(
        f"{len(found)} files, {frames} source frames, {clips} clips; {cores} cores, at most {group_sources} sources a group"
    )
    for name, seconds in (
        ("ffmpeg, one thread", reference),
        (f"ffmpeg, {cores} at once", crowded),
        ("cutting, one decoder", cut),
        ("stage, all of it", whole.cpu),
        ("stage, files without a picture", fixed.cpu),
        ("stage, the difference", whole.cpu - fixed.cpu),
    ):
        print(f"{name:31s} {seconds:7.1f} CPU s  ratio {seconds / reference:.2f}")
    for name, one in (("all of it", whole), ("files without a picture", fixed)):
        parts = ", ".join(f"{role} {seconds:.1f}" for role, seconds in one.by_role.items())
        print(f"stage, {name}: {one.wall:.1f} s of wall; CPU s: {parts}")
    print(
        f"busy for the {whole.busy_wall:.1f} s of decoding: {whole.busy:.0%} of {cores} cores, with other work {whole.machine_busy:.0%}"
    )
    return {
        "cpu": (whole.cpu - fixed.cpu) / reference,
        "cutting": cut / reference,
        "busy": whole.busy,
        "fixed_wall": fixed.wall,
        "fixed_cpu": fixed.cpu,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fps", type=float, default=24)
    parser.add_argument("--ffmpeg", default=shutil.which("ffmpeg"), help="on PATH, else that of imageio-ffmpeg")
    parser.add_argument("--groups-per-core", type=int, default=8)
    parser.add_argument("--turns", type=int, default=1)
    figures.add_option(parser)
    arguments = parser.parse_args()
    ffmpeg_binary = arguments.ffmpeg or imageio_ffmpeg.get_ffmpeg_exe()
    # of files with the same bytes the stage decodes one
    files = sorted((p for p in arguments.folder.absolute().iterdir() if p.is_file()), reverse=True)
    found = sorted({sha256_of(p): p for p in files}.values())
    clip = ClipConfig(short_side=128, fps=arguments.fps, crf=23)
    cores = len(os.sched_getaffinity(0))
    group_sources = math.ceil(len(found) / (arguments.groups_per_core * cores))
    values: dict[str, list[float]] = {}
    for _ in range(arguments.turns):
        for name, value in turn(found, clip, group_sources, ffmpeg_binary).items():
            values.setdefault(name, []).append(value)
    figures.write(arguments.figures, values)
