"""Peak memory of PV-VAE on long videos and on large frames: streamed against one pass, tiled against whole.

    python tests/benchmarks/bench_streaming.py [--preset pv_vae_tiny] [--seconds 10 120] [--size 96] [--large 1088 1920] [--turns 1]

Each line is a process of its own with one thread and random weights, and its peak above what was resident with the
model loaded, after a step on a tiny clip. glibc has one heap and gives blocks of 64 KiB back at once, so that the heap's
gaps do not count (with them, peaks wander by a third until they settle). Streaming: video of 24 frames a second comes in chunks of 16 frames, is
encoded, decoded and dropped; the target is the same peak for the long as for the short video. Tiling: 5 frames of the
large size are encoded and decoded in one pass, as a whole and in tiles of `--tile` pixels. `--figures` wants the first alone.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import figures
import torch

from longtake.training.models.pv_vae.model import PVVAE, config_from_preset

FPS, CHUNK, LARGE_FRAMES = 24, 16, 5


def resident(key: str) -> float:
    """This process's VmRSS or VmHWM in MB."""
    with open("/proc/self/status") as lines:  # noqa: PTH123
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def chunks(frames: int, height: int, width: int) -> Iterator[torch.Tensor]:
    for start in range(0, frames, CHUNK):
        yield torch.rand(1, 3, min(CHUNK, frames - start), height, width) * 2 - 1


@torch.no_grad()
def measure(preset: str, frames: int, height: int, width: int, stream: bool, tile: int | None) -> dict[str, Any]:
    torch.set_num_threads(1)
    model = PVVAE(config_from_preset(preset)).eval()
    model.reconstruct(torch.rand(1, 3, 5, 32, 32))
    base, begun, made = resident("VmRSS"), time.perf_counter(), 0
    if stream:
        latents = (p.mode() for p in model.encode_stream(chunks(frames, height, width), tile=tile))
        made = sum(piece.shape[2] for piece in model.decode_stream(latents, tile=tile))
    else:
        video = torch.cat(list(chunks(frames, height, width)), dim=2)
        made = model.decode(model.encode(video, tile).mode(), tile).shape[2]
    assert made == frames
    return {"MB": resident("VmHWM") - base, "seconds": time.perf_counter() - begun}


def run(what: str, **job: Any) -> float:
    done = subprocess.run(
        [sys.executable, __file__, "--job", json.dumps(job)],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"},
        check=False,
    )
    if done.returncode:
        sys.exit(f"{what} failed:\n{done.stderr}")
    result = json.loads(done.stdout)
    print(f"{what:>32}: peak {result['MB']:7.0f} MB, {result['seconds']:5.0f} s", flush=True)
    return float(result["MB"])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="pv_vae_tiny")
    parser.add_argument("--seconds", type=int, nargs=2, default=[10, 120])
    parser.add_argument("--size", type=int, default=96)
    parser.add_argument("--large", type=int, nargs=2, default=[1088, 1920])
    parser.add_argument("--tile", type=int, default=512)
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)
    figures.add_option(parser, turns=1)
    given = parser.parse_args()
    if given.job:
        print(json.dumps(measure(**given.job)))
        sys.exit()
    size = {"preset": given.preset, "height": given.size, "width": given.size, "tile": None}
    flat: list[float] = []
    for _ in range(given.turns):
        short, long = (run(f"{s} s streamed", frames=s * FPS + 1, stream=True, **size) for s in given.seconds)
        flat.append(long / short)
    figures.write(given.figures, {"flat": flat})
    if given.figures:
        sys.exit()
    whole = run(f"{given.seconds[0]} s in one pass", frames=given.seconds[0] * FPS + 1, stream=False, **size)
    print(f"{'long / short, streamed':>32}: {long / short:.2f}; one pass / streamed, short: {whole / short:.1f}")
    large = {"preset": given.preset, "height": given.large[0], "width": given.large[1], "frames": LARGE_FRAMES}
    shape = "x".join(map(str, given.large))
    entire = run(f"{shape}, whole", stream=False, tile=None, **large)
    tiles = run(f"{shape}, tiles of {given.tile}", stream=False, tile=given.tile, **large)
    streamed = run(f"{shape}, streamed and tiled", stream=True, tile=given.tile, **large)
    print(f"{'tiled / whole':>32}: {tiles / entire:.2f}; streamed and tiled / whole: {streamed / entire:.2f}")
