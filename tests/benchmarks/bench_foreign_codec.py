"""How fast a foreign autoencoder encodes, and how much memory long clips take: Wan 2.1's, beside its own class.

    python tests/benchmarks/bench_foreign_codec.py [--turns 7] [--frames 33] [--side 96] [--threads 1] [--lengths 65 257]

Speed: a clip by the codec's `encode`, and by the class's own `encode` and the two lines that normalise, in turns: at most
1.03 times as long. The same for both with `decode`. The network has Wan 2.1's layers at a third of its width.

Memory: the peak of a process of its own above what was resident with the weights, for clips of several lengths: the
class's `encode`, the codec's `encode`, and its `encode_stream`, whose frames come as they are needed: less than the class.

A line of JSON each: medians over the turns of CPU seconds, and the median of the turns' ratios. With more `--threads`
than one they are seconds of the clock: nothing else may run beside it then.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import figures
import torch
from torch import Tensor

from longtake.training.foreign.codec import CodecConfig, ForeignCodec

SETTINGS = {"base_dim": 32, "z_dim": 16}


def codec() -> ForeignCodec:
    torch.manual_seed(0)
    return ForeignCodec(CodecConfig(class_name="AutoencoderKLWan", settings=SETTINGS)).eval()


def clip(frames: int, side: int) -> Tensor:
    return torch.rand(1, 3, frames, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def by_class(net: Any, video: Tensor) -> Tensor:
    mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (net.config.latents_mean, net.config.latents_std))
    return (net.encode(video).latent_dist.mode() - mean) / std


def clocked(work: Callable[[], Any]) -> float:
    now = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    start = now()
    work()
    return now() - start


def compared(ours: Callable[[], Any], theirs: Callable[[], Any], turns: int) -> dict[str, Any]:
    """Seconds of both, in turns; who begins changes from turn to turn."""
    taken = []
    for number in range(1 + turns):
        order = [ours, theirs] if number % 2 else [theirs, ours]
        seconds = {work: clocked(work) for work in order}
        taken.append((seconds[ours], seconds[theirs]))
    first, second = (statistics.median(column) for column in zip(*taken[1:], strict=True))
    ratios = [a / b for a, b in taken[1:]]
    return {"seconds": first, "seconds_of_class": second, "ratio": statistics.median(ratios), "ratios": ratios}


@torch.inference_mode()
def speed(turns: int, frames: int, side: int) -> Iterator[dict[str, Any]]:
    model, video = codec(), clip(frames, side)
    latent = model.encode(video).mode()
    torch.testing.assert_close(latent, by_class(model.net, video), rtol=1e-4, atol=1e-4)
    yield {"what": "encode"} | compared(lambda: model.encode(video), lambda: by_class(model.net, video), turns)
    yield {"what": "decode"} | compared(lambda: model.decode(latent), lambda: model.net.decode(latent).sample, turns)


def resident(name: str) -> float:
    """This process's VmRSS or VmHWM in MB."""
    with open("/proc/self/status") as status:  # noqa: PTH123
        return next(int(line.split()[1]) / 1e3 for line in status if line.startswith(name))


@torch.inference_mode()
def peak(way: str, frames: int, side: int) -> float:
    """MB above what is resident once the weights are loaded and a short clip was encoded."""
    torch.set_num_threads(1)
    model = codec()
    model.encode(clip(5, side))
    before = resident("VmRSS")
    with open("/proc/self/clear_refs", "w") as peaks:  # noqa: PTH123
        peaks.write("5")
    if way == "stream":
        chunks = (clip(count, side) for count in [1] + [4] * (frames // 4))
        latents = torch.cat([part.mode() for part in model.encode_stream(chunks, 1)], dim=2)
    else:
        latents = by_class(model.net, clip(frames, side)) if way == "class" else model.encode(clip(frames, side)).mode()
    assert latents.shape[2] == 1 + frames // 4
    return resident("VmHWM") - before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frames", type=int, default=33)
    parser.add_argument("--side", type=int, default=96)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--lengths", type=int, nargs="*", default=[65, 257])
    figures.add_option(parser, turns=7)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found: dict[str, list[float]] = {}
    for line in speed(args.turns, args.frames, args.side):
        found[line["what"]] = line.pop("ratios")
        print(json.dumps(line), flush=True)
    for frames in args.lengths * args.turns:
        line = {"what": "peak MB", "frames": frames}
        for way in ("class", "codec", "stream"):
            # a process each, so that no memory that another has left is used again, and none that it has freed stays
            os.environ["MALLOC_MMAP_THRESHOLD_"] = "65536"
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                line[way] = round(pool.apply(peak, (way, frames, args.side)), 1)
        found.setdefault(f"memory_{frames}", []).append(line["codec"] / line["class"])
        found.setdefault(f"memory_streamed_{frames}", []).append(line["stream"] / line["class"])
        print(json.dumps(line), flush=True)
    figures.write(args.figures, found)


if __name__ == "__main__":
    main()
