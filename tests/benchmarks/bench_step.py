"""A step of the training loop against a bare PyTorch loop: the same model, batch and optimizer, in turns, in one run.

    python tests/benchmarks/bench_step.py                       # one process, ZeRO-0: the ratio that counts
    python tests/benchmarks/bench_step.py --processes 2         # ZeRO 0 to 3 against DistributedDataParallel

Prints medians over the steps. The loop's step holds all that it does beside training: averages, metrics, guards, logging.
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

import torch

from longtake.training import engines
from longtake.training.config import TrainConfig
from longtake.training.loop import Objective, train
from longtake.training.models.pv_vae import PVVAE, config_from_preset

WARM_UP = 5


def made(width: int) -> PVVAE:
    torch.manual_seed(0)
    return PVVAE(config_from_preset("pv_vae_tiny", encoder_width=width, decoder_width=width)).to(engines.device())


def loss_of(model: Any, video: torch.Tensor) -> torch.Tensor:
    out, posterior = model(video)
    return (out - video).square().mean() + 1e-6 * posterior.kl().mean()


class Turns:
    """A stream of one batch; before each, a step of the bare loop. What passes until it is asked again is the loop's step."""

    def __init__(self, video: torch.Tensor, width: int, world: int) -> None:
        self.video, self.bare, self.ours = video, list[float](), list[float]()
        self.model: Any = made(width)
        if world > 1:
            self.model = torch.nn.parallel.DistributedDataParallel(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            start = time.perf_counter()
            loss = loss_of(self.model, self.video)
            self.optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.optimizer.step()
            float(loss)
            given = time.perf_counter()
            self.bare.append(given - start)
            yield {"video": self.video, "key": ["none"]}
            self.ours.append(time.perf_counter() - given)

    def state_dict(self) -> dict[str, Any]:
        return {}


def measure(steps: int, zero_stage: int, width: int, size: int) -> dict[str, Any]:
    with engines.process_group() as (_, world), tempfile.TemporaryDirectory() as folder:
        torch.set_num_threads(1)
        video = torch.rand(2, 3, 9, size, size, device=engines.device()) * 2 - 1
        turns = Turns(video, width, world)

        def loss(name: str, running: Any, batch: Any, generator: Any) -> Any:
            value = loss_of(running[name], batch["video"])
            return value, {"loss": value.detach()}

        config = TrainConfig(
            steps=steps, batch=2 * world, zero_stage=zero_stage, checkpoint_every=steps, log_every=10, schedule="constant", lr=1e-4
        )
        stream: Any = turns
        train(Objective({"model": made(width)}, loss), stream, config, Path(folder))
        bare, ours = (statistics.median(times[WARM_UP:]) for times in (turns.bare, turns.ours))
        return {"zero_stage": zero_stage, "processes": world, "steps": steps, "bare_ms": 1e3 * bare, "ours_ms": 1e3 * ours, "ratio": ours / bare}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--width", type=int, default=16, help="Channels of the finest stages.")
    parser.add_argument("--size", type=int, default=64, help="Pixels a side.")
    parser.add_argument("--zero", type=int, help="Only this stage; without launching anything.")
    options = parser.parse_args()
    if options.zero is not None or options.processes == 1:
        found = measure(options.steps, options.zero or 0, options.width, options.size)
        if os.environ.get("RANK", "0") == "0":
            print(json.dumps(found), flush=True)
        return
    for stage in range(4):
        command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={options.processes}"]
        command += [__file__, "--zero", str(stage), "--steps", str(options.steps), "--width", str(options.width), "--size", str(options.size)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        print(done.stdout.strip().splitlines()[-1], flush=True)


if __name__ == "__main__":
    main()
