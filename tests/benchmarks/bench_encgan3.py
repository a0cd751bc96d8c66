"""Memory and time of EncGAN3's generation: flat in the length, and next to nothing beside the network's own.

    python tests/benchmarks/bench_encgan3.py [--size 32 --size 64] [--turns 7] [--frames 960]

Memory: the peak of a process of its own that generates 100, 1,000 and 10,000 frames clip by clip, and of one that runs the
generator once for 100 to 1,600 frames; the target is that the first does not grow from 100 to 10,000, which are measured in
each turn, the others once. Time: a rollout beside the same passes of the same network in a bare loop that also makes pixels,
in turns; CPU time, the median of the turns' ratios. The target is a ratio of at most 1.03. Weights are random, of
`encgan3_tiny` at each size.
"""

import argparse
import multiprocessing
import resource
import statistics
import time

import figures
import torch

from longtake.datasets.loader import to_pixels
from longtake.training import engines
from longtake.training.models.encgan3.config import config_from_preset
from longtake.training.models.encgan3.model import EncGAN3
from longtake.training.models.encgan3.rollout import Rollout

LENGTHS = {"rollout": (100, 1000, 10_000), "longer": (100, 400, 1600)}
TARGET = 1.03


def tiny(size: int) -> EncGAN3:
    torch.manual_seed(0)
    return EncGAN3(config_from_preset("encgan3_tiny", size=size)).eval().to(engines.device())


@torch.no_grad()
def peak(way: str, frames: int, size: int) -> float:
    """The most memory in MB, of the GPU or of this process, while so many frames are generated."""
    torch.set_num_threads(1)
    model, count = tiny(size), 0
    if way == "longer":
        z_x = torch.zeros(1, model.config.content, device=engines.device())
        z_v = torch.zeros(1, frames // 4 - 3, model.config.movement, device=engines.device())
        count = model.generate(z_x, z_v, model.first_frame(z_x), 0, frames).shape[1]
    else:
        count = sum(chunk.shape[1] for chunk in Rollout(model, [0]).pixels(frames))
    assert count == frames
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e6
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3


def grown(size: int, turns: int) -> list[float]:
    """In each turn, the peak of the longest rollout against that of the shortest. Prints the others' too, once."""
    spawn, ratios = multiprocessing.get_context("spawn"), []
    shortest, *_, longest = LENGTHS["rollout"]
    for turn in range(turns):
        peaks = {}
        for way, lengths in ({"rollout": (shortest, longest)} if turn else LENGTHS).items():
            for frames in lengths:
                with spawn.Pool(1) as pool:
                    peaks[way, frames] = pool.apply(peak, (way, frames, size))
                    print(f"{way}: {frames} frames of {size}x{size}: {peaks[way, frames]:.0f} MB", flush=True)
        ratios.append(peaks["rollout", longest] / peaks["rollout", shortest])
    return ratios


@torch.no_grad()
def bare(model: EncGAN3, frames: int) -> int:
    """The same passes as a rollout of one video, and its pixels, in a plain loop."""
    config, count = model.config, 0
    z_x = torch.randn(1, config.content).to(engines.device())
    reference, place = model.first_frame(z_x), 0
    while True:
        clip = model.generate(z_x, torch.randn(1, config.movement).to(z_x), reference, place)
        count += to_pixels(clip[:, : config.frames - config.overlap].movedim(2, -1)).cpu().numpy().shape[1]
        if count >= frames:
            return count
        reference, place = clip[:, config.joint], config.index
        z_x = model.encode_content(reference).mean


def timed(size: int, frames: int, turns: int) -> tuple[list[float], float]:
    """The ratios of a rollout's CPU time to that of the bare loop, and the median of its frames a second."""
    model, ratios, rates = tiny(size), [], []
    frames -= frames % (model.config.frames - model.config.overlap)  # whole clips, so that both make as many
    ways = {
        "rollout": lambda: sum(chunk.shape[1] for chunk in Rollout(model, [0]).pixels(frames)),
        "bare": lambda: bare(model, frames),
    }
    for turn in range(turns + 1):
        seconds = {}
        for name in sorted(ways, reverse=bool(turn % 2)):
            begun = time.process_time()
            assert ways[name]() == frames
            seconds[name] = time.process_time() - begun
        if turn:  # the first is to warm up
            ratios.append(seconds["rollout"] / seconds["bare"])
            rates.append(frames / seconds["rollout"])
    return ratios, statistics.median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, action="append", help="height and width; repeat it for several")
    parser.add_argument("--frames", type=int, default=960, help="of the timed videos")
    figures.add_option(parser, turns=7)
    options = parser.parse_args()
    sizes = options.size or [32, 64]
    found = {"memory": grown(sizes[0], options.turns)}
    for size in sizes:
        ratios, rate = timed(size, options.frames, options.turns)
        ratio, found[f"time_{size}"] = statistics.median(ratios), ratios
        verdict = "within" if ratio <= TARGET else "beyond"
        print(f"{size}x{size}: {rate:.0f} frames a second, {ratio:.3f} of the bare loop's time, {verdict} {TARGET}")
    figures.write(options.figures, found)


if __name__ == "__main__":
    main()
