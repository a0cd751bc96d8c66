"""Twenty seconds of history: as a memory of some tokens, against the same latents as the transformer's full context.

    python tests/benchmarks/bench_history.py [--preset memory_dit_tiny] [--size 8 12] [--rates 4x4x2 2x2x2 2x2x1] [--turns 1]

Time: encoding the history once, against one denoising pass of a segment with all its steps beside it, clean. A memory
is encoded once and a segment is denoised in many passes, so the target of 1/20 is a bound. Memory: the peak of one
training step, forward and backward, of a segment with its history: through the encoder, which learns too, against full
context; the target is 1/5, which 2x2x1 with a quarter of the tokens cannot hold. A second line says what a pass with
the memory costs, and how long a piece as long as a segment takes to append.

Each peak is that of a process of its own with one thread (on a GPU, of the allocator) above what was resident with the
model and its inputs, after a step on a small frame.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import figures
import torch
from torch import Tensor

from longtake.training import engines
from longtake.training.models.common.streaming import Past
from longtake.training.models.memory.dit import MemoryDiT
from longtake.training.models.memory.dit_config import config_from_preset
from longtake.training.models.memory.tokens import Memory

TIME_TARGET, MEMORY_TARGET = 20, 5


class Case:
    """A model with random weights, a history of `steps` and the segment after it; `rate` "full" is without a memory."""

    def __init__(self, options: argparse.Namespace, rate: str, size: tuple[int, int]) -> None:
        torch.manual_seed(0)
        chosen = {"memory": "none"} if rate == "full" else {"rates": (rate,)}
        shape = {"patch": options.patch, "channels": options.channels, "history": options.steps}
        self.config = config_from_preset(options.preset, **shape, **chosen)
        self.model = MemoryDiT(self.config).to(engines.device(), getattr(torch, options.dtype))
        for parameter in self.model.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.02)
        small = self.config.shrink or (1, 1)
        self.high = self._noise(options.steps, size)
        self.low = None if rate == "full" else self._noise(options.steps, (size[0] // small[0], size[1] // small[1]))
        self.x = self._noise(options.segment, size)
        self.window = self.high[:, :, -self.config.window :]
        self.steps, self.segment = options.steps, options.segment

    def _noise(self, steps: int, size: tuple[int, int]) -> Tensor:
        return torch.randn(1, self.config.channels, steps, *size, device=engines.device())

    def remember(self) -> Memory:
        return self.model.remember(self.high, self.low)

    def denoise(self, memory: Memory | None) -> Tensor:
        """One pass over the segment, beside its window or with no memory beside all of its history."""
        clean = self.high if memory is None else self.window
        x = torch.cat([clean, self.x], dim=2)
        t = torch.ones(1, x.shape[2], device=x.device)
        t[:, : clean.shape[2]] = 0
        return self.model(x, t, torch.arange(self.steps - clean.shape[2], self.steps + self.segment), memory)

    def train(self) -> None:
        memory = None if self.low is None else self.remember()
        self.denoise(memory)[:, :, -self.segment :].square().mean().backward()


@torch.no_grad()
def seconds(run: Callable[[], Any], times: int) -> float:
    """The least of so many, after one that does not count."""
    best = float("inf")
    for number in range(times + 1):
        start = time.perf_counter()
        run()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number:
            best = min(best, time.perf_counter() - start)
    return best


def timed(options: argparse.Namespace, rate: str) -> dict[str, Any]:
    case = Case(options, rate, options.size)
    tokens = options.steps * options.size[0] * options.size[1] // options.patch**2
    if rate == "full":
        return {"tokens": tokens, "pass": seconds(lambda: case.denoise(None), 1)}
    memory = case.remember()
    piece = options.segment // case.config.group * case.config.group or case.config.group

    def append() -> Memory:
        past = Past()
        past.begun, past.inputs = begun.begun, dict(begun.inputs)
        assert case.low is not None
        return case.model.remember(case.high[:, :, :piece], case.low[:, :, :piece], 0, [past])

    begun = Past()
    assert case.low is not None
    with torch.no_grad():
        case.model.remember(case.high[:, :, :piece], case.low[:, :, :piece], 0, [begun])
    return {
        "tokens": memory.tokens.shape[1],
        "encode": seconds(case.remember, 5),
        "append": seconds(append, 5),
        "pass": seconds(lambda: case.denoise(memory), 3),
    }


def resident(key: str) -> float:
    """This process's VmRSS or VmHWM in MB."""
    with open("/proc/self/status") as lines:  # noqa: PTH123
        return next(int(line.split()[1]) for line in lines if line.startswith(key)) * 1024 / 1e6


