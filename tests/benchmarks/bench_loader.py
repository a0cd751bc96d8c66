"""Decoded windows, latent windows and plain members a second: ours against the same reads without a loader.

    python tests/benchmarks/bench_loader.py FOLDER [--dataset URL] [--only video|latent|members] [--profile]

FOLDER holds videos, of which a dataset of clips with a short side of 128 is made first; `--dataset` takes one that is
there already. Each pair is measured in turns, `--turns` times; what is printed is the median of each and of the
ratios, by wall and by CPU seconds (of all processes, so that other work on the machine counts less).

video: `Loader(columns=("video",))` with two workers in steady state, against two processes that decode the same windows
    of the same clips, which lie in their memory, and crop them: by decord, and by `clip.decode`. They neither check nor
    stack nor hand over. The targets are 1.1 of decord and 0.95 of our own decoder.
latent: `Loader(columns=("latent-...",))` over a synthetic column in the page cache, against `os.pread` and
    `np.frombuffer` of the same bytes in the same order, and the same with zlib's CRC-32; and two workers against none. The
    targets are 0.7, 1.0 and 1.8.
members: `Reader.member` over all mp4 and json members of synthetic tars in the page cache, against iterating the tars
    by `webdataset.WebDataset` without decoding: bytes a CPU second. The target is 2.5 times as many.

`--profile` prints where the time of ours goes, of one process.
"""

import argparse
import cProfile
import io
import json
import multiprocessing
import os
import pstats
import statistics
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import decord
import figures
import numpy as np
import psutil
import webdataset

from longtake.datasets import clip, compact, index, schema, storage
from longtake.datasets.loader import Loader, order
from longtake.datasets.loader.reader import Reader
from longtake.datasets.loader.window import draw
from longtake.datasets.shard import sha256_of, write_tar
from longtake.pipeline import plan
from longtake.pipeline.commit import make_group
from longtake.pipeline.stages import shard

FRAMES, SIZE, BATCH, WORKERS = 17, (128, 128), 8, 2
LATENT, FACTOR, STEPS, SHAPE = "latent-5eed", 4, 60, (2, 16, 16, 16)
Times = tuple[float, float]  # seconds by the clock and of CPU


def make_clips(folder: str, videos: list[Path], short_side: int = 128) -> str:
    """A dataset of clips made without Ray, all in the train split."""
    described = shard.Config(kind="shard", sources=[str(videos[0])], clip={"short_side": short_side})
    kept = described.model_dump(mode="json", include={"clip", "frame_diff"})
    storage.write(f"{folder}/dataset.json", storage.canonical_json({"format": schema.FORMAT_VERSION, **kept}))
    for group in plan.plan(folder, [str(v) for v in videos], 0.0, 1 << 40, 8):
        made = make_group(group, plan.sources_of(folder, group), folder, described.cut)
        assert not made["error"], made["error"]
    compact.write(folder, "train")
    return folder


def synthetic(folder: str, shards: int, clips: int, mp4_bytes: int, latent: bool) -> str:
    """Tars of random bytes in place of clips, and a latent column of random bytes."""
    rng = np.random.default_rng(0)
    storage.write(f"{folder}/dataset.json", storage.canonical_json({"format": schema.FORMAT_VERSION}))
    for number in range(shards):
        keys = [f"{number:015x}{n:05x}-00000" for n in range(clips)]
        about = json.dumps({"caption": "x" * 300}).encode()
        members = _tar(folder, f"{number:05d}", [(k, {"mp4": rng.bytes(mp4_bytes), "json": about}) for k in keys])
        shown = {"clip": 0, "first_frame": 0, "start_seconds": 0.0, "fps": 24.0, "width": 128, "height": 128}
        shown |= {"frame_count": 1 + (STEPS - 1) * FACTOR, "phash": 0, **dict.fromkeys(schema.SCORES, 0.0)}
        rows = []
        for mp4, text in zip(members[::2], members[1::2], strict=True):
            places = {f"{m.extension}_{n}": getattr(m, n) for m in (mp4, text) for n in ("offset", "size", "crc32")}
            rows.append({"key": mp4.key, "source": mp4.key[:20], "sha256": mp4.sha256, **places, **shown})
        _commit(folder, f"{number:05d}", rows, schema.INDEX)
        if latent:
            _latents(folder, number, rows, rng)
    compact.write(folder, "train")
    if latent:
        compact.write(folder, "train", LATENT)
    return folder


