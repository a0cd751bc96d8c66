"""The same clips through five other loaders and ours: samples a second, and resuming in mid-epoch.

    python3.11 -m venv ENV
    ENV/bin/pip install torch==2.13.0 decord av zstandard \\
        webdataset litdata mosaicml-streaming megatron-energon==7.4.1 spdl==0.8.0
    ENV/bin/pip uninstall torchvision  # unless it is of the same build as torch
    python tests/benchmarks/bench_loader_peers.py FOLDER --python ENV/bin/python [--dataset URL]

FOLDER holds videos, of which a dataset of clips with a short side of 128 is made first; `--dataset` takes one that is
there already. The clips are repeated under other names to `--samples`, and written as tars (ours, which webdataset and
Energon read as well), litdata chunks, MDS shards and plain files (for SPDL, which has no format of its own), all on the
local disk and in the page cache. peer_loaders.py is the half that runs in the peers' environment.

Throughput: 17 consecutive frames from a random place of each clip, cropped to 128x128, shuffled, batches of 8, two
workers, in steady state within the first epoch, in turns, medians of `--turns`. The peers decode by our own
`clip.decode` and, in a second set, by decord. The target is 1.2 times the best of them.

- Energon: a crude dataset with a cooker, as its documentation has it for what no sample type of its own fits, its own
  decoders off; `get_loader` here, `get_savable_loader` where a state is saved.
- SPDL: its documentation has no best way but three to try. `spdl` is its first, threads in the process of the training,
  and `spdl-mp` its way where Python holds the threads up, a pool of processes that make whole batches. The third, threads
  in one process beside, is for a training step that uses the CPU, and is left out. A further line
  is `spdl` with its own decoder, `spdl.io`, whose pixels are the same as ours and decord's.

Resuming: each takes `--broken-after` batches without decoding, saves its state and ends; a new process goes on to the
end of the epoch, with as many workers or another number. Counted are samples that came twice and that never came.
webdataset and SPDL have no state to save.

mosaicml-streaming imports torchvision, which it does not need here; it gets an empty stand-in.
"""

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import peer_loaders
import psutil
from peer_loaders import BATCH, FRAMES, SIZE, WORKERS


def repeated(dataset: str, folder: Path, samples: int) -> None:
    """The clips of a dataset under other names until there are so many, as ours and as plain files."""
    from bench_loader import _commit, _tar

    from longtake.datasets import compact, schema, storage
    from longtake.datasets.loader.reader import Reader

    base, _ = compact.open_split(dataset, "train")
    reader, clips = Reader(), []
    (folder / "plain").mkdir()
    for shard in range(len(base.shards)):
        for row in base.of(shard).to_pylist():
            if row["frame_count"] >= FRAMES:
                mp4 = bytes(reader.member(base, shard, row["mp4_offset"], row["mp4_size"], row["mp4_crc32"]))
                (folder / "plain" / row["key"]).write_bytes(mp4)
                clips.append((row, mp4))
    ours = str(folder / "ours")
    storage.write(f"{ours}/dataset.json", storage.canonical_json({"format": schema.FORMAT_VERSION}))
    listed = []
    for number, start in enumerate(range(0, samples, 64)):
        some = []
        for n in range(start, min(start + 64, samples)):
            row, mp4 = clips[n % len(clips)]
            key = f"{n:020x}-00000"
            listed.append((key, str(folder / "plain" / row["key"]), row["frame_count"]))
            some.append((key, row, mp4))
        about = [json.dumps({"count": row["frame_count"]}).encode() for _, row, _ in some]
        parts = [(key, {"mp4": mp4, "json": j}) for (key, _, mp4), j in zip(some, about, strict=True)]
        members = _tar(ours, f"{number:05d}", parts)
        rows = []
        for (key, row, _), pair in zip(some, zip(members[::2], members[1::2], strict=True), strict=True):
            places = {f"{m.extension}_{n}": getattr(m, n) for m in pair for n in ("offset", "size", "crc32")}
            rows.append(row | places | {"key": key, "source": key[:20]})
        _commit(ours, f"{number:05d}", rows, schema.INDEX)
    compact.write(ours, "train")
    (folder / "clips.json").write_text(json.dumps(listed))