def trained(options: argparse.Namespace, rate: str) -> dict[str, Any]:
    Case(options, rate, (8 * options.patch, 8 * options.patch)).train()
    case = Case(options, rate, options.size)
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() / 1e6
    else:
        before = resident("VmRSS")
        with open("/proc/self/clear_refs", "w") as peaks:  # noqa: PTH123
            peaks.write("5")
    start = time.perf_counter()
    case.train()
    peak = torch.cuda.max_memory_allocated() / 1e6 if torch.cuda.is_available() else resident("VmHWM")
    return {"peak": peak - before, "step": time.perf_counter() - start}


def alone(what: str, rate: str) -> dict[str, Any]:
    """`timed` or `trained` in a process of its own."""
    one = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"), "MALLOC_MMAP_THRESHOLD_": str(1 << 20)}
    command = [sys.executable, __file__, *sys.argv[1:], "--alone", what, rate]
    done = subprocess.run(command, env=os.environ | one, check=True, capture_output=True, text=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="memory_dit_tiny")
    parser.add_argument("--size", type=int, nargs=2, default=(8, 12), help="of the latents")
    parser.add_argument("--patch", type=int, default=1)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--steps", type=int, default=120, help="of the history: 20 s at 6 a second")
    parser.add_argument("--segment", type=int, default=5)
    parser.add_argument("--rates", nargs="+", default=["4x4x2", "2x2x2", "2x2x1"])
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--turns", type=int, default=1)
    figures.add_option(parser)
    parser.add_argument("--alone", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        print(json.dumps({"timed": timed, "trained": trained}[options.alone[0]](options, options.alone[1])))
        return
    size = "x".join(map(str, options.size))
    print(
        f"{options.preset}, {options.steps} steps of {size}, patch {options.patch}, {engines.device()}, {options.dtype}"
    )
    found = dict[str, list[float]]()
    for _ in range(options.turns):
        for name, value in turn(options).items():
            found.setdefault(name, []).append(value)
    figures.write(options.figures, found)


def turn(options: argparse.Namespace) -> dict[str, float]:
    """Print each rate against full context; returns encoding and the memory of a training step as shares of it."""
    shares = dict[str, float]()
    full, full_step = alone("timed", "full"), alone("trained", "full")
    print(
        f"full context: {full['tokens']} tokens; a pass {full['pass']:.2f} s; a training step {full_step['peak']:.0f} MB"
    )
    for rate in options.rates:
        made, step = alone("timed", rate), alone("trained", rate)
        shares |= {
            f"encoding {rate}": made["encode"] / full["pass"],
            f"memory {rate}": step["peak"] / full_step["peak"],
        }
        faster, smaller = full["pass"] / made["encode"], full_step["peak"] / step["peak"]
        print(
            f"{rate}: {made['tokens']} tokens; encoding {made['encode'] * 1e3:.0f} ms = 1/{faster:.0f} of a full pass"
            f" (target 1/{TIME_TARGET}: {'held' if faster >= TIME_TARGET else 'MISSED'});"
            f" a training step {step['peak']:.0f} MB = 1/{smaller:.1f}"
            f" (target 1/{MEMORY_TARGET}: {'held' if smaller >= MEMORY_TARGET else 'MISSED'})"
        )
        print(
            f"    a pass with it 1/{full['pass'] / made['pass']:.0f} of a full one; appending a segment"
            f" {made['append'] * 1e3:.0f} ms; a training step in 1/{full_step['step'] / step['step']:.0f} of the time",
            flush=True,
        )
    return shares


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    main()
