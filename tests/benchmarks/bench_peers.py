"""The same files through video2dataset 1.3.0 and through ours, in one run: CPU seconds, and what comes out.

    python3.11 -m venv ENV
    ENV/bin/pip install --no-deps video2dataset==1.3.0 torchdata==0.7.1
    ENV/bin/pip install torch==2.13.0  # a build without CUDA will do
    ENV/bin/pip install 'numpy<2' 'pyarrow<19' 'pandas<3' 'python-dateutil<3' 'webdataset<0.3' 'scenedetect==0.6.2' \\
        'opencv-python-headless<4.11' 'transformers==4.37.1' 'huggingface_hub<1' 'fire<0.6' requests ffmpeg-python \\
        yt-dlp fsspec webvtt-py wandb tqdm timeout-decorator decord langdetect soundfile omegaconf einops Pillow scipy
    python tests/benchmarks/bench_peers.py FOLDER --python ENV/bin/python [--ffmpeg PATH] [--turns 3] [--figures FILE]

Both detect cuts, cut exactly there, drop pieces of less than a second, split at ten seconds, scale to a short side of
128 and write tars of H.264. Theirs re-encodes twice with libx264's defaults (medium, crf 23), ours once (veryfast,
crf 23, with scores, hashes and frame differences). Files whose suffix video2dataset does not take are left out.

video2dataset pins versions that exist no more in one piece. Newer ones are used; its audio library, which it imports
and does not use here, is an empty stand-in. As released, its download worker asks ResolutionSubsampler for an attribute
that it lacks, and every shard fails; `--as-released` shows that, else the attribute is added.

Theirs counts by getrusage, ours as `bench_shard.py` does. The fixed part of theirs is a run over files that hold no
video. Figure: `ratio`, of CPU seconds without the fixed parts, theirs to ours.
"""

import argparse
import json
import math
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import figures
import imageio_ffmpeg
from bench_shard import children, cutting, stage

from longtake.datasets import index, schema
from longtake.pipeline.config import ClipConfig

SUFFIXES = (".mp4", ".webm", ".mov", ".avi", ".mkv")
RUN = """
import json, sys
from video2dataset import video2dataset
from video2dataset.subsamplers import ResolutionSubsampler

if sys.argv[2] == "mended":
    ResolutionSubsampler.encode_formats = {"video": "mp4"}
if __name__ == "__main__":
    video2dataset(**json.loads(sys.argv[1]))
"""
SUBSAMPLING = {
    "CutDetectionSubsampler": {"cuts_are_clips": True, "args": {"cut_detection_mode": "all"}},
    "ClippingSubsampler": {"args": {"min_length": 1.0, "max_length": 10.0, "precision": "exact"}},
}


@dataclass(frozen=True)
class Peer:
    cpu: float
    sources: int  # with a sample
    samples: int
    seconds: float  # of footage in them
    claimed: int  # sources that its own statistics call a success
    log: str


