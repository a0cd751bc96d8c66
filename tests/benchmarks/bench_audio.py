"""Codecs for the column of sound, and what it costs the loader.

    python tests/benchmarks/bench_audio.py FOLDER [--seconds 10] [--batches 100] [--clip-short-side 256]

The sound of the videos of FOLDER, and generated tones, are cut into clips as `shard` does. For each codec:
bytes a second, CPU milliseconds for a second to encode, to decode a clip, and to decode a window of 17 frames of it, and the
error as a share of the sound's root mean square. Then the same batches of the loader are made with video alone and with
video and sound, in turns: the target is a rate of 0.9 of that without. CPU seconds and medians, so that other work does not
disturb them.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from longtake.datasets import audio as sounds
from longtake.datasets import index
from longtake.datasets.loader import Loader
from longtake.pipeline import plan
from longtake.pipeline.audio import encode
from longtake.pipeline.commit import make_group
from longtake.pipeline.config import AudioConfig
from longtake.pipeline.container import Unreadable
from longtake.pipeline.soundtrack import Heard, Unheard, clocks_of, in_spans, soundtrack
from longtake.pipeline.stages import shard

RATE, FPS, WINDOW = 48_000, 24, 17
CODECS = {
    "pcm": None,
    "flac": AudioConfig(codec="flac"),
    **{f"opus {rate // 1000}k": AudioConfig(codec="opus", bitrate=rate) for rate in (64_000, 96_000, 128_000, 192_000)},
}


def clips_of(path: Path, seconds: float) -> list[np.ndarray]:
    """The sound of a video in clips, (n, 2) int16."""
    step = round(seconds * RATE)
    spans = [(n * step, (n + 1) * step) for n in range(6)]
    try:
        pieces = soundtrack(str(path), RATE, 2, clocks_of(str(path)), 6 * seconds, Heard())
        return [clip for clip in in_spans(pieces, spans) if clip is not None and clip.any()]
    except (Unheard, Unreadable, ValueError):
        return []


def tones(seconds: float) -> list[np.ndarray]:
    at = np.arange(round(seconds * RATE)) / RATE
    wave = sum(0.1 * np.sin(2 * np.pi * pitch * at) for pitch in (220, 330, 495, 1480, 3000))
    return [np.stack([wave, wave[::-1]], 1).__mul__(32767).astype(np.int16)]


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.process_time()
    result = work()
    return time.process_time() - begin, result


def windows_of(members: list[bytes], clips: list[np.ndarray]) -> list[np.ndarray]:
    """A window from the middle of each clip."""
    count = WINDOW * RATE // FPS
    starts = [(len(clip) - count) // 2 for clip in clips]
    return [sounds.decode(data, s, s + count, 2) for data, s in zip(members, starts, strict=True)]


def compare(clips: list[np.ndarray]) -> dict[str, dict[str, float]]:
    """The figures of each codec, by the second of sound."""
    seconds = sum(len(clip) for clip in clips) / RATE
    rows = {}
    for name, settings in CODECS.items():
        if settings is None:
            rows[name] = {"kB/s": sum(clip.nbytes for clip in clips) / seconds / 1000}
            continue
        encoding, members = timed(lambda s=settings: [encode(clip, s) for clip in clips])
        decoding, decoded = timed(
            lambda m=members: [sounds.decode(d, 0, len(c), 2) for d, c in zip(m, clips, strict=True)]
        )
        window, _ = timed(partial(windows_of, members, clips))
        errors = [
            np.sqrt(np.square(d.T - c / 32768).mean() / np.square(c / 32768).mean())
            for d, c in zip(decoded, clips, strict=True)
        ]
        rows[name] = {
            "kB/s": sum(map(len, members)) / seconds / 1000,
            "encode ms/s": 1000 * encoding / seconds,
            "decode ms/s": 1000 * decoding / seconds,
            "window ms": 1000 * window / len(clips),
            "error": statistics.median(map(float, errors)),
        }
    return rows


def sharded(folder: Path, paths: list[Path], short_side: int, audio: dict[str, Any]) -> str:
    config = shard.Config(
        kind="shard", sources=[str(p) for p in paths], clip={"short_side": short_side, "fps": FPS}, audio=audio
    )
    shard.describe(config, str(folder))
    for group in plan.plan(str(folder), config.sources, 0, 1 << 40, 1024):
        assert not make_group(group, plan.sources_of(str(folder), group), str(folder), config.cut)["error"]
    return str(folder)


def rates(dataset: str, batches: int, short_side: int) -> dict[str, float]:
    """Windows a CPU second of the loader with and without sound, which make the same batches in turns, and their ratio."""
    options: dict[str, Any] = {"frames": WINDOW, "size": (short_side, short_side), "batch": 4}
    loaders = {" and ".join(c): iter(Loader(dataset, columns=c, **options)) for c in (("video",), ("video", "audio"))}
    seconds: dict[str, list[float]] = {name: [] for name in loaders}
    for number in range(batches + 4):
        for name, loader in loaders.items():
            spent, _ = timed(partial(next, loader))
            seconds[name] += [spent] if number >= 4 else []  # the first ones open tars
    alone, both = seconds.values()
    found = {name: 4 / statistics.median(spent) for name, spent in seconds.items()}
    return found | {"ratio": statistics.median(a / b for a, b in zip(alone, both, strict=True))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--batches", type=int, default=100)
    parser.add_argument("--most", type=int, default=12, help="videos of FOLDER")
    parser.add_argument("--clip-short-side", type=int, default=256)
    given = parser.parse_args()
    with_sound = {p: c for p in sorted(given.folder.rglob("*.*")) if (c := clips_of(p, given.seconds))}
    chosen = dict(islice(with_sound.items(), given.most))
    print(f"{len(chosen)} videos with sound: {', '.join(path.name for path in chosen)}")
    print(json.dumps({"footage": compare([c for clips in chosen.values() for c in clips])}, indent=2))
    print(json.dumps({"tones": compare(tones(given.seconds))}, indent=2))
    for name in ("flac", "opus 96k", "opus 128k"):
        settings = CODECS[name]
        assert settings
        with tempfile.TemporaryDirectory() as folder:
            dataset = sharded(Path(folder), list(chosen), given.clip_short_side, settings.model_dump())
            sound = sum(s.tar_bytes for s in index.read_shards(dataset, "train", "audio"))
            video = sum(s.tar_bytes for s in index.read_shards(dataset, "train"))
            result = rates(dataset, given.batches, given.clip_short_side)
            print(json.dumps({name: result | {"MB": sound / 1e6, "video MB": video / 1e6}}, indent=2))


if __name__ == "__main__":
    main()