BEFORE = 64  # batches before the clock starts; litdata alone makes 20 ahead


class Peer:
    """A peer's loader in a process of its environment."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        pipes["stderr"] = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.errors = pipes["stderr"]
        self.process = subprocess.Popen(command, text=True, env=environment, **pipes)

    def take(self, batches: int) -> None:
        assert self.process.stdin
        assert self.process.stdout
        try:
            self.process.stdin.write(f"{batches}\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass
        for line in self.process.stdout:
            if line.startswith("taken "):
                assert int(line.split()[1]) == batches * BATCH, line
                return
        self.errors.seek(0)
        raise SystemExit(f"a peer ended:\n{self.errors.read()[-2000:]}")

    def close(self) -> None:
        # not all of them see by themselves that their parent has ended
        for one in psutil.Process(self.process.pid).children(recursive=True):
            one.kill()
        self.process.kill()
        self.process.wait()


def throughput(
    folder: Path, peer: Callable[..., list[str]], environment: dict[str, str], arguments: Any
) -> dict[str, list[float]]:
    """What we do of the best peer's samples a second in each turn, by decoder."""
    from bench_loader import Times, timed

    from longtake.datasets.loader import Loader

    options: dict[str, Any] = {"frames": FRAMES, "size": (SIZE, SIZE), "batch": BATCH, "workers": WORKERS}
    ours = iter(Loader(str(folder / "ours"), columns=("video",), **options))

    def take(batches: int) -> None:
        for _ in range(batches):
            next(ours)

    names = [(name, decoder) for name in arguments.peers for decoder in peer_loaders.decoders(name)]
    peers = {f"{n}, {d}": Peer(peer("serve", n, str(folder), d), environment) for n, d in names}
    takers = {"ours": take} | {name: one.take for name, one in peers.items()}
    times: dict[str, list[Times]] = {name: [] for name in takers}
    for _ in range(arguments.turns):
        for name, one in takers.items():
            # start-up, and what was made before the clock starts, while the others had their turns
            one(BEFORE)
            with timed(times[name]):
                one(arguments.batches)
    for one in peers.values():
        one.close()
    print(f"{arguments.samples} samples, windows of {FRAMES}x{SIZE}x{SIZE}, batches of {BATCH}, {WORKERS} workers")
    done = arguments.batches * BATCH
    to_ours: dict[str, list[float]] = {}
    for name, taken in times.items():
        wall, cpu = (statistics.median(part) for part in zip(*taken, strict=True))
        ratios = [statistics.median(t[n] / o[n] for t, o in zip(taken, times["ours"], strict=True)) for n in range(2)]
        line = f"  {name:26s} {done / wall:8.1f} samples/s {done / cpu:8.1f} samples/CPU s"
        print(line + (f"   ours to this: {ratios[0]:.2f} by wall, {ratios[1]:.2f} by CPU" if name != "ours" else ""))
        if name != "ours":
            to_ours.setdefault(name.partition(", ")[2], []).append(ratios[0])
    best = ", ".join(f"{min(ratios):.2f} with {decoder}" for decoder, ratios in to_ours.items())
    print(f"  ours to the best of them by wall: {best}")
    print(f"  load {os.getloadavg()[0]:.1f} on {len(os.sched_getaffinity(0))} cores", flush=True)
    by_turn = {name: [t[0] / o[0] for t, o in zip(taken, times["ours"], strict=True)] for name, taken in times.items()}
    return {
        decoder: [min(turn) for turn in zip(*(by_turn[f"{n}, {d}"] for n, d in names if d == decoder), strict=True)]
        for decoder in to_ours
    }


