"""The same files split and transcoded by NeMo Curator 1.4.0 and by ours, in one run: CPU seconds, and what comes out.

    python3.11 -m venv ENV
    ENV/bin/pip install 'nemo-curator[video-cpu]==1.4.0'
    apt-get install ffmpeg  # for ffprobe
    python tests/benchmarks/bench_curator.py FOLDER --python ENV/bin/python [--turns 3] [--figures FILE]

Theirs are the stages of its own example for videos, as its documentation sets them for CPUs: VideoReader, a fixed
stride of ten seconds, ClipTranscodingStage with `libopenh264`, one thread, 16 clips a batch, and ClipWriterStage. No
model runs. Of the encoders that it takes, `h264_nvenc` needs a GPU, and it calls `libvpx-vp9` the slower way; it takes
`libx264` no more. The ffmpeg of imageio-ffmpeg has libopenh264, that of Debian has not.

The stages are called one after the other for each file, in as many processes as cores. Its executors only add to that:
on two cores RayDataExecutor raises TaskUnschedulableError, since the transcoding stage asks for six CPUs, and with one
CPU for it, four files had not moved after four minutes of a busy machine.

Theirs does less and more. It neither looks for cuts nor scores, hashes, scales or resamples, and copies the sound. Its
clips thus have the size and the rate of their source, where ours have a short side of 128 and 24 frames a second. Files
whose suffix it does not take are left out.

Theirs counts by getrusage, ours as `bench_shard.py` does. The fixed part of both is a run over files that hold no
video. Figure: `ratio`, of CPU seconds without the fixed parts, theirs to ours.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

import av
import figures
import imageio_ffmpeg
from bench_peers import HEAD, SUFFIXES, ours, without_video
from bench_shard import children, stage

from longtake.pipeline.config import ClipConfig

ENCODERS = ("libopenh264", "libvpx-vp9")
RUN = """
import sys
from nemo_curator.stages.video.clipping.clip_extraction_stages import ClipTranscodingStage, FixedStrideExtractorStage
from nemo_curator.stages.video.io.clip_writer import ClipWriterStage
from nemo_curator.stages.video.io.video_reader import VideoReader
from nemo_curator.tasks import EmptyTask

videos, output, encoder = sys.argv[1:]
listing, *stages = [
    *VideoReader(videos).decompose(),
    FixedStrideExtractorStage(clip_len_s=10.0, clip_stride_s=10.0, min_clip_length_s=1.0, limit_clips=0),
    ClipTranscodingStage(encoder=encoder, encoder_threads=1, encode_batch_size=16),
    ClipWriterStage(
        output_path=output, input_path=videos, upload_clips=True, dry_run=False, generate_embeddings=False,
        generate_previews=False, generate_captions=False, caption_models=[], enhanced_caption_models=[],
    ),
]
for stage in (listing, *stages):
    stage.setup()
for task in listing.process(EmptyTask()):
    tasks = [task]
    try:
        for stage in stages:
            made = [stage.process(task) for task in tasks]
            tasks = [one for some in made for one in (some if isinstance(some, list) else [some])]
    except Exception as e:
        print(f"LOST {task.data}: {e!r}", flush=True)