def video2dataset(python: str, ffmpeg: str, videos: list[Path], mend: bool, folder: Path) -> Peer:
    """Run it as its documentation says, with as many processes as cores, one thread each, ten videos a shard."""
    cores = len(os.sched_getaffinity(0))
    stand_in = folder / "stand_in" / "torchaudio"
    stand_in.mkdir(parents=True)
    for name in ("__init__.py", "functional.py"):
        (stand_in / name).touch()
    binaries = folder / "bin"
    binaries.mkdir()
    (binaries / "ffmpeg").symlink_to(ffmpeg)
    (folder / "run.py").write_text(RUN)
    (folder / "list.csv").write_text("\n".join(["url", *map(str, videos)]) + "\n")
    config = {
        "subsampling": SUBSAMPLING | {"ResolutionSubsampler": {"args": {"height": 128, "resize_mode": "scale"}}},
        "reading": {
            "yt_args": {"download_size": 360, "download_audio_rate": 44100, "yt_metadata_args": None},
            "timeout": 60,
            "sampler": None,
        },
        "storage": {"number_sample_per_shard": 10, "oom_shard_count": 5, "captions_are_subtitles": False},
        "distribution": {
            "processes_count": cores,
            "thread_count": 1,
            "subjob_size": 1000,
            "distributor": "multiprocessing",
        },
    }
    # JSON is YAML
    (folder / "config.yaml").write_text(json.dumps(config))
    call = {
        "url_list": str(folder / "list.csv"),
        "output_folder": str(folder / "out"),
        "output_format": "webdataset",
        "encode_formats": {"video": "mp4"},
        "tmp_dir": str(folder),
        "config": str(folder / "config.yaml"),
    }
    before = children()
    done = subprocess.run(
        [python, str(folder / "run.py"), json.dumps(call), "mended" if mend else "released"],
        env=os.environ | {"PYTHONPATH": str(stand_in.parent), "PATH": f"{binaries}{os.pathsep}{os.environ['PATH']}"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    cpu = children() - before
    sources, samples, seconds = set(), 0, 0.0
    for tar in sorted((folder / "out").glob("*.tar")):
        if not tar.stat().st_size:
            continue
        with tarfile.open(tar) as members:
            for member in members:
                if member.name.endswith(".mp4") and (file := members.extractfile(member)):
                    with av.open(file) as container:
                        seconds += float(container.duration or 0) / av.time_base
                    sources.add(member.name.split("_")[0])
                    samples += 1
    stats = [json.loads(path.read_text()) for path in (folder / "out").glob("*_stats.json")]
    return Peer(cpu, len(sources), samples, seconds, sum(s["successes"] for s in stats), done.stdout)


def ours(dataset: str) -> tuple[int, int, float]:
    """Sources with a clip, clips, seconds of footage."""
    rows: list[dict[str, Any]] = []
    for split in schema.SPLITS:
        for name in index.shard_names(dataset, split):
            rows += index.read_shard(dataset, split, name).table.select(["source", "frame_count", "fps"]).to_pylist()
    return len({r["source"] for r in rows}), len(rows), sum(r["frame_count"] / r["fps"] for r in rows)


HEAD = f"{'':24s} {'CPU s':>7s} {'fixed':>7s} {'sources':>7s} {'clips':>6s} {'footage':>8s}"


def without_video(folder: Path, count: int) -> list[Path]:
    """Make the folders of a turn; returns so many files that hold no video, by which fixed parts are measured."""
    for part in ("junk", "theirs", "nothing"):
        (folder / part).mkdir()
    junk = [folder / "junk" / f"{n}.mp4" for n in range(count)]
    for n, path in enumerate(junk):
        path.write_text(f"no video {n}")
    return junk


def turn(found: list[Path], taken: list[Path], python: str, binary: str, mend: bool) -> float:
    """Measure both once and print it; gives CPU seconds without the fixed parts, theirs to ours."""
    clip = ClipConfig(short_side=128, crf=23)
    group_sources = math.ceil(len(taken) / (8 * len(os.sched_getaffinity(0))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        junk = without_video(folder, len(taken))
        theirs = video2dataset(python, binary, taken, mend, folder / "theirs")
        nothing = video2dataset(python, binary, junk, mend, folder / "nothing")
        print(f"{len(taken)} of {len(found)} files have a suffix that video2dataset takes")
        print(HEAD)
        print(
            f"{'video2dataset 1.3.0':24s} {theirs.cpu:7.1f} {nothing.cpu:7.1f} {theirs.sources:7d} {theirs.samples:6d}"
            f" {theirs.seconds:6.1f} s; it says that {theirs.claimed} of {len(taken)} files succeeded,"
            f" and {nothing.claimed} of {len(junk)} that hold no video",
            flush=True,
        )
        if theirs.claimed != theirs.sources:
            print("the end of its log:\n" + "\n".join(theirs.log.splitlines()[-20:]))
        whole = stage(map(str, taken), clip, group_sources, f"{folder}/ours")
        fixed = stage(map(str, junk), clip, group_sources, f"{folder}/fixed")
        sources, clips, seconds = ours(f"{folder}/ours")
        cut, frames, _ = cutting(taken, clip)
    print(f"{'longtake, shard stage':24s} {whole.cpu:7.1f} {fixed.cpu:7.1f} {sources:7d} {clips:6d} {seconds:6.1f} s")
    print(f"{'longtake, cutting only':24s} {cut:7.1f} for {frames} source frames")
    mine = whole.cpu - fixed.cpu
    print(
        f"ratio theirs to ours: {theirs.cpu / whole.cpu:.2f}; less the fixed parts {(theirs.cpu - nothing.cpu) / mine:.2f}"
    )
    return (theirs.cpu - nothing.cpu) / mine


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", required=True, help="of the environment that holds video2dataset")
    parser.add_argument(
        "--ffmpeg",
        default=shutil.which("ffmpeg"),
        help="what video2dataset calls: on PATH, else that of imageio-ffmpeg",
    )
    parser.add_argument("--as-released", action="store_true")
    parser.add_argument("--turns", type=int, default=1)
    figures.add_option(parser)
    arguments = parser.parse_args()
    binary = str(Path(arguments.ffmpeg or imageio_ffmpeg.get_ffmpeg_exe()).absolute())
    found = sorted(p for p in arguments.folder.absolute().iterdir() if p.is_file())
    taken = [p for p in found if p.suffix in SUFFIXES]
    chosen = (arguments.python, binary, not arguments.as_released)
    figures.write(arguments.figures, {"ratio": [turn(found, taken, *chosen) for _ in range(arguments.turns)]})