def resuming(folder: Path, peer: Callable[..., list[str]], environment: dict[str, str], arguments: Any) -> None:
    from longtake.datasets.loader import Loader

    warnings.filterwarnings("ignore", message="This DataLoader will create")
    total = {row[0] for row in json.loads((folder / "clips.json").read_text())}

    def ours(workers: int, count: int, state: Path) -> list[str] | str:
        loader = Loader(str(folder / "ours"), columns=("json",), batch=BATCH, workers=workers, epochs=1, frames=FRAMES)
        if state.exists():
            loader.load_state_dict(json.loads(state.read_text()))
        keys = [key for batch in islice(loader, count or None) for key in batch["key"]]
        state.write_text(json.dumps(loader.state_dict()))
        return keys

    def theirs(name: str) -> Callable[[int, int, Path], list[str] | str]:
        def run(workers: int, count: int, state: Path) -> list[str] | str:
            command = peer("resume", name, str(folder), str(workers), str(count), str(state))
            try:
                done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
            except subprocess.TimeoutExpired:
                return "hangs"
            for line in done.stdout.splitlines():
                if line.startswith("keys "):
                    return json.loads(line[5:])
            return " ".join(done.stderr.strip().splitlines()[-1:])[:200]

        return run

    broken = arguments.broken_after
    print(f"an epoch of {len(total)} samples broken after {broken} batches of {BATCH}:")
    for name in ("ours", *arguments.peers):
        run = ours if name == "ours" else theirs(name)
        for workers, then in ((2, 2), (2, 3), (3, 1)):
            with tempfile.TemporaryDirectory() as spool:
                state = Path(spool, "state.json")
                before = run(workers, broken, state)
                known = state.exists()
                after = run(then, 0, state)
            if isinstance(before, str) or isinstance(after, str):
                result = f"fails: {before if isinstance(before, str) else after}"
            else:
                seen = Counter([*before, *after])
                twice, lost = sum(seen.values()) - len(seen), len(total - set(seen))
                result = f"{twice} seen twice, {lost} lost" + ("" if known else " (no state to save)")
            print(f"  {name:12s} {workers} workers, then {then}: {result}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", help="of the peers' environment")
    parser.add_argument("--figures", type=Path, help="Write the values of each turn there, by name, as JSON.")
    parser.add_argument("--dataset", help="a dataset of clips in place of the one to make")
    parser.add_argument("--samples", type=int, default=4096)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", type=int, default=96)
    parser.add_argument("--broken-after", type=int, default=37)
    parser.add_argument("--peers", nargs="+", choices=peer_loaders.PEERS, default=list(peer_loaders.PEERS))
    parser.add_argument("--only", choices=("throughput", "resuming"))
    arguments = parser.parse_args()
    if not arguments.python:
        parser.error("--python: is missing; name the Python of an environment with the peers, made as said above")
    import figures
    from bench_loader import make_clips

    from longtake.datasets import clip

    with tempfile.TemporaryDirectory() as spool:
        folder = Path(spool)
        # only the decoder is of use there
        (folder / "path").mkdir()
        (folder / "path" / "longtake").symlink_to(Path(clip.__file__).resolve().parents[1])
        environment = os.environ | {"PYTHONPATH": str(folder / "path")}

        def peer(*options: str) -> list[str]:
            return [arguments.python, peer_loaders.__file__, *options]

        found = sorted(p.absolute() for p in arguments.folder.iterdir() if p.is_file())
        repeated(arguments.dataset or make_clips(f"{spool}/clips", found), folder, arguments.samples)
        exported = subprocess.run(peer("export", spool), capture_output=True, text=True, env=environment)
        if exported.returncode:
            raise SystemExit(f"the export failed:\n{exported.stderr[-2000:]}")
        if arguments.only != "resuming":
            figures.write(arguments.figures, throughput(folder, peer, environment, arguments))
        if arguments.only != "throughput":
            resuming(folder, peer, environment, arguments)