def _latents(folder: str, number: int, rows: list[dict[str, Any]], rng: np.random.Generator) -> None:
    step = 2 * int(np.prod(SHAPE))
    # finite float16s: the top bits of the exponent stay 0
    arrays = [(rng.integers(0, 1 << 14, (STEPS, *SHAPE), np.uint16)).view(np.float16) for _ in rows]
    encoded = []
    for array in arrays:
        sink = io.BytesIO()
        np.save(sink, array)
        encoded.append(sink.getvalue())
    members = _tar(
        folder, f"{number:05d}.{LATENT}", [(r["key"], {"npy": e}) for r, e in zip(rows, encoded, strict=True)]
    )
    places = []
    for member, row, array in zip(members, rows, arrays, strict=True):
        data = array.tobytes()
        sums = [zlib.crc32(data[n * step : (n + 1) * step]) for n in range(STEPS)]
        place = {"key": row["key"], "offset": member.offset, "size": member.size, "crc32": member.crc32}
        place |= {"sha256": member.sha256, "base_sha256": row["sha256"], "factor": FACTOR, "steps": STEPS}
        place |= {"channels": SHAPE[1], "height": SHAPE[2], "width": SHAPE[3]}
        places.append(place | {"step_crc32": np.array(sums, "<u4").tobytes()})
    _commit(folder, f"{number:05d}.{LATENT}", places, schema.LATENT_INDEX)


def _tar(folder: str, name: str, samples: list[tuple[str, dict[str, bytes]]]) -> Any:
    path = Path(folder, "train", f"{name}.tar")
    path.parent.mkdir(parents=True, exist_ok=True)
    return write_tar(path, samples)


def _commit(folder: str, name: str, rows: list[dict[str, Any]], of: Any) -> None:
    tar = Path(folder, "train", f"{name}.tar")
    index.write_index(f"{folder}/train/{name}.parquet", rows, of, tar.stat().st_size, sha256_of(tar))


@contextmanager
def timed(times: list[Times]) -> Iterator[None]:
    """Append the wall and CPU seconds of the block, of this process and all that it started."""
    cpu, wall = tree_cpu(), time.perf_counter()
    yield
    times.append((time.perf_counter() - wall, tree_cpu() - cpu))


def tree_cpu() -> float:
    this = psutil.Process()
    return sum(sum(one.cpu_times()[:2]) for one in (this, *this.children(recursive=True)))


class Bare:
    """Processes that do a job of theirs, each its share; started before the clock is."""

    def __init__(self, work: Callable[[Any], None], count: int) -> None:
        context = multiprocessing.get_context("fork")
        self.pipes: list[Connection] = []
        self.processes = []
        for _ in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(work, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, jobs: list[list[Any]], times: list[Times]) -> None:
        for pipe, job in zip(self.pipes, jobs, strict=True):
            pipe.send(job)
        for pipe in self.pipes:
            pipe.recv()  # it has its job
        with timed(times):
            for pipe in self.pipes:
                pipe.send("go")
            for pipe in self.pipes:
                pipe.recv()

    def close(self) -> None:
        for process in self.processes:
            process.terminate()
            process.join()


def _serve(work: Callable[[Any], None], pipe: Connection) -> None:
    while True:
        job = pipe.recv()
        pipe.send("ready")
        pipe.recv()
        for one in job:
            work(one)
        pipe.send("done")


def windows(loader: Loader, number: int) -> list[tuple[int, int, dict[str, Any], list[int]]]:
    """What batch `number` is made of: shard, place, row and frames of each sample."""
    split = loader.plan.split
    _, window, samples = loader.plan.samples_of(number)
    out = []
    for one in samples:
        row = split.base.row(one.shard, one.row)
        rng = order.sample_rng(*one.chance[:2], row["key"], one.chance[2]) if one.chance else None
        quantum = FACTOR if split.latents else 1
        out.append((one.shard, one.row, row, draw(window, rng, row["frame_count"], quantum)[0]))
    return out


def by_decord(job: tuple[bytes, list[int]]) -> None:
    video = decord.VideoReader(io.BytesIO(job[0]), num_threads=1).get_batch(job[1]).asnumpy()
    clip.crop(video, SIZE)


def by_pyav(job: tuple[bytes, list[int]]) -> None:
    clip.crop(clip.decode(*job), SIZE)


