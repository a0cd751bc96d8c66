"""A step of the training loop against a bare PyTorch loop: the same model, batch and optimizer, in turns, in one run.

    python tests/benchmarks/bench_step.py --zero 0              # one process, ZeRO-0: the ratio that counts
    python tests/benchmarks/bench_step.py --turns 3             # one process, ZeRO 0 to 3, three times each
    python tests/benchmarks/bench_step.py --processes 2         # ZeRO 0 to 3 against DistributedDataParallel

Prints means over the steps, so that each counts, also one that logs. The loop's step holds all that it does beside
training: averages, metrics, guards, logging.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import figures
import torch

from longtake.training import engines
from longtake.training.config import RunConfig, TrainConfig
from longtake.training.loop import train
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.objective import Objective, Turn

WARM_UP = 5


def made(preset: str) -> PVVAE:
    torch.manual_seed(0)
    return PVVAE(config_from_preset(preset)).to(engines.device())


def loss_of(model: Any, video: torch.Tensor) -> torch.Tensor:
    out, posterior = model(video)
    return (out - video).square().mean() + 1e-6 * posterior.kl().mean()


Seconds = tuple[float, float]  # of the wall's clock, and of the CPU


def now() -> Seconds:
    return time.perf_counter(), time.process_time()


def since(start: Seconds, end: Seconds) -> Seconds:
    return end[0] - start[0], end[1] - start[1]


class Turns:
    """A stream of one batch; before each, a step of the bare loop. What passes until it is asked again is the loop's step."""

    def __init__(self, video: torch.Tensor, preset: str, world: int) -> None:
        self.video, self.bare, self.ours = video, list[Seconds](), list[Seconds]()
        self.model: Any = made(preset)
        if world > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            start = now()
            loss = loss_of(self.model, self.video)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            float(loss)
            given = now()
            self.bare.append(since(start, given))
            yield {"video": self.video, "key": ["none"] * len(self.video)}
            self.ours.append(since(given, now()))

    def state_dict(self) -> dict[str, Any]:
        return {}


def measure(steps: int, zero_stage: int, preset: str, batch: int, size: int) -> dict[str, Any]:
    with engines.process_group() as (_, world), tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        video = torch.rand(batch // world, 3, 9, size, size, device=engines.device()) * 2 - 1
        turns = Turns(video, preset, world)

        def loss(turn: Turn) -> Any:
            value = loss_of(turn.engines[turn.name], turn.batch["video"])
            return value, {"loss": value.detach()}

        config = TrainConfig(
            steps=steps,
            batch=batch,
            zero_stage=zero_stage,
            run=RunConfig(checkpoint_every=steps, log_every=10),
            schedule="constant",
            lr=1e-4,
        )
        stream: Any = turns
        train(Objective({"model": made(preset)}, loss), stream, config, Path(folder))
        found: dict[str, Any] = {"zero_stage": zero_stage, "processes": world, "steps": steps}
        for which, clock in enumerate(("wall", "cpu")):
            bare, ours = (statistics.fmean(t[which] for t in times[WARM_UP:]) for times in (turns.bare, turns.ours))
            found |= {f"{clock}_bare_ms": 1e3 * bare, f"{clock}_ours_ms": 1e3 * ours, f"{clock}_ratio": ours / bare}
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--preset", default="pv_vae_tiny", help="Of PV-VAE.")
    parser.add_argument("--batch", type=int, default=8, help="Clips of 9 frames in a step, over all processes.")
    parser.add_argument("--size", type=int, default=64, help="Pixels a side.")
    parser.add_argument("--zero", type=int, help="Only this stage, once; without launching anything.")
    parser.add_argument("--turns", type=int, default=1, help="Measurements of each stage, one stage after the other.")
    figures.add_option(parser)
    options = parser.parse_args()
    if options.zero is not None:
        found = measure(options.steps, options.zero, options.preset, options.batch, options.size)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        return
    several = ["-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
    ratios: dict[str, list[float]] = {}
    for stage in [*range(4)] * options.turns:
        command = [sys.executable, *(several if options.processes > 1 else [])]
        command += [__file__, "--zero", str(stage), "--steps", str(options.steps), "--preset", options.preset]
        command += ["--batch", str(options.batch), "--size", str(options.size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        line = done.stdout.strip().splitlines()[-1]
        print(line, flush=True)
        for clock in ("wall", "cpu"):
            ratios.setdefault(f"{clock}-zero{stage}", []).append(json.loads(line)[f"{clock}_ratio"])
    figures.write(options.figures, ratios)


if __name__ == "__main__":
    main()
