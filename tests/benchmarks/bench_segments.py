"""Memory and time of a segment, however much came before it: a long video by a tiny random model with a memory.

    python tests/benchmarks/bench_segments.py [--minutes 10] [--memory encoder] [--size 64] [--turns 1]

Every segment is sampled with few Euler steps, decoded, scaled down, encoded again and taken into the memory of 20 s.
The targets: from the time that the memory is full until the end the resident memory grows by at most 5 %, and a segment
of the last third takes at most 1.2 times as long as one of the first. Of each third the quickest tenth is compared, and
on a CPU the process's own time is taken: others at work make a segment slower, never quicker.
"""

import argparse
import resource
import statistics
import tempfile
import time

import figures
import numpy as np
import psutil
import torch
from torch import nn

from longtake.training.engines import device
from longtake.training.models.generator import Settings
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import config_from_preset
from longtake.training.models.memory.segments import count_segments, generate
from longtake.training.models.pv_vae.model import PVVAE
from longtake.training.models.pv_vae.model import config_from_preset as vae_config

FPS, SECONDS, STEPS = 12, 20, 6  # of the video; of the memory; of a segment
GROWTH, SLOWER = 0.05, 1.2


def awake(model: nn.Module) -> None:
    """Nothing that starts at zero shall be left out."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--memory", choices=["encoder", "patchify", "framepack", "none"], default="encoder")
    parser.add_argument("--rates", nargs="+", default=["2x2x2"])
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--euler", type=int, default=2, help="steps of a segment")
    figures.add_option(parser, turns=1)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    at = device()
    clock = time.perf_counter if at.type == "cuda" else time.process_time
    vae = PVVAE(vae_config("pv_vae_tiny", latent_channels=8, encoder_width=8, decoder_width=8)).eval()
    factor, side = vae.config.temporal_stride, arguments.size // vae.config.spatial_stride
    sizes = {"channels": 8, "history": SECONDS * FPS // factor, "shape": (STEPS, side, side)}
    config = config_from_preset("memory_dit_tiny", memory=arguments.memory, rates=tuple(arguments.rates), **sizes)
    model = MemoryDiT(config).eval()
    for each in (vae, model):
        awake(each)
        each.to(at)
    steps = round(arguments.minutes * 60 * FPS / factor)
    count, process = count_segments(model, steps), psutil.Process()
    print(
        f"{arguments.minutes:g} min, {steps} steps in {count} segments of {STEPS}; {config.tokens((config.history, side, side))} tokens of memory"
    )
    found: dict[str, list[float]] = {"grown": [], "slower": []}
    full = -(-config.history // STEPS) + 1  # segments until the memory is full, and one more
    for _ in range(arguments.turns):
        resident, taken = [], []
        with tempfile.TemporaryDirectory() as folder:
            begun = clock()
            for _ in generate(model, vae, steps, [0], settings=Settings(steps=arguments.euler), folder=folder):
                resident.append(process.memory_info().rss / 1e6)
                now = clock()
                taken.append(now - begun)
                begun = now
        first, last = (np.quantile(part, 0.1) for part in (taken[full : full + count // 3], taken[-count // 3 :]))
        found["grown"].append(max(resident[full:]) / resident[full])
        found["slower"].append(float(last / first))
    figures.write(arguments.figures, found)
    grown, slower = statistics.median(found["grown"]) - 1, statistics.median(found["slower"])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    marks = np.linspace(full, count - 1, 6).round().astype(int)
    for n in marks:
        seconds = (n + 1) * STEPS * factor / FPS
        print(
            f"after {seconds:5.0f} s: RSS {resident[n]:.1f} MB, a segment in {np.median(taken[max(0, n - 8) : n + 1]):.3f} s"
        )
    print(
        f"peak RSS {peak:.0f} MB; grown by {100 * grown:.2f} % since the memory is full (target {100 * GROWTH:g} %): {'held' if grown <= GROWTH else 'EXCEEDED'}"
    )
    print(
        f"a segment of the last third takes {slower:.2f} times one of the first (target {SLOWER}): {'held' if slower <= SLOWER else 'EXCEEDED'}"
    )
    if at.type == "cuda":
        print(f"GPU: at most {torch.cuda.max_memory_allocated() / 1e6:.0f} MB")