def video(dataset: str, turns: int, batches: int) -> dict[str, list[float]]:
    loader = Loader(dataset, columns=("video",), frames=FRAMES, size=SIZE, batch=BATCH, workers=WORKERS)
    rows, reader = loader.plan.split.base, Reader()
    decoders = {"decord": Bare(by_decord, WORKERS), "clip.decode": Bare(by_pyav, WORKERS)}
    times: dict[str, list[Times]] = {name: [] for name in ("ours", *decoders)}
    stream, number = iter(loader), 0
    for _ in range(turns):
        # those made before the clock starts
        for _ in range(3 * WORKERS * 2):
            next(stream)
            number += 1
        with timed(times["ours"]):
            for _ in range(batches):
                next(stream)
        jobs: list[list[Any]] = [[] for _ in range(WORKERS)]
        for n in range(number, number + batches):
            for at, _, row, frames in windows(loader, n):
                mp4 = reader.member(rows, at, row["mp4_offset"], row["mp4_size"], row["mp4_crc32"])
                jobs[n % WORKERS].append((bytes(mp4), frames))
        number += batches
        for name, decoder in decoders.items():
            decoder.run(jobs, times[name])
    for decoder in decoders.values():
        decoder.close()
    print(f"video: {loader.samples} clips, windows of {FRAMES}x{SIZE[0]}x{SIZE[1]}, {WORKERS} processes")
    show(times, batches * BATCH, "windows")
    return {"decord": to_ours(times, "decord"), "decoder": to_ours(times, "clip.decode")}


