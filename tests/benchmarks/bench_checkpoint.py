"""How long training stands still for a checkpoint, and how long it takes until that is safe, for a model of some size.

    python tests/benchmarks/bench_checkpoint.py [--width 2048] [--saves 5] [--zero 1] [--interval 200]

Trains a perceptron of `--width` with the loop. Each save is timed twice in one run: as the loop does it, going on while the
files are synced and renamed, and waiting for that. The stall is given as a share of the time between checkpoints at the
default interval, with the median step of this very run; a real model's steps are longer for the same weights.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from longtake.training import checkpoint, engines
from longtake.training.config import RunConfig, TrainConfig
from longtake.training.loop import train
from longtake.training.objective import Objective, Turn


class Same:
    """A stream of one batch that notes when it is asked."""

    def __init__(self, width: int) -> None:
        self._batch = torch.randn(64, width)
        self.asked: list[float] = []

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            self.asked.append(time.perf_counter())
            yield {"x": self._batch, "key": ["none"] * len(self._batch)}

    def state_dict(self) -> dict[str, Any]:
        return {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--saves", type=int, default=5)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--interval", type=int, default=RunConfig.model_fields["checkpoint_every"].default)
    options = parser.parse_args()
    gone_on, waited = list[float](), list[float]()
    save = checkpoint.Checkpoints.save

    def timed(keeper: checkpoint.Checkpoints, *arguments: Any) -> None:
        keeper.wait()
        start = time.perf_counter()
        save(keeper, *arguments)
        gone_on.append(time.perf_counter() - start)
        keeper.wait()
        waited.append(time.perf_counter() - start)

    checkpoint.Checkpoints.save = timed  # type: ignore[method-assign]
    between = 5
    with engines.process_group(), tempfile.TemporaryDirectory(dir=".") as folder:
        module = nn.Sequential(*[nn.Linear(options.width, options.width) for _ in range(options.layers)])

        def loss(turn: Turn) -> Any:
            value = turn.engines[turn.name](turn.batch["x"]).square().mean()
            return value, {"loss": value.detach()}

        stream: Any = Same(options.width)
        config = TrainConfig(
            steps=between * options.saves,
            batch=64,
            zero_stage=options.zero,
            run=RunConfig(checkpoint_every=between),
            ema_half_lives=(1000,),
        )
        train(Objective({"model": module}, loss), stream, config, Path(folder))
        size = sum(p.stat().st_size for p in checkpoint.latest(Path(folder)).rglob("*") if p.is_file())  # type: ignore[union-attr]
    steps = [
        b - a for n, (a, b) in enumerate(zip(stream.asked, stream.asked[1:], strict=False), 1) if n % between and n > 1
    ]
    step, stall, safe = statistics.median(steps), statistics.median(gone_on), statistics.median(waited)
    found = {
        "parameters_million": sum(p.numel() for p in module.parameters()) / 1e6,
        "checkpoint_mb": size / 1e6,
        "step_ms": 1e3 * step,
        "stall_ms": 1e3 * stall,
        "until_safe_ms": 1e3 * safe,
        "interval": options.interval,
        "stall_share": stall / (options.interval * step + stall),
        "share_if_it_waited": safe / (options.interval * step + safe),
    }
    print(json.dumps({name: round(value, 4) for name, value in found.items()}))


if __name__ == "__main__":
    main()
