"""Step time, MFU and memory of PV-VAE in the training loop on a GPU; the same program runs on a CPU to see that it works.

    python tests/benchmarks/gpu_step.py                                  # pv_vae and pv_vae_small, compiled and not, ZeRO-1
    python tests/benchmarks/gpu_step.py --presets pv_vae_tiny --size 32 --batch 2 --steps 8 --precision fp32   # anywhere
    torchrun --nproc-per-node 8 tests/benchmarks/gpu_step.py             # `batch` is over all processes

Batches are made once and lie in memory, so nothing is said about reading. A line of JSON a setting; medians of the steps
after the first third, from the loop's own metrics. Where a setting does not fit, the line says so.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from longtake.datasets.errors import Failure
from longtake.datasets.loader import to_model
from longtake.training import engines
from longtake.training.config import RunConfig, TrainConfig
from longtake.training.loop import train
from longtake.training.models.pv_vae.model import PVVAE, config_from_preset
from longtake.training.objective import Objective, Turn

SHOWN = (
    "seconds_per_step",
    "seconds_forward",
    "seconds_backward",
    "seconds_update",
    "samples_per_second",
    "tflops",
    "mfu",
)


class Same:
    """A stream of one batch."""

    def __init__(self, batch: int, frames: int, size: int) -> None:
        self._video = torch.randint(0, 256, (batch, 3, frames, size, size), dtype=torch.uint8)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        while True:
            yield {"video": self._video, "key": ["none"] * len(self._video)}

    def state_dict(self) -> dict[str, Any]:
        return {}


class Rows:
    """What the loop would send to MLflow."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.rows.append(metrics)


def measure(options: argparse.Namespace, preset: str, compiled: bool) -> dict[str, Any]:
    rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
    torch.manual_seed(0)
    model = PVVAE(config_from_preset(preset, activation_checkpointing=options.checkpointing)).to(engines.device())

    def loss(turn: Turn) -> Any:
        video = to_model(turn.batch["video"])
        out, posterior = turn.engines[turn.name](video, rng=turn.rng)
        value = (out.float() - video).square().mean() + 1e-6 * posterior.kl().mean()
        return value, {"loss": value.detach()}

    settings = {"batch": options.batch, "precision": options.precision, "zero_stage": options.zero, "compile": compiled}
    config = TrainConfig(
        **settings,  # type: ignore[arg-type]
        steps=options.steps,
        run=RunConfig(log_every=1, checkpoint_every=options.steps, sample_every=0, peak_tflops=options.peak_tflops),
    )
    rows: Any = Rows()
    stream: Any = Same(options.batch // world, options.frames, options.size)
    found: dict[str, Any] = {
        "preset": preset,
        "frames": options.frames,
        "size": options.size,
        **settings,
        "processes": world,
    }
    found["parameters_million"] = round(sum(p.numel() for p in model.parameters()) / 1e6, 1)
    with tempfile.TemporaryDirectory() as folder:
        try:
            objective = Objective({"model": model}, loss, blocks=list(model.blocks()))
            train(objective, stream, config, Path(folder), rows if rank == 0 else None)
        except Failure as e:
            return found | {"error": str(e)}
    late = rows.rows[len(rows.rows) // 3 :]
    found |= {name: statistics.median(row[name] for row in late) for name in SHOWN if rank == 0 and name in late[0]}
    return found | {
        name: max(row[name] for row in rows.rows)
        for name in ("gpu_memory_gb", "host_memory_gb")
        if rank == 0 and name in rows.rows[0]
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--presets", nargs="+", default=["pv_vae_small", "pv_vae"])
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--zero", type=int, default=1)
    parser.add_argument("--precision", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--checkpointing", action="store_true", help="Activation checkpointing.")
    parser.add_argument("--compile", choices=("on", "off", "both"), default="both")
    parser.add_argument("--peak-tflops", type=float, help="Of the device, where it is not a common GPU.")
    options = parser.parse_args()
    with engines.process_group() as (rank, _):
        if rank == 0:
            print(torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU", torch.__version__, flush=True)
        for preset in options.presets:
            for compiled in {"on": (True,), "off": (False,), "both": (False, True)}[options.compile]:
                found = measure(options, preset, compiled)
                if rank == 0:
                    print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main()