def latent(dataset: str, turns: int, batches: int) -> dict[str, list[float]]:
    step = 2 * int(np.prod(SHAPE))
    readings = [_Reading(dataset, workers) for workers in (0, WORKERS)]
    for _ in range(turns):
        for reading in readings:
            reading.turn(batches)
    for reading in readings:
        size = (1 + (FRAMES - 1) // FACTOR) * step
        print(f"latent: {reading.loader.samples} clips, windows of {size >> 10} KiB, {reading.workers} workers")
        show(reading.times, batches * BATCH, "windows")
        reading.close()
    alone, spread = (reading.times["ours"] for reading in readings)
    gains = [one[0] / other[0] for one, other in zip(alone, spread, strict=True)]
    print(f"  {WORKERS} workers to none: {statistics.median(gains):.2f} by wall")
    return {
        "latent-pread": to_ours(readings[0].times, "pread"),
        "latent-crc": to_ours(readings[0].times, "pread and CRC-32"),
        "latent-workers": gains,
    }


class _Reading:
    """Windows of latents by a loader, and the bytes of the same windows by as many processes without one."""

    def __init__(self, dataset: str, workers: int) -> None:
        self.workers = workers
        self.loader = Loader(dataset, workers=workers, columns=(LATENT,), frames=FRAMES, batch=BATCH)
        split = self.loader.plan.split
        self.rows = split.columns[split.latents[0]]
        self.files = [os.open(self.rows.tar(n)[0], os.O_RDONLY) for n in range(len(split.base.shards))]
        self.bare = Bare(raw, max(1, workers))
        self.times: dict[str, list[Times]] = {name: [] for name in ("ours", "pread", "pread and CRC-32")}
        self.stream, self.number = iter(self.loader), 0

    def turn(self, batches: int) -> None:
        # those made before the clock starts
        for _ in range(64 * self.workers + 2):
            next(self.stream)
            self.number += 1
        with timed(self.times["ours"]):
            for _ in range(batches):
                next(self.stream)
        jobs: list[list[Any]] = [[] for _ in self.bare.pipes]
        for n in range(self.number, self.number + batches):
            jobs[n % len(jobs)] += [self._place(at, row, frames[0]) for at, row, _, frames in windows(self.loader, n)]
        self.number += batches
        self.bare.run([[(*job[:3], None) for job in part] for part in jobs], self.times["pread"])
        self.bare.run(jobs, self.times["pread and CRC-32"])

    def _place(self, shard: int, row: int, frame: int) -> tuple[int, int, int, list[int]]:
        """File, first byte, size and checksums of a window."""
        place, step = self.rows.row(shard, row), 2 * int(np.prod(SHAPE))
        first, count = frame // FACTOR, 1 + (FRAMES - 1) // FACTOR
        sums = np.frombuffer(place["step_crc32"], "<u4")[first : first + count].tolist()
        return self.files[shard], place["offset"] + place["size"] - (STEPS - first) * step, count * step, sums

    def close(self) -> None:
        self.bare.close()
        for file in self.files:
            os.close(file)


def raw(job: tuple[int, int, int, list[int] | None]) -> None:
    """Read a window of latents, and check it where checksums are given."""
    file, start, size, sums = job
    data = os.pread(file, size, start)
    np.frombuffer(data, np.float16).reshape(-1, *SHAPE)
    if sums is not None:
        step = 2 * int(np.prod(SHAPE))
        assert [zlib.crc32(data[n * step : (n + 1) * step]) for n in range(len(sums))] == sums


def members(dataset: str, turns: int) -> dict[str, list[float]]:
    rows, _ = compact.open_split(dataset, "train")
    tars = [rows.tar(n)[0] for n in range(len(rows.shards))]
    read = 0

    def ours() -> int:
        reader, done = Reader(), 0
        for n in range(len(tars)):
            columns = rows.of(n).select([f"{m}_{c}" for m in ("mp4", "json") for c in ("offset", "size", "crc32")])
            for a, b, c, d, e, f in zip(*(column.to_pylist() for column in columns.columns), strict=True):
                done += len(reader.member(rows, n, a, b, c)) + len(reader.member(rows, n, d, e, f))
        return done

    def ranges() -> int:
        """The same without the check: every byte is copied instead."""
        reader, done = Reader(), 0
        for n in range(len(tars)):
            columns = rows.of(n).select([f"{m}_{c}" for m in ("mp4", "json") for c in ("offset", "size")])
            for a, b, d, e in zip(*(column.to_pylist() for column in columns.columns), strict=True):
                done += len(bytes(reader.range(rows, n, a, b))) + len(bytes(reader.range(rows, n, d, e)))
        return done

    def theirs() -> int:
        samples = webdataset.WebDataset(tars, shardshuffle=False)
        return sum(len(sample["mp4"]) + len(sample["json"]) for sample in samples)

    times: dict[str, list[Times]] = {"ours": [], "ours, copied unchecked": [], "webdataset": []}
    for turn in range(turns + 1):
        for name, work in zip(times, (ours, ranges, theirs), strict=True):
            with timed(times[name]):
                read = work()
        if not turn:
            times = {name: [] for name in times}  # the first turn warms the page cache
    print(f"members: {len(tars)} tars, {read / 1e9:.2f} GB")
    show(times, read / 1e9, "GB")
    return {"members": to_ours(times, "webdataset", of=1)}


def to_ours(times: dict[str, list[Times]], name: str, of: int = 0) -> list[float]:
    """How many times as much ours does in each turn, by wall (0) or by CPU seconds (1)."""
    return [other[of] / ours[of] for other, ours in zip(times[name], times["ours"], strict=True)]


def show(times: dict[str, list[Times]], done: float, unit: str) -> None:
    for name, taken in times.items():
        wall, cpu = (statistics.median(part) for part in zip(*taken, strict=True))
        line = f"  {name:24s} {done / wall:10.2f} {unit}/s {done / cpu:10.2f} {unit}/CPU s"
        if name != "ours":
            by_wall, by_cpu = (statistics.median(to_ours(times, name, of)) for of in range(2))
            line += f"   ours to this: {by_wall:.2f} by wall, {by_cpu:.2f} by CPU"
        print(line)
    print(f"  load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores", flush=True)


def profile(what: str, work: Callable[[], Any]) -> None:
    profiler = cProfile.Profile()
    profiler.runcall(work)
    sink = io.StringIO()
    pstats.Stats(profiler, stream=sink).strip_dirs().sort_stats("tottime").print_stats(25)
    print(f"profile of {what}:\n{sink.getvalue()}")


def batches_of(dataset: str, columns: tuple[str, ...], count: int) -> Callable[[], None]:
    stream = iter(Loader(dataset, columns=columns, frames=FRAMES, size=SIZE, batch=BATCH))
    next(stream)

    def take() -> None:
        for _ in range(count):
            next(stream)

    return take


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dataset", help="a dataset of clips in place of the one to make")
    parser.add_argument("--only", choices=("video", "latent", "members"))
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", type=int, default=24, help="batches of video in one measurement")
    parser.add_argument("--latent-mb", type=int, default=300)
    parser.add_argument("--member-mb", type=int, default=512)
    parser.add_argument("--profile", action="store_true")
    figures.add_option(parser)
    arguments = parser.parse_args()
    wanted = {arguments.only} if arguments.only else {"video", "latent", "members"}
    values: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as spool:
        if "video" in wanted:
            found = sorted(p.absolute() for p in arguments.folder.iterdir() if p.is_file())
            clips = arguments.dataset or make_clips(f"{spool}/clips", found)
            values |= video(clips, arguments.turns, arguments.batches)
            if arguments.profile:
                profile("video", batches_of(clips, ("video",), arguments.batches))
        if "latent" in wanted:
            count = (arguments.latent_mb << 20) // (STEPS * 2 * int(np.prod(SHAPE)))
            latents = synthetic(f"{spool}/latents", 4, max(BATCH, count // 4), 1000, latent=True)
            values |= latent(latents, arguments.turns, 50 * arguments.batches)
            if arguments.profile:
                profile("latent", batches_of(latents, (LATENT,), 20 * arguments.batches))
        if "members" in wanted:
            values |= members(
                synthetic(f"{spool}/members", 4, arguments.member_mb // 4, 1 << 20, latent=False), arguments.turns
            )
    figures.write(arguments.figures, values)