"""


@dataclass(frozen=True)
class Peer:
    cpu: float
    sources: int  # with a clip
    clips: int
    seconds: float  # of footage in them
    log: str


def curator(python: str, binaries: dict[str, str], encoder: str, videos: list[Path], folder: Path) -> Peer:
    """Run its stages over the videos, dealt out to as many processes as cores."""
    for name in ("bin", "tmp"):
        (folder / name).mkdir()
    for name, binary in binaries.items():
        (folder / "bin" / name).symlink_to(binary)
    (folder / "run.py").write_text(RUN)
    cores = min(len(os.sched_getaffinity(0)), len(videos))
    for n, video in enumerate(videos):
        (folder / f"in{n % cores}").mkdir(exist_ok=True)
        (folder / f"in{n % cores}" / video.name).symlink_to(video)
    environment = os.environ | {
        "PATH": f"{folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
        "TMPDIR": str(folder / "tmp"),
    }
    before = children()
    processes = []
    for core in range(cores):
        command = [python, str(folder / "run.py"), str(folder / f"in{core}"), str(folder / f"out{core}"), encoder]
        with (folder / f"log{core}").open("w") as log:
            processes.append(
                subprocess.Popen(
                    command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
                )
            )
    failed = [process.wait() for process in processes]
    cpu = children() - before
    text = "".join((folder / f"log{core}").read_text() for core in range(cores))
    if any(failed):
        raise SystemExit(f"NeMo Curator failed:\n{text[-2000:]}")
    sources, clips, seconds = set(), 0, 0.0
    for meta in folder.glob("out*/metas/v0/*.json"):
        row = json.loads(meta.read_text())
        if Path(row["clip_location"]).is_file():
            with av.open(row["clip_location"]) as container:
                seconds += float(container.duration or 0) / av.time_base
            sources.add(row["source_video"])
            clips += 1
    return Peer(cpu, len(sources), clips, seconds, text)


def turn(found: list[Path], taken: list[Path], python: str, binaries: dict[str, str], encoder: str) -> float:
    """Measure both once and print it; gives CPU seconds without the fixed parts, theirs to ours."""
    clip = ClipConfig(short_side=128, crf=23)
    group_sources = math.ceil(len(taken) / (8 * len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        junk = without_video(folder, len(taken))
        theirs = curator(python, binaries, encoder, taken, folder / "theirs")
        nothing = curator(python, binaries, encoder, junk, folder / "nothing")
        print(f"{len(taken)} of {len(found)} files have a suffix that NeMo Curator takes")
        print(HEAD)
        print(
            f"{'NeMo Curator 1.4.0':24s} {theirs.cpu:7.1f} {nothing.cpu:7.1f} {theirs.sources:7d} {theirs.clips:6d}"
            f" {theirs.seconds:6.1f} s",
            flush=True,
        )
        for line in theirs.log.splitlines():
            if line.startswith("LOST"):
                print(line)
        whole = stage(map(str, taken), clip, group_sources, f"{folder}/ours")
        fixed = stage(map(str, junk), clip, group_sources, f"{folder}/fixed")
        sources, clips, seconds = ours(f"{folder}/ours")
    print(f"{'longtake, shard stage':24s} {whole.cpu:7.1f} {fixed.cpu:7.1f} {sources:7d} {clips:6d} {seconds:6.1f} s")
    ratio = (theirs.cpu - nothing.cpu) / (whole.cpu - fixed.cpu)
    print(f"ratio theirs to ours: {theirs.cpu / whole.cpu:.2f}; less the fixed parts {ratio:.2f}", flush=True)
    return ratio


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True, help="of the environment that holds NeMo Curator")
    parser.add_argument(
        "--encoder", choices=ENCODERS, default=ENCODERS[0], help="what NeMo Curator's clips are made by"
    )
    parser.add_argument(
        "--ffmpeg", default=imageio_ffmpeg.get_ffmpeg_exe(), help="what NeMo Curator calls: that of imageio-ffmpeg"
    )
    parser.add_argument("--ffprobe", default=shutil.which("ffprobe"), help="what NeMo Curator calls: on PATH")
    figures.add_option(parser, turns=1)
    arguments = parser.parse_args()
    if not arguments.ffprobe:
        figures.unable("no ffprobe on PATH, which NeMo Curator calls: install ffmpeg, or give --ffprobe")
    binaries = {name: str(Path(getattr(arguments, name)).absolute()) for name in ("ffmpeg", "ffprobe")}
    found = sorted(p for p in arguments.folder.absolute().iterdir() if p.is_file())
    taken = [p for p in found if p.suffix in SUFFIXES]
    chosen = (arguments.python, binaries, arguments.encoder)
    figures.write(arguments.figures, {"ratio": [turn(found, taken, *chosen) for _ in range(arguments.turns)]})
